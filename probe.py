"""See what the attention aligns: which teacher tokens does a student token attend to, is it the right place, and do the
distributions of keys and queries match?

    python probe.py out/toy-dskd_cma_ga                            # pictures, a table and probe.json for 20 rows of dev
    python probe.py out/toy-dskd_cma out/toy-dskd_cma_ga           # two checkpoints in one picture and one table
    python probe.py out/toy-dskd_cma_ga --curves                   # the run's losses and accuracies over its steps

As the first half of DSKD-CMA-GA (arXiv 2603.22056) asks it. The right place for a token is its chunk
(tokenize_align.py), the least stretch of text that both tokenizers cut out; a position of either side is named by the
token that it predicts.

Notable here:
- attention depends on embeddings and P_q alone (cma.align), so that no model's layers are loaded;
- every number stands beside what uniform attention and the chunk-mean probe get on the same rows;
- intervals are 95% bootstrap intervals over responses (rows), not over tokens, which are not independent of each other.
"""
import collections
import json
import math
import shlex
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import discriminator
import toy
from cma import align
from files import hub
from files.config import InputError, flag, parse
from files.rows import read_rows
from methods.sides import side_of
from methods.table import make_modules
from model import load
from running import pictures
from running.checkpoint import load_modules
from running.measures import (MEASURES, RESAMPLES, SHARES, distances, evenly, interval, measure, resample, tell_apart)
from tokenize_align import Example, Sequence, collate, encode_rows, load_tokenizer

BATCH = 32              # rows whose keys are divided by one σ_K, as in training
DIRECTIONS = ("student → teacher", "teacher → student")
MATCHING = (("probe_accuracy", "told apart by a logistic probe, held out", "50.0 %"),
            ("mean_distance", "distance of means (keys' deviations)", "0.00"),
            ("energy_distance", "energy distance (keys' deviations)", "0.00"))

# ---------------------------------------------------------------------------------------------- from a run to attention
@dataclass
class Response:
    """One response in both tokenizations, and what each token takes of the other side: S and T valid positions."""
    row: int                        # in the data file, from 0
    student: Sequence
    teacher: Sequence
    attention: torch.Tensor         # (S, T), student → teacher: each row sums to 1
    back: torch.Tensor              # (T, S), teacher → student
    keys: torch.Tensor              # (T, 2 d_t)
    queries: torch.Tensor | None    # (S, 2 d_t)

    @property
    def same_chunk(self) -> torch.Tensor:
        """(S, T)"""
        return torch.tensor(self.student.chunks)[:, None] == torch.tensor(self.teacher.chunks)

    @property
    def blocks(self) -> list[tuple[range, range]]:
        """The chunks that have tokens on both sides: (student tokens, teacher tokens)."""
        places = [{k: range(chunks.index(k), len(chunks) - chunks[::-1].index(k)) for k in chunks}
                  for chunks in (self.student.chunks, self.teacher.chunks)]
        return [(places[0][k], places[1][k]) for k in places[0] if k in places[1]]

@torch.no_grad()
def attend(options, examples: list[Example], student, teacher, projectors, pads: tuple[int, int]) -> list[Response]:
    """A run's attention on some examples, float32 on the CPU. student, teacher: .embed; options: the run's settings."""
    device, responses = student.embed.weight.device, []
    for start in range(0, len(examples), BATCH):
        part = examples[start:start + BATCH]
        batch = {name: x.to(device) for name, x in collate(part, *pads, options.align_on).items()}
        sides = side_of(batch, "student", student.embed), side_of(batch, "teacher", teacher.embed)
        found = align(*sides, projectors, options.alignment)
        for i, example in enumerate(part):
            s, t = example.student.valid, example.teacher.valid
            queries = None if found.queries is None else found.queries[i, :s].float().cpu()
            rest = [x.float().cpu() for x in (found.attention[i, :s, :t], found.back[i, :t, :s], found.keys[i, :t])]
            responses.append(Response(example.row, example.student, example.teacher, *rest, queries))
    return responses

def attention_values(responses: list[Response], kind: str = "attention") -> dict[str, list[dict[str, torch.Tensor]]]:
    """direction → each response's measure(), of its own attention, of "uniform" attention or of the "chunk_mean"."""
    values = {direction: [] for direction in DIRECTIONS}
    for response in responses:
        middles, repeats = [], []
        for side in (response.student, response.teacher):
            labels = side.ids[side.prompt_length:]
            often = collections.Counter(labels)
            repeats.append(torch.tensor([often[i] > 1 for i in labels]))
            middles.append(torch.tensor(side.spans).double().mean(1))
        inside = response.same_chunk
        for direction, weights, mask, a, b in ((DIRECTIONS[0], response.attention, inside, 0, 1),
                                               (DIRECTIONS[1], response.back, inside.T, 1, 0)):
            weights = {"attention": weights, "uniform": torch.full_like(weights, 1 / weights.size(1)),
                       "chunk_mean": mask / mask.sum(1, keepdim=True).clamp(min=1)}[kind]
            values[direction].append(measure(weights, mask, repeats[a], middles[a], middles[b]))
    return values

def matching_values(responses: list[Response]) -> list[list[torch.Tensor]]:
    """Whether a logistic probe, trained on every other response, is right about the keys and the queries of each → two
    lists (keys, queries) of a tensor of 0 and 1 for each response."""
    sides = [s.keys for s in responses], [s.queries for s in responses]
    folds = [torch.cat([torch.full((len(v),), i % 2) for i, v in enumerate(vectors)]) for vectors in sides]
    right = tell_apart(*map(torch.cat, sides), *folds)
    return [list(of_side.split([len(v) for v in vectors])) for of_side, vectors in zip(right, sides)]

@torch.no_grad()
def adversary_numbers(kind: str, adversary, responses: list[Response]) -> dict[str, float]:
    """The adversary's mean losses and accuracies, without dropout, on the responses' keys and queries."""
    was_training, device = adversary.training, next(adversary.parameters()).device
    adversary.eval()
    totals = collections.Counter()
    for s in responses:
        keys, queries = s.keys.to(device), s.queries.to(device)
        if kind == "gan":
            parts = discriminator.gan(adversary, keys, queries)
        else:
            everything = [torch.ones(1, len(x), dtype=torch.bool, device=device) for x in (keys, queries)]
            parts = discriminator.conditional_transport(adversary, keys[None], queries[None], *everything)
        totals.update({name: float(value) for name, value in parts.items()})
    adversary.train(was_training)
    n = {"key": sum(len(s.keys) for s in responses), "query": sum(len(s.queries) for s in responses)}
    return {name.removeprefix("adversary_"): value / n[name.split("_")[1]] for name, value in totals.items()}

def training_numbers(options, responses: list[Response], adversary) -> dict[str, float]:
    """What --probe_interval adds to metrics.jsonl."""
    numbers, directions = {}, attention_values(responses)
    for values, suffix in zip(directions.values(), ("", "_back")):
        numbers |= {f"probe_{name}{suffix}": float(torch.cat([v[name] for v in values]).mean())
                    for name in ("mass", "hit")}
    if responses[0].queries is not None and len(responses) > 1:
        numbers["probe_accuracy"] = sum(float(torch.cat(right).mean()) for right in matching_values(responses)) / 2
    if adversary is not None:
        found = adversary_numbers(options.adversary, adversary, responses)
        numbers |= {f"probe_{name}": value for name, value in found.items()}
    return numbers

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
        if config.alignment != "none":
            best = open_checkpoint(config.out_dir, str(run.folders["teacher"]))
            if responses := look(best, run.files["dev"], BATCH):
                drawn.insert(0, draw(best, readable(responses), run.out_dir / "heatmap.png"))
        print(f"pictures:          {', '.join(map(str, drawn))}")
    except Exception as error:          # the run is finished and saved: it must not fail for a picture
        print(f"pictures:          could not be drawn ({' '.join(repr(error).split()):.200})")
    if config.alignment != "none":
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

def open_checkpoint(checkpoint: str, teacher: str = "", device: str = "cpu") -> Checkpoint:
    """Read embeddings, projectors, adversary and tokenizers of a checkpoint. teacher: where it lies now, if it was
    moved. Raises InputError for what is no checkpoint of an attention method."""
    out_dir, folder = folder_of_run(checkpoint), hub.model_dir(checkpoint)
    try:
        settings = types.SimpleNamespace(**json.loads((out_dir / "config.json").read_text(encoding="utf-8")))
        method, alignment, _ = settings.method, settings.alignment, settings.adversary
        teacher = teacher or settings.teacher
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{out_dir}/config.json: not what train.py writes ({error})") from error
    if alignment == "none":
        raise InputError(f"{checkpoint}: --method {method} has no attention to look at (--curves draws its losses)")
    if teacher == "toy":
        teacher = str(toy.folder("teacher"))
    student, frozen = load(folder, device=device, layers=False), load(teacher, device=device, layers=False)
    modules = make_modules(settings, student.config.hidden_size, frozen.config.hidden_size)
    modules = [module and module.to(device) for module in modules]
    load_modules(folder, *modules)
    tokenizers = load_tokenizer(folder), load_tokenizer(teacher)
    return Checkpoint(checkpoint, folder, settings, student, frozen, *modules, tokenizers)

def look(run: Checkpoint, file: Path, num: int) -> list[Response]:
    """The attention on the first rows of a data file."""
    settings, rows = run.settings, read_rows(file)
    examples, _, dropped = encode_rows(rows[:num], *run.tokenizers, settings.max_length, settings.max_prompt_length)
    if dropped:
        print(f"{file}: {dropped} of {len(rows[:num])} rows left out: no response token within {settings.max_length}")
    return attend(settings, examples, run.student, run.teacher, run.projectors, tuple(t.eos_id for t in run.tokenizers))

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
    scale, digits = (100, 1) if name in SHARES or name == "probe_accuracy" else (1, 2)
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
    """Two checkpoints' keys and queries, and one response's attention in both."""
    chosen, columns = every[0].index(readable(every[0])), []
    for mark, run, responses, result in zip("AB", runs, every, results):
        response = responses[chosen]
        labels = [token_labels(getattr(response, side), t) for side, t in zip(("student", "teacher"), run.tokenizers)]
        columns.append(dict(title=f"{mark}: {run.name}", heading=f"row {response.row}, {DIRECTIONS[0]}",
                            weights=response.attention, blocks=response.blocks, student_labels=labels[0],
                            teacher_labels=labels[1]))
        if "keys_and_queries" in result:
            keys, queries = points(responses)
            columns[-1] |= dict(keys=keys, queries=queries, title=scatter_title(columns[-1]["title"], result))
    pictures.comparison(path, columns)

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
    records = []
    for number, line in enumerate((out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True), 1):
        if line.endswith("\n"):             # the last line of a run that is going on may be half-written
            try:
                record = json.loads(line)
                records.append({"step": record["step"], **record})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{out_dir}/metrics.jsonl:{number}: not what train.py writes ({error!r})") from error
    if not records:
        raise InputError(f"{out_dir}/metrics.jsonl: no step is recorded yet")
    return pictures.curves(out_dir / "curves.png", str(out_dir), records)

# --------------------------------------------------------------------------------------------------------------- main
@dataclass
class Config:
    checkpoint: str = flag("", "a run's out_dir, or best/ or last/ in it")
    other: str = flag("", "a second one, to compare with it")
    data: str = flag("", "rows to look at: name, folder or .jsonl file (default: the run's data)")
    split: str = flag("dev", "which of them", choices=("train", "dev", "test"))
    num: int = flag(20, "how many rows, from the first", at_least=2, at_most=1000)
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
    runs = [open_checkpoint(name, config.teacher, device) for name in names]
    data = config.data or runs[0].settings.data
    toy.write_data_for([data])
    file = hub.data_file(data, "test" if Path(data).is_file() else config.split)
    every = [look(run, file, config.num) for run in runs]
    common = set.intersection(*({s.row for s in responses} for responses in every))
    every = [[s for s in responses if s.row in common] for responses in every]
    if len(common) < 2:
        raise InputError(f"{file}: {len(common)} rows to look at, and 2 is the least")
    results, draws = zip(*(numbers(run, responses) for run, responses in zip(runs, every)))

    default = folder_of_run(names[0]) / ("probe" if len(names) == 1 else f"probe-with-{hub.label(names[1])}")
    out_dir = Path(config.out_dir or default)
    others = ["attention.safetensors", "contact_sheet.png", "keys_queries.png", "comparison.png"]
    others += [heatmap_name(response.row) for response in every[0]]
    before = hub.claim(out_dir, "probe.json", {"checkpoints", "resamples"}, others)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, r in zip(("A: ", "B: ") if config.other else ("",), results):
        print(f"{name}{r['checkpoint']} ({r['method']}), {len(common)} rows of {file}, {r['student_tokens']} student "
              f"and {r['teacher_tokens']} teacher tokens")
    print_numbers(results, draws)
    for row in before["checkpoints"][0]["rows"] if before else []:
        (out_dir / heatmap_name(row)).unlink(missing_ok=True)
    with hub.atomic_write(out_dir / "probe.json") as log:
        content = {"data": str(file), "resamples": RESAMPLES, "checkpoints": list(results)}
        json.dump(content, log, indent=2, ensure_ascii=False)
    if config.other:
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
