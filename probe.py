"""See what the attention aligns: which teacher tokens does a student token attend to, is it the right place, and do the
distributions of keys and queries match? Of a method without attention: which bytes do teacher and student expect?

    python probe.py out/toy-dskd_cma_ga                            # pictures, a table and probe.json for 20 rows of dev
    python probe.py out/toy-dskd_cma out/toy-dskd_cma_ga           # two checkpoints in one picture and one table
    python probe.py out/toy-dskd_cma_ga --curves                   # the run's losses and accuracies over its steps
    python probe.py out/toy-byte_kd                                # next bytes: a picture, a table and probe.json
    python probe.py out/toy-dskd_cma out/toy-byte_kd               # the same of two runs, as one has no attention

As the first half of DSKD-CMA-GA (arXiv 2603.22056) asks it. The right place for a token is its chunk
(tokenize_align.py), the least stretch of text that both tokenizers cut out; a position of either side is named by the
token that it predicts.

Notable here:
- attention depends on embeddings and P_q alone (cma.align), so that no model's layers are loaded, but for --leak;
- every number stands beside what uniform attention and the chunk-mean probe get on the same rows;
- intervals are 95% bootstrap intervals over responses (rows), not over tokens, which are not independent of each other.
"""
import json
import math
import shlex
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import toy
from files import hub
from files.config import InputError, flag, parse
from files.rows import Row, read_rows
from methods.table import Options, make_modules
from model import load
from running import next_bytes, pictures
from running.attention import (BATCH, DIRECTIONS, Response, adversary_numbers, attend, attention_values,
                               matching_values, training_numbers)
from running.checkpoint import load_modules
from running.measures import MEASURES, RESAMPLES, SHARES, distances, evenly, interval, resample
from running.run_folder import read_metrics
from tokenize_align import Example, Sequence, encode_rows, load_tokenizer

SIDES = "student", "teacher"
MATCHING = (("probe_accuracy", "told apart by a logistic probe, held out", "50.0 %"),
            ("mean_distance", "distance of means (keys' deviations)", "0.00"),
            ("energy_distance", "energy distance (keys' deviations)", "0.00"))

# -------------------------------------------------------------------------------------------- what train.py asks for
def choose_rows(config, run) -> None:
    """For --probe_interval: the first dev rows, into run.looked_at. Raises InputError where none is long enough."""
    if config.probe_interval:
        run.looked_at = encode_rows(run.rows["dev"][:BATCH], run.tokenizers["student"], run.tokenizers["teacher"],
                                    config.max_length, config.max_prompt_length)[0]
        if not run.looked_at:
            raise InputError(f"--probe_interval: none of {BATCH} dev rows has a response within --max_length "
                             f"{config.max_length}")

def numbers_of_run(config, run) -> dict[str, float]:
    """The main numbers of a run's attention as it is now, for metrics.jsonl; what is not finite is left out."""
    with run.autocast():
        responses = attend(config, run.looked_at, run.student, run.teacher, run.projectors, run.pads)
    numbers = training_numbers(config, responses, run.adversary)
    return {name: value for name, value in numbers.items() if math.isfinite(value)}

def leave_pictures(config, run, results: dict) -> None:
    """Draw the run's scores and curves and, where there is attention, the best checkpoint's on a dev row."""
    try:
        split = "test" if "test" in run.scored else "dev"
        title = f"{run.out_dir}, {len(run.scored[split])} rows of {split}"
        scores = {name: of[split] for name, of in results.items()}
        drawn = [pictures.results(run.out_dir / "results.png", title, scores), draw_curves(run.out_dir)]
        if config.alignment != "none" or config.method == "byte_kd":
            best = open_checkpoint(config.out_dir, str(run.folders["teacher"]))
            if best.projectors is None:
                if found := expect(best, run.files["dev"], BATCH):
                    drawn.insert(0, next_bytes.draw({"student": found}, run.out_dir / "next_bytes.png", best.name))
            elif responses := look(best, run.files["dev"], BATCH):
                drawn.insert(0, draw(best, readable(responses), run.out_dir / "heatmap.png"))
        print(f"pictures:          {', '.join(map(str, drawn))}")
    except Exception as error:          # the run is finished and saved: it must not fail for a picture
        print(f"pictures:          could not be drawn ({' '.join(repr(error).split()):.200})")
    if config.teacher and config.method != "sft":
        print(f"look closer:       python probe.py {shlex.quote(config.out_dir)}")

# ------------------------------------------------------------------------------------------------------- a checkpoint
@dataclass
class Checkpoint:
    """A checkpoint of train.py, as far as attention needs it."""
    name: str
    folder: Path                    # of the checkpoint
    settings: types.SimpleNamespace  # of the run
    student: torch.nn.Module
    teacher: torch.nn.Module
    projectors: torch.nn.Module
    adversary: torch.nn.Module | None
    tokenizers: tuple               # the student's, the teacher's

def folder_of_run(checkpoint: str) -> Path:
    """The out_dir of a checkpoint, which may be given as the out_dir itself or as best/ or last/ in it."""
    path = Path(checkpoint)
    path = path.parent if path.name in ("best", "last") and not (path / "metrics.jsonl").exists() else path
    if not (path / "metrics.jsonl").exists() or not (path / "config.json").exists():
        raise InputError(f"{checkpoint}: not a run of train.py (config.json, metrics.jsonl and best/ or last/)")
    return path

def open_checkpoint(checkpoint: str, teacher: str = "", device: str = "cpu", layers: tuple = ()) -> Checkpoint:
    """Read embeddings, projectors, adversary and tokenizers of a checkpoint, and the layers of the sides that `layers`
    names; of a method without attention, both sides'. teacher: where it lies now, if it was moved. Raises InputError
    for what is no checkpoint of a method with a teacher."""
    out_dir, folder = folder_of_run(checkpoint), hub.model_dir(checkpoint)
    try:
        saved = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
        settings = types.SimpleNamespace(**{**asdict(Options()), **saved})      # of an earlier version, too
        method, alignment = settings.method, settings.alignment
        _ = settings.data, settings.max_length, settings.max_prompt_length          # are there
        teacher = teacher or settings.teacher
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{out_dir}/config.json: not what train.py writes ({error})") from error
    if not teacher:
        raise InputError(f"{checkpoint}: --method {method} has no attention to look at (--curves draws its losses, and "
                         "--teacher names a model to compare its next bytes with)")
    if teacher == "toy":
        teacher = str(toy.folder("teacher"))
    try:
        guide = hub.model_dir(teacher)
    except InputError as error:
        raise InputError(f"{error}; --teacher says where the teacher lies now") from error
    layers = SIDES if alignment == "none" else layers
    student, frozen = (load(name, device=device, layers=side in layers) for side, name in zip(SIDES, (folder, guide)))
    modules = None, None
    if alignment != "none":
        modules = make_modules(settings, student, frozen)
        modules = [module and module.to(device) for module in modules]
        load_modules(folder, *modules)
    tokenizers = load_tokenizer(folder), load_tokenizer(guide)
    return Checkpoint(checkpoint, folder, settings, student, frozen, *modules, tokenizers)

def first_examples(run: Checkpoint, file: Path, num: int) -> tuple[list[Row], list[Example]]:
    """The first rows of a data file, and of these the ones that have a response token within the run's limits."""
    settings, rows = run.settings, read_rows(file)[:num]
    examples, _, dropped = encode_rows(rows, *run.tokenizers, settings.max_length, settings.max_prompt_length)
    if dropped:
        print(f"{file}: {dropped} of {len(rows)} rows left out: no response token within {settings.max_length}")
    return rows, examples

def look(run: Checkpoint, file: Path, num: int, leak: bool = False) -> list[Response]:
    """The attention on the first rows of a data file; leak: also who is right about which chunk."""
    return attend(run.settings, first_examples(run, file, num)[1], run.student, run.teacher, run.projectors,
                  tuple(t.eos_id for t in run.tokenizers), leak)

def expect(run: Checkpoint, file: Path, num: int) -> list[next_bytes.Along]:
    """What both models expect at every byte of the first rows' answers."""
    rows, examples = first_examples(run, file, num)
    return next_bytes.along(run.tokenizers, examples, rows, run.student, run.teacher)

# ------------------------------------------------------------------------------------------------ numbers and pictures
def numbers(run: Checkpoint, responses: list[Response]) -> tuple[dict, dict[str, np.ndarray]]:
    """Everything that is measured, as probe.json has it, and the bootstrap draws by name (for differences)."""
    result = {"checkpoint": str(run.folder), "method": run.settings.method, "rows": [s.row for s in responses],
              "student_tokens": sum(len(s.attention) for s in responses),
              "teacher_tokens": sum(len(s.back) for s in responses), "attention": {}}
    draws, kinds = {}, {kind: attention_values(responses, kind) for kind in ("uniform", "chunk_mean", "attention")}
    for direction in DIRECTIONS:
        table = result["attention"][direction] = {name: {} for name in MEASURES}
        for name, row in table.items():
            for kind, values in kinds.items():              # attention comes last: its draws are kept
                mean, draws[direction, name] = resample([v[name] for v in values[direction]])
                row[kind] = {"mean": mean, "interval": None if mean is None else interval(draws[direction, name])}
    if responses[0].right:
        right = [resample([s.right[side] for s in responses]) for side in (0, 1)]
        draws["leak"] = right[0][1] - right[1][1]
        result["leak"] = {"z_t2s": right[0][0], "teacher": right[1][0],
                          "leak": {"mean": right[0][0] - right[1][0], "interval": interval(draws["leak"])}}
    if responses[0].queries is not None:
        keys, queries = torch.cat([s.keys for s in responses]), torch.cat([s.queries for s in responses])
        right = [resample(side) for side in matching_values(responses)]
        draws["probe_accuracy"] = sum(means for _, means in right) / 2
        accuracy = {"mean": sum(mean for mean, _ in right) / 2, "interval": interval(draws["probe_accuracy"])}
        result["keys_and_queries"] = {"probe_accuracy": accuracy, **distances(keys, queries)}
        if run.adversary is not None:
            result["adversary"] = adversary_numbers(run.settings.adversary, run.adversary, responses)
    return result, draws

def cell(name: str, mean: float | None, bounds: list[float] | None = None, sign: str = "") -> str:
    if mean is None:
        return "–"
    scale, digits = (100, 1) if name in {*SHARES, "probe_accuracy", "leak"} or "right" in name else (1, 2)
    digits = 3 if name in next_bytes.MEASURES and scale == 1 else digits
    mean, *bounds = (f"{scale * value:{sign}.{digits}f}" for value in (mean, *(bounds or [])))
    return mean + (" %" if scale == 100 else "") + (f"  [{', '.join(bounds)}]" if bounds else "")

def cells(name: str, values: list[dict], draws: list) -> list[str]:
    """The columns of one number: each checkpoint's, and of two their difference. draws: theirs, or None."""
    columns = [cell(name, value["mean"], value["interval"]) for value in values]
    if len(values) == 2:
        a, b = (value["mean"] for value in values)
        bounds = None if any(d is None for d in draws) else interval(draws[1] - draws[0])
        columns.append("–" if a is None or b is None else cell(name, b - a, bounds, "+"))
    return columns

def print_numbers(results: list[dict], draws: list[dict]) -> None:
    """One checkpoint's numbers, or two beside each other with their difference."""
    def line(title, columns):
        print(f"{title:<42}" + "".join(f"{column:>26}" for column in columns))
    two, names = len(results) == 2, "AB" if len(results) == 2 else ["attention [95 %]"]
    headings = [*names, "B − A"] if two else names
    for direction in DIRECTIONS:
        print()
        line(direction, [*headings, "uniform", "chunk mean"])
        for name, title in MEASURES.items():
            rows = [result["attention"][direction][name] for result in results]
            others = [cell(name, rows[0][kind]["mean"]) for kind in ("uniform", "chunk_mean")]
            line(title, cells(name, [row["attention"] for row in rows], [d[direction, name] for d in draws]) + others)
    if any("keys_and_queries" in result for result in results):
        print()
        line("keys and queries", [*headings, "matched"])
    for name, title, matched in MATCHING if any("keys_and_queries" in result for result in results) else ():
        values = [result.get("keys_and_queries", {}).get(name) for result in results]
        values = [value if isinstance(value, dict) else {"mean": value, "interval": None} for value in values]
        line(title, cells(name, values, [d.get(name) for d in draws]) + [matched])
    if "leak" in results[0]:
        print()
        line("chunks guessed right", headings)
        for who in ("z_t2s", "teacher"):
            line(who, cells("leak", [{"mean": r["leak"][who], "interval": None} for r in results], [None, None]))
        line("leak: their difference", cells("leak", [r["leak"]["leak"] for r in results], [d["leak"] for d in draws]))
    for heading, result in zip(names, results):
        if "adversary" in result:
            who = f"{heading}'s adversary" if two else "the run's adversary"
            print(f"{who}, without dropout: "
                  + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in result["adversary"].items()))

def verdict(results: list[dict], draws: list[dict]) -> str:
    """Whether keys and queries are closer to each other in B than in A."""
    a, b = (result["keys_and_queries"] for result in results)
    closer = (b["probe_accuracy"]["mean"] < a["probe_accuracy"]["mean"]) + sum(
        b[name] < a[name] for name in ("mean_distance", "energy_distance"))
    low, high = interval(draws[1]["probe_accuracy"] - draws[0]["probe_accuracy"])
    certain = "a clear fall" if high < 0 else "a clear rise" if low > 0 else "no clear difference"
    return f"keys and queries are closer in B than in A by {closer} of 3 measures; the probe's accuracy shows {certain}"

def token_labels(side: Sequence, tokenizer) -> list[str]:
    return ["EOS" if i == tokenizer.eos_id else pictures.token_label(tokenizer.token_bytes(i))
            for i in side.ids[side.prompt_length:]]

def draw(run: Checkpoint, response: Response, path: Path) -> Path:
    """One response's heatmap, both directions."""
    panels = {}
    for (direction, (values,)), whole, weights in zip(attention_values([response]).items(), ("rows", "columns"),
                                                      (response.attention, response.back.T)):
        mass = 100 * float(values["mass"].mean())
        panels[f"{direction}\n{whole} sum to 1\n{mass:.0f} % inside the right chunk"] = weights
    labels = [token_labels(side, tokenizer)
              for side, tokenizer in zip((response.student, response.teacher), run.tokenizers)]
    title = f"{run.name}, row {response.row}\nstudent tokens down, teacher tokens across, chunks outlined"
    return pictures.heatmap(path, title, *labels, panels, response.blocks)

def heatmap_name(row: int) -> str:
    return f"heatmap-{row:05d}.png"

def draw_all(run: Checkpoint, responses: list[Response], result: dict, out_dir: Path) -> None:
    """A heatmap a response, the contact sheet, the scatter of keys and queries."""
    for response in tqdm(responses, desc="heatmaps", unit="row", leave=False, dynamic_ncols=True):
        draw(run, response, out_dir / heatmap_name(response.row))
    masses = [100 * float(values["mass"].mean()) for values in attention_values(responses)[DIRECTIONS[0]]]
    sheet = [(f"row {s.row}, {mass:.0f} % inside", s.attention, s.blocks) for s, mass in zip(responses, masses)]
    pictures.contact_sheet(out_dir / "contact_sheet.png", sheet)
    if "keys_and_queries" in result:
        pictures.scatter(out_dir / "keys_queries.png", scatter_title(run.name, result), *points(responses))

def compare_pictures(runs: list[Checkpoint], every: list[list[Response]], results: list[dict], path: Path) -> None:
    """Two checkpoints' keys and queries, over training where --probe_interval looked at them, and one response's
    attention in both."""
    chosen, columns, over_training = every[0].index(readable(every[0])), [], {}
    for mark, run, responses, result in zip("AB", runs, every, results):
        response = responses[chosen]
        labels = [token_labels(getattr(response, side), t) for side, t in zip(("student", "teacher"), run.tokenizers)]
        columns.append(dict(title=f"{mark}: {run.name}", heading=f"row {response.row}, {DIRECTIONS[0]}",
                            weights=response.attention, blocks=response.blocks, student_labels=labels[0],
                            teacher_labels=labels[1]))
        if "keys_and_queries" in result:
            keys, queries = points(responses)
            columns[-1] |= dict(keys=keys, queries=queries, title=scatter_title(columns[-1]["title"], result))
        looks = [(r["step"], 100 * r["probe_accuracy"]) for r in read_metrics(folder_of_run(run.name))
                 if "probe_accuracy" in r]
        over_training |= {f"{mark}: {run.name}": looks} if looks else {}
    pictures.comparison(path, columns, over_training)

def scatter_title(name: str, result: dict) -> str:
    q = result["keys_and_queries"]
    accuracy = 100 * q["probe_accuracy"]["mean"]
    return f"{name}\nprobe {accuracy:.1f} %, means {q['mean_distance']:.2f} σ, energy {q['energy_distance']:.2f} σ"

def points(responses: list[Response]) -> list[torch.Tensor]:
    """At most MOST_POINTS keys and as many queries, evenly chosen."""
    return [evenly(torch.cat([s.keys for s in responses])), evenly(torch.cat([s.queries for s in responses]))]

def readable(responses: list[Response]) -> Response:
    """Of the responses that a picture shows whole and large, the longest; else the shortest."""
    def length(response):
        return max(response.attention.shape)
    return max((s for s in responses if length(s) <= 40), key=length, default=min(responses, key=length))

def draw_curves(out_dir: Path) -> Path:
    """out_dir/curves.png from out_dir/metrics.jsonl. Raises InputError where there is no line to draw."""
    return pictures.curves(out_dir / "curves.png", str(out_dir), read_metrics(out_dir))

# --------------------------------------------------------------------------------------------------------------- main
@dataclass
class Config:
    checkpoint: str = flag("", "a run's out_dir, or best/ or last/ in it")
    other: str = flag("", "a second one, to compare with it")
    data: str = flag("", "rows to look at: name, folder or .jsonl file (default: the run's data)")
    split: str = flag("dev", "which of them", choices=("train", "dev", "test"))
    num: int = flag(20, "how many rows, from the first", at_least=2, at_most=1000)
    leak: bool = flag(False, "also: is z_t2s right more often than the teacher itself? Runs the teacher's layers")
    curves: bool = flag(False, "draw the run's metrics.jsonl over its steps, and nothing else")
    teacher: str = flag("", "where the teacher is, if it was moved")
    out_dir: str = flag("", "where it all goes (default: probe/, of two probe-with-NAME/, in the first run's folder)")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))

def main() -> None:
    config = parse(Config, __doc__, positional=("checkpoint", "other"))
    if not config.checkpoint:
        raise InputError("name a run: python probe.py OUT_DIR")
    names = [config.checkpoint, *([config.other] if config.other else [])]
    if config.curves:
        for name in names:
            print(f"wrote {draw_curves(folder_of_run(name))}")
        return
    device, _ = hub.pick_device(config.device, "float32")
    runs = [open_checkpoint(name, config.teacher, device, ("teacher",) if config.leak else ()) for name in names]
    attention = all(run.projectors is not None for run in runs)
    if not attention and config.leak:
        raise InputError("--leak is of methods with attention")
    if not attention and any(run.projectors is not None for run in runs):
        runs = [open_checkpoint(name, config.teacher, device, SIDES) for name in names]
    data = config.data or runs[0].settings.data
    toy.write_data_for([data])
    file = hub.data_file(data, "test" if Path(data).is_file() else config.split)
    every = [look(run, file, config.num, config.leak) if attention else expect(run, file, config.num) for run in runs]
    common = set.intersection(*({s.row for s in responses} for responses in every))
    every = [[s for s in responses if s.row in common] for responses in every]
    if len(common) < 2:
        raise InputError(f"{file}: {len(common)} rows to look at, and 2 is the least")
    default = folder_of_run(names[0]) / ("probe" if len(names) == 1 else f"probe-with-{hub.label(names[1])}")
    (show_attention if attention else show_next_bytes)(runs, every, file, Path(config.out_dir or default))

def show_next_bytes(runs: list[Checkpoint], every: list[list[next_bytes.Along]], file: Path, out_dir: Path) -> None:
    """The table, next_bytes.png and probe.json of runs of which not all have attention."""
    two = len(runs) == 2
    before = hub.claim(out_dir, "probe.json", {"checkpoints", "resamples"}, ["next_bytes.png"])
    out_dir.mkdir(parents=True, exist_ok=True)
    names = [f"{mark}{run.name}" for mark, run in zip(("A: ", "B: ") if two else ("",), runs)]
    number = sum(len(answer.kl) for answer in every[0])
    for name, run in zip(names, runs):
        print(f"{name} ({run.settings.method}), {len(every[0])} rows of {file}, {number} bytes with EOS")
    results, draws = zip(*map(next_bytes.numbers, every))
    print(f"\n{'next bytes':<42}" + "".join(f"{x:>26}" for x in (["A", "B", "B − A"] if two else ["mean [95 %]"])))
    for name, title in next_bytes.MEASURES.items():
        values = [{"mean": result[name], "interval": interval(d[name])} for result, d in zip(results, draws)]
        print(f"{title:<42}" + "".join(f"{x:>26}" for x in cells(name, values, [d[name] for d in draws])))
    checkpoints = [{"checkpoint": str(run.folder), "method": run.settings.method, "rows": [a.row for a in answers],
                    "next_bytes": result} for run, answers, result in zip(runs, every, results)]
    write_log(out_dir, before, file, checkpoints)
    next_bytes.draw(dict(zip("AB" if two else ("student",), every)), out_dir / "next_bytes.png", "\n".join(names))
    print(f"\nwrote next_bytes.png and probe.json into {out_dir}")

def write_log(out_dir: Path, before: dict | None, file: Path, checkpoints: list[dict]) -> None:
    """probe.json anew; the heatmaps that the one before listed go."""
    for row in before["checkpoints"][0]["rows"] if before else []:
        (out_dir / heatmap_name(row)).unlink(missing_ok=True)
    with hub.atomic_write(out_dir / "probe.json") as log:
        json.dump({"data": str(file), "resamples": RESAMPLES, "checkpoints": checkpoints}, log, indent=2,
                  ensure_ascii=False)

def show_attention(runs: list[Checkpoint], every: list[list[Response]], file: Path, out_dir: Path) -> None:
    """The table, the pictures and probe.json of runs with attention."""
    two = len(runs) == 2
    results, draws = zip(*(numbers(run, responses) for run, responses in zip(runs, every)))
    others = ["attention.safetensors", "contact_sheet.png", "keys_queries.png", "comparison.png"]
    others += [heatmap_name(response.row) for response in every[0]]
    before = hub.claim(out_dir, "probe.json", {"checkpoints", "resamples"}, others)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, r in zip(("A: ", "B: ") if two else ("",), results):
        print(f"{name}{r['checkpoint']} ({r['method']}), {len(every[0])} rows of {file}, {r['student_tokens']} student "
              f"and {r['teacher_tokens']} teacher tokens")
    print_numbers(results, draws)
    write_log(out_dir, before, file, list(results))
    if two:
        if all("keys_and_queries" in r for r in results):
            print(f"\n{verdict(results, draws)}")
        compare_pictures(runs, every, results, out_dir / "comparison.png")
        print(f"\nwrote comparison.png and probe.json into {out_dir}")
        return
    with hub.whole_file(out_dir / "attention.safetensors") as temporary:
        save_file({f"{s.row}.{name}": x.contiguous() for s in every[0]
                   for name, x in (("student_to_teacher", s.attention), ("teacher_to_student", s.back))}, temporary)
    draw_all(runs[0], every[0], results[0], out_dir)
    scatter = "keys_queries.png, " if "keys_and_queries" in results[0] else ""
    print(f"\nwrote {len(every[0])} heatmaps, contact_sheet.png, {scatter}attention.safetensors and probe.json into "
          f"{out_dir}")

if __name__ == "__main__":
    hub.run(main)
