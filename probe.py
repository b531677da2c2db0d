"""See what the attention aligns: which teacher tokens does a student token attend to, is it the
right place, and do the distributions of keys and queries match? Of a method without attention:
which bytes do teacher and student expect?

    python probe.py out/toy-dskd_cma_ga                     # a table, pictures, probe.json
    python probe.py out/toy-dskd_cma out/toy-dskd_cma_ga    # two runs beside each other
    python probe.py out/toy-byte_kd                         # next bytes

As the first half of DSKD-CMA-GA (arXiv 2603.22056) asks it. Every number stands beside what uniform
attention and the chunk-mean probe have on the same rows; in brackets 95 % bootstrap intervals over
responses."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import runtime.config  # first, so that Ctrl-C while starting is one line
import torch

from data import Row, read_split, read_splits
from hub.download import model_folder
from methods import find_method
from methods.byte_kd import END
from model import load
from pictures import attention as attention_pictures
from probing.attention import DIRECTIONS, MEASURES, Response, attend, measure_all
from probing.next_bytes import MEASURES as BYTE_MEASURES
from probing.next_bytes import NextBytePrediction, predict_next_bytes
from probing.bootstrap import interval, mean_distance, resample
from runtime.checkpoint import load_modules, saved_settings
from runtime.config import InputError, flag, parse, run_script
from runtime.files import atomic_write, file_label
from tokenize_align import Example, encode_rows, load_tokenizer

SHOWN_TOKENS = 40  # a picture shows the longest response of at most so many
SHOWN_POINTS = 1000  # keys, and queries, in the scatter
SHOWN_BYTES = 60


@dataclass
class Config:
    run: str = flag("", "A run's out_dir.")
    other: str = flag("", "A second one, to compare with it.")
    data: str = flag("", "Rows to look at: name, folder or .jsonl file. Without it: the run's.")
    split: str = flag("dev", "Which of them.", choices=("train", "dev", "test"))
    num: int = flag(20, "How many rows, from the first.", minimum=2)
    teacher: str = flag("", "The teacher, where the run has none or it was moved.")
    out_dir: str = flag("", "Where it all goes. Without it: probe/ in the first run's folder.")


@dataclass
class Run:
    """A finished run, as far as its attention or its next bytes need it."""

    name: str
    settings: dict
    student: torch.nn.Module
    teacher: torch.nn.Module
    attention: str | None  # the method's
    modules: dict  # empty for a method without attention
    tokenizers: tuple  # the student's, the teacher's

    def examples(self, rows: list[Row]) -> list[Example]:
        settings = self.settings
        examples, _, dropped = encode_rows(
            rows,
            *self.tokenizers,
            settings["max_length"],
            settings["max_prompt_length"],
        )
        if dropped:
            print(f"{dropped} of {len(rows)} rows have no response token within --max_length")
        return examples


def open_run(name: str, teacher: str) -> Run:
    """Read a run's best checkpoint, projectors and teacher."""
    out_dir = Path(name)
    settings = saved_settings(out_dir)
    if "method" not in settings:
        raise InputError(f"{name}: is a model, not a run of train.py")
    teacher = teacher or settings["teacher"]
    if teacher == "toy":
        import toy

        teacher = str(toy.model_folder("teacher"))
    if not teacher:
        raise InputError(f"{name}: has no teacher; --teacher names a model to compare it with")
    folder = model_folder(out_dir)
    student, frozen = load(folder), load(teacher)
    prompt_format = settings["teacher_prompt_format"] or settings["prompt_format"]
    tokenizers = load_tokenizer(folder), load_tokenizer(teacher, prompt_format)
    modules, method = {}, find_method(settings["method"])
    if method.attention:
        options = SimpleNamespace(**settings)
        modules = method.make_modules(options, student.config, frozen.config)
        load_modules(folder, modules)
    return Run(name, settings, student, frozen, method.attention, modules, tokenizers)


# ------------------------------------------------------------------------------------------ numbers


def attention_numbers(responses: list[Response]) -> tuple[dict, dict]:
    """What is measured: name → {"mean", "interval", …}; and the bootstrap draws by name."""
    numbers, draws = {}, {}
    by_kind = {kind: measure_all(responses, kind) for kind in ("run", "uniform", "chunk_mean")}
    for direction in DIRECTIONS:
        for measure in MEASURES:
            key = f"{direction}: {measure}"
            mean, draws[key] = resample([v[measure] for v in by_kind["run"][direction]])
            numbers[key] = {"mean": mean, "interval": None}
            if mean is not None:
                numbers[key]["interval"] = interval(draws[key])
            for kind in ("uniform", "chunk_mean"):
                numbers[key][kind], _ = resample([v[measure] for v in by_kind[kind][direction]])
    if responses[0].queries is not None:
        keys = torch.cat([response.keys for response in responses])
        queries = torch.cat([response.queries for response in responses])
        numbers["mean_distance"] = {"mean": mean_distance(keys, queries), "interval": None}
    return numbers, draws


def byte_numbers(predictions: list[NextBytePrediction]) -> tuple[dict, dict]:
    numbers, draws = {}, {}
    measured = [prediction.measures() for prediction in predictions]
    for measure in BYTE_MEASURES:
        mean, draws[measure] = resample([values[measure] for values in measured])
        numbers[measure] = {"mean": mean, "interval": interval(draws[measure])}
    return numbers, draws


def cell(mean: float | None, bounds: list[float] | None = None, sign: str = "") -> str:
    if mean is None:
        return "–"
    text = f"{mean:{sign}.3f}"
    if bounds:
        text += f"  [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"
    return text


def print_table(
    heading: str,
    titles: dict[str, str],
    numbers: list[dict],
    draws: list[dict],
    others: tuple[str, ...] = (),
) -> None:
    """A line per number: each run's, of two their difference, and what `others` have."""
    columns = ["A", "B", "B − A"] if len(numbers) == 2 else ["mean [95 %]"]
    print(f"\n{heading:<42}" + "".join(f"{column:>26}" for column in [*columns, *others]))
    for key, title in titles.items():
        found = [of_run.get(key) for of_run in numbers]
        if None in found:
            continue
        cells = [cell(number["mean"], number["interval"]) for number in found]
        if len(found) == 2 and found[0]["mean"] is not None and found[1]["mean"] is not None:
            bounds = None
            if key in draws[0] and key in draws[1]:
                bounds = interval(draws[1][key] - draws[0][key])
            cells.append(cell(found[1]["mean"] - found[0]["mean"], bounds, "+"))
        elif len(found) == 2:
            cells.append("")
        cells += [cell(found[0][other]) for other in others]
        print(f"{title:<42}" + "".join(f"{text:>26}" for text in cells))


# -------------------------------------------------------------------------------------------- shows


def show_attention(runs: list[Run], responses: list[list[Response]], out_dir: Path) -> list[dict]:
    """Print the table and leave the pictures → the numbers of each run."""
    numbers, draws = zip(*(attention_numbers(of_run) for of_run in responses))
    for direction in DIRECTIONS:
        titles = {f"{direction}: {measure}": title for measure, title in MEASURES.items()}
        print_table(direction, titles, numbers, draws, ("uniform", "chunk_mean"))
    print_table(
        "keys and queries",
        {"mean_distance": "distance of means (keys' deviations)"},
        numbers,
        draws,
    )

    chosen = shown([max(response.t2s.shape) for response in responses[0]], SHOWN_TOKENS)
    scatters = {}
    for mark, run, of_run in zip("AB", runs, responses):
        heading = f"{mark}: {run.name}" if len(runs) == 2 else run.name
        name = f"heatmap-{mark}.png" if len(runs) == 2 else "heatmap.png"
        response = of_run[chosen]
        attention_pictures.heatmaps(
            out_dir / name,
            f"{heading}, row {response.row}\nstudent tokens down, teacher tokens "
            "across, chunks outlined",
            token_labels(response.student, run.tokenizers[0]),
            token_labels(response.teacher, run.tokenizers[1]),
            {
                "student → teacher\nrows sum to 1": response.t2s,
                "teacher → student\ncolumns sum to 1": response.s2t.T,
            },
            response.same_chunk,
        )
        if response.queries is not None:
            scatters[heading] = (
                torch.cat([r.keys for r in of_run])[:SHOWN_POINTS],
                torch.cat([r.queries for r in of_run])[:SHOWN_POINTS],
            )
    if scatters:
        attention_pictures.scatters(out_dir / "keys_queries.png", scatters)
    return list(numbers)


def token_labels(sequence, tokenizer) -> list[str]:
    labels = []
    for token in sequence.response_ids:
        label = attention_pictures.token_label(tokenizer.token_bytes(token))
        labels.append("EOS" if token == tokenizer.eos_id else label)
    return labels


def shown(lengths: list[int], most: int) -> int:
    """Which one a picture shows: the longest that fits whole and large, else the shortest."""
    fitting = [length for length in lengths if length <= most]
    return lengths.index(max(fitting) if fitting else min(lengths))


def show_next_bytes(
    runs: list[Run], predictions: list[list[NextBytePrediction]], out_dir: Path
) -> list[dict]:
    """Print the table and leave next_bytes.png → the numbers of each run."""
    numbers, draws = zip(*(byte_numbers(of_run) for of_run in predictions))
    print_table("next bytes", BYTE_MEASURES, numbers, draws)
    chosen = shown([len(prediction.text) for prediction in predictions[0]], SHOWN_BYTES - 1)
    answer = predictions[0][chosen]
    panels, divergences = {"teacher": answer.teacher[:SHOWN_BYTES, :END]}, {}
    for run, of_run in zip(runs, predictions):
        panels[run.name] = of_run[chosen].student[:SHOWN_BYTES, :END]
        divergences[run.name] = of_run[chosen].kl[:SHOWN_BYTES]
    attention_pictures.next_bytes(
        out_dir / "next_bytes.png",
        f"what comes next in row {answer.row}",
        answer.text[:SHOWN_BYTES],
        panels,
        divergences,
    )
    return list(numbers)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv, positional=("run", "other"))
    if not config.run:
        raise InputError("name a run: python probe.py OUT_DIR")
    names = [name for name in (config.run, config.other) if name]
    runs = [open_run(name, config.teacher) for name in names]
    data = config.data or runs[0].settings["data"]
    if data.startswith("toy"):
        import toy

        toy.write_data()
    place = f"{data}, {config.split}"
    if not config.data:
        splits = read_splits(data, runs[0].settings["seed"])
        if config.split not in splits:
            raise InputError(f"--split {config.split}: {data} has none")
        rows = splits[config.split]
    elif Path(data).is_file():
        rows, place = read_split(data, "test"), data
    else:
        rows = read_split(data, config.split)
    rows = [row for row in rows if row.outputs][: config.num]
    folder = "probe" if len(runs) == 1 else f"probe-with-{file_label(config.other)}"
    out_dir = Path(config.out_dir or Path(config.run) / folder)

    with_attention = all(run.attention for run in runs)
    by_run = []
    for run in runs:
        examples = run.examples(rows)
        if with_attention:
            pads = run.tokenizers[0].eos_id, run.tokenizers[1].eos_id
            by_run.append(
                attend(
                    run.attention,
                    examples,
                    run.student,
                    run.teacher,
                    run.modules["projectors"],
                    pads,
                )
            )
        else:
            by_run.append(predict_next_bytes(run.tokenizers, examples, run.student, run.teacher))
    common = set.intersection(*({item.row for item in of_run} for of_run in by_run))
    if len(common) < 2:
        raise InputError(f"{data}: {len(common)} rows to look at, but 2 are needed")
    by_run = [[item for item in of_run if item.row in common] for of_run in by_run]
    out_dir.mkdir(parents=True, exist_ok=True)
    for mark, run in zip("AB", runs):
        print(f"{mark}: {run.name} ({run.settings['method']}), {len(common)} rows of {place}")
    show = show_attention if with_attention else show_next_bytes
    numbers = show(runs, by_run, out_dir)
    with atomic_write(out_dir / "probe.json") as log:
        json.dump(
            {
                "data": place,
                "rows": sorted(common),
                "runs": {run.name: of_run for run, of_run in zip(runs, numbers)},
            },
            log,
            indent=2,
            ensure_ascii=False,
        )
    print(f"\nwrote pictures and probe.json into {out_dir}")


if __name__ == "__main__":
    run_script(main)
