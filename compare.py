"""The papers' table: methods × training seeds, each cell trained by train.py and scored by eval_rouge.py.

    python compare.py --methods sft dskd_cma dskd_cma_ga --seeds 1 2 3 4 5                     # the toy
    python compare.py --methods dskd_cma "dskd_cma_ga --ga_weight 1" --seeds 1 2 3 --lr 1e-3   # rows may have flags of train.py …
    python compare.py --preset paper --dry_run                                                 # commands and costs, nothing is run

A row is a method with its own flags; every other flag of train.py is for all rows. Training seeds are --seeds; every trained
student is scored with the sampling seeds --scoring_seeds, and a cell's score is their mean. ± is the standard deviation over
training seeds.

Notable here: a finished cell is a line of results.jsonl and never runs again, a half one goes on where it stopped, so that
the same command can be given again after a kill, and with more seeds or rows. The difference to --baseline has a paired
bootstrap interval: training seeds are drawn, and within each set its rows, for both methods alike.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_rouge
import flops
import hub
import memory
import parallel
import pictures
import toy
import train
from config import flag, parse
from hub import InputError
from run_folder import FREE, append_line, saved_config
from tokenize_align import encode_rows, load_tokenizer, read_rows

RESAMPLES = 2000
PAPER_SETS = ("dolly", "self-inst", "vicuna", "sinst", "uinst")
DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")
PRESETS = {
    # GPT-2 120M ← Qwen1.5-1.8B (arXiv 2406.17328, 2603.22056): what train.py's defaults don't say already
    "paper": dict(
        first=["--method", "sft", "--student", "qwen", "--data", "dolly", "--lr", "2e-5", "--epochs", "3", "--out_dir", "out/paper-teacher"],
        flags=["--teacher", "out/paper-teacher", "--student", "gpt2"], data="dolly",
        methods=["sft", "seqkd", "uld", "mined", *(f"{method} --divergence {name}" for method in ("dskd_cma", "dskd_cma_ga", "dwa_kd") for name in DIVERGENCES)]),
    # on the toy, what the release leaves open: λ_GA (its own is 1/n, n = 175 tokens a step), the adversary, and whether it is trained
    "ablation": dict(
        first=[], flags=["--epochs", "24", "--probe_interval", "0", "--cache_teacher"], data="toy",
        methods=["sft", "dskd_cma", *(f"{method} --ga_weight {weight} --ga_lr {lr}" for method in ("dskd_cma_ga", "dskd_cma_ct")
                                      for weight in ("0.0057", "0.01", "0.1", "0.3", "1") for lr in ("1e-3", "0"))])}


@dataclass
class Config:
    methods: list[str] = flag(["sft", "dskd_cma", "dskd_cma_ga"], "the table's rows: methods of train.py, in quotes with flags of their own")
    seeds: list[int] = flag([1, 2, 3, 4, 5], "training seeds", at_least=0, at_most=2**40)
    scoring_seeds: list[int] = flag([10, 20, 30, 40, 50], "sampling seeds with which every trained student is scored", at_least=0, at_most=2**40)
    sets: list[str] = flag([], "the table's columns: data sets to score on (default: the toy's four, the papers' five, or --data)")
    num: int = flag(0, "score only the first N rows of each set (0: all)", at_least=0)
    baseline: str = flag("dskd_cma", "the row to which the others' difference is given")
    data: str = flag("toy", "training data, as in train.py")
    out_dir: str = flag("", "where cells, results.jsonl, table.md and table.png go (default: out/compare-DATA)")
    preset: str = flag("", "a known experiment, in place of --methods and --data", choices=("", *PRESETS))
    dry_run: bool = flag(False, "print every command and its estimated cost, and run nothing")
    peak: float = flag(989.0, "for --dry_run: the machine's peak (TFLOP/s; an H100 in bfloat16: 989)", at_least=1e-3)
    mfu: float = flag(0.4, "for --dry_run: the share of the peak that is reached", at_least=1e-3, at_most=1)


@dataclass
class Cell:
    """One training run: a row of the table, a training seed, and all of train.py's flags."""
    row: str
    seed: int
    flags: list[str]
    folder: Path

    @property
    def key(self) -> str:
        """What a finished cell is recognized by: everything that its scores depend on."""
        return hashlib.sha256(repr(self.flags).encode()).hexdigest()[:16]


def read_command_line(argv: list[str]) -> tuple[Config, list[str]]:
    """Our flags, and the rest, which is for train.py."""
    names, ours, others = {field.name for field in dataclasses.fields(Config)} | {"help"}, [], []
    target = ours
    for part in argv:
        if part.startswith("--"):
            target = ours if part[2:].split("=")[0] in names else others
        target.append(part)
    return parse(Config, __doc__, ours), others


def make_cells(config: Config, shared: list[str], out_dir: Path) -> list[Cell]:
    """Every cell, its flags checked by train.py before anything runs."""
    cells = []
    for row in dict.fromkeys(config.methods):
        method, *own = shlex.split(row)
        for seed in dict.fromkeys(config.seeds):
            folder = out_dir / "cells" / f"{hub.label(row)}-seed{seed}"
            flags = ["--method", method, *own, *flags_for(method, shared), *(["--data", config.data] if config.data != "toy" else []), "--seed", str(seed)]
            check_begun(folder, train.read_config([*flags, "--out_dir", str(folder)]))
            cells.append(Cell(row, seed, flags, folder))
    return cells


def check_begun(folder: Path, wanted) -> None:
    """Raise InputError where the folder holds a run with other settings than this cell's."""
    if not (folder / "config.json").exists():
        return
    saved = saved_config(train.Config, folder, {})
    for name, value in dataclasses.asdict(wanted).items():
        if name not in FREE and saved[name] != value:
            raise InputError(f"{folder}: holds a run with --{name} {saved[name]}, not {value}; pass another --out_dir")


def flags_for(method: str, flags: list[str]) -> list[str]:
    """The flags without those of a teacher that this method refuses."""
    flags = list(flags)
    if method == "sft" and "--teacher" in flags:
        place = flags.index("--teacher")
        del flags[place:place + 2]
    if method in ("sft", "seqkd") and "--cache_teacher" in flags:
        flags.remove("--cache_teacher")
    return flags


# -------------------------------------------------------------------------------------------------------------- cells

def run_cell(cell: Cell, config: Config, sets: list[str]) -> dict:
    """Train, or go on training, and score → the cell's line of results.jsonl."""
    begun = (cell.folder / "config.json").exists()
    argv = ["--out_dir", str(cell.folder), "--resume"] if begun else [*cell.flags, "--out_dir", str(cell.folder)]
    limits = train.read_config(argv)
    if not (cell.folder / "results.json").exists():             # train.py's last word
        with contextlib.ExitStack() as stack:
            train.train(limits, stack)
    parallel.barrier()
    eval_rouge.evaluate(eval_rouge.Config(model=str(cell.folder), data=sets, seeds=config.scoring_seeds, num=config.num, max_length=limits.max_length,
                                          max_prompt_length=limits.max_prompt_length))
    if not parallel.is_first():
        return {}
    scored = json.loads((cell.folder / "best" / "rouge.json").read_text(encoding="utf-8"))["sets"]
    record = {"key": cell.key, "row": cell.row, "seed": cell.seed, "flags": cell.flags, "scoring_seeds": config.scoring_seeds, "num": config.num,
              "dev_rouge_l": json.loads((cell.folder / "best" / "training.json").read_text(encoding="utf-8"))["best_dev_rouge_l"], "sets": {}}
    for name in sets:
        files = [cell.folder / "best" / f"answers-{hub.label(name)}-seed{seed}.jsonl" for seed in config.scoring_seeds]
        rows = [[json.loads(line)["rouge_l"] for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
        record["sets"][name] = {"rouge_l": scored[name]["rouge_l"], "exact_match": scored[name]["exact_match"], "rows": [round(statistics.mean(r), 3) for r in zip(*rows)]}
    return record


def read_results(path: Path) -> list[dict]:
    """The finished cells; a line whose writing was interrupted is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in whole]
        for record in records:
            record["key"], record["row"], record["seed"], record["sets"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what compare.py writes ({error!r:.200}); move it away to begin anew") from error
    if len(whole) < len(lines) and parallel.is_first():
        with hub.atomic_write(path) as file:
            file.writelines(whole)
    return records


# -------------------------------------------------------------------------------------------------------------- table

def paired_bootstrap(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """The difference of two rows of the table and its 95% interval. ours, theirs: by training seed, the same ones in the same
    order, and by set, the scores of the set's rows (the mean over scoring seeds). The score is the mean over seeds of the mean
    over sets of the mean over rows; seeds are drawn with replacement, and in each set rows, for both alike."""
    rng = np.random.default_rng(seed)
    differences = [np.stack([a[k] - b[k] for a, b in zip(ours, theirs)]) for k in range(len(ours[0]))]         # by set: (seeds, rows)
    number = len(ours)
    drawn_seeds = np.zeros((resamples, number))
    for r, drawn in enumerate(rng.integers(number, size=(resamples, number))):
        np.add.at(drawn_seeds[r], drawn, 1 / number)
    means = np.zeros(resamples)
    for difference in differences:
        rows = difference.shape[1]
        for r, drawn in enumerate(rng.integers(rows, size=(resamples, rows))):
            means[r] += drawn_seeds[r] @ difference[:, drawn].mean(1) / len(differences)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def summarize(records: list[dict], rows: list[str], sets: list[str], trained_on: str, baseline: str) -> list[dict]:
    """The table's rows: for each the mean and the standard deviation over training seeds of every column, and the difference
    to the baseline, over the seeds that both have."""
    columns = {name: [name] for name in sets}
    others = [name for name in sets if not hub.same_data(name, trained_on)]
    columns |= {"all": sets} | ({"OOD": others} if others and len(others) < len(sets) else {})
    of = {row: {r["seed"]: r for r in records if r["row"] == row} for row in rows}
    table = []
    for row in rows:
        cells = of[row]
        if not cells:
            continue
        line = {"row": row, "seeds": sorted(cells), "columns": {}, "dev": spread([c["dev_rouge_l"] for c in cells.values()])}
        for heading, members in columns.items():
            line["columns"][heading] = spread([statistics.mean(c["sets"][name]["rouge_l"] for name in members) for c in cells.values()])
        both = sorted(cells.keys() & of.get(baseline, {}).keys())
        if row != baseline and both:
            scores = [[[np.array(of[which][seed]["sets"][name]["rows"]) for name in sets] for seed in both] for which in (row, baseline)]
            line["difference"] = paired_bootstrap(*scores)
        table.append(line)
    return table


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table: list[dict], config: Config) -> str:
    """The table, best of a column in bold."""
    headings = list(table[0]["columns"])
    best = {h: max(line["columns"][h][0] for line in table) for h in headings} | {"dev": max(line["dev"][0] for line in table)}

    def show(line, heading):
        mean, deviation = line["dev"] if heading == "dev" else line["columns"][heading]
        text = f"{mean:.2f} ± {deviation:.2f}"
        return f"**{text}**" if mean == best[heading] else text
    lines = ["| method | seeds | dev, greedy | " + " | ".join(headings) + f" | all − {config.baseline} |", "|---" * (len(headings) + 4) + "|"]
    for line in table:
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*line["difference"]) if "difference" in line else ""
        lines.append(f"| `{line['row']}` | {len(line['seeds'])} | {show(line, 'dev')} | " + " | ".join(show(line, h) for h in headings) + f" | {difference} |")
    seeds = sorted({seed for line in table for seed in line["seeds"]})
    return "\n".join(lines) + (f"\n\nROUGE-L × 100, mean ± standard deviation over training seeds ({', '.join(map(str, seeds))}); sampled with scoring seeds "
                               f"{', '.join(map(str, config.scoring_seeds))}. Brackets: paired bootstrap, 95 %.\n")


# ----------------------------------------------------------------------------------------------------- what it would cost

def dry_run(cells: list[Cell], first: list[str], config: Config) -> None:
    """Print every command with its tokens, operations and hours. Only config.json, tokenizers and data are read."""
    print(f"# hours at {config.peak:g} TFLOP/s and an MFU of {config.mfu:g}; training only")
    commands = [("", first)] if first else []
    total = 0.0
    for row, argv in [*commands, *((cell.row, [*cell.flags, "--out_dir", str(cell.folder)]) for cell in cells)]:
        tokens, operations = cost(train.read_config(argv), "qwen" if row and first else None)
        hours = operations / (config.peak * 1e12 * config.mfu) / 3600
        total += hours
        print(f"python train.py {shlex.join(argv)}\n    # {tokens / 1e6:.1f}M student tokens, {operations:.2e} FLOPs, {hours:.2f} h")
    print(f"# together {total:.1f} h")


def cost(options, teacher_shape: str | None) -> tuple[int, int]:
    """Student tokens and operations of a whole run. teacher_shape: a name for a teacher that is only to be trained."""
    folder = lambda name: str(toy.folder(name)) if name in ("student", "teacher") else name
    names = {"student": folder("student") if options.student == "toy" else options.student,
             "teacher": folder("teacher") if options.teacher == "toy" else (teacher_shape or options.teacher) if options.teacher else ""}
    models = {side: memory.shape_of(name) if name else None for side, name in names.items()}
    tokenizers = {side: load_tokenizer(name) if name else None for side, name in names.items()}
    examples = encode_rows(read_rows(hub.data_file(options.data, "train")), tokenizers["student"], tokenizers["teacher"] or tokenizers["student"],
                           options.max_length, options.max_prompt_length)[0]
    steps = math.ceil(len(examples) / (options.batch_size * options.grad_accum))
    passes = options.max_steps / steps if options.max_steps else options.epochs
    tokens = sum(len(e.student.ids) for e in examples)
    return round(passes * tokens), round(passes * flops.step_flops(options, models["student"], models["teacher"], examples))


# --------------------------------------------------------------------------------------------------------------- main

def main() -> None:
    with parallel.started():
        compare(*read_command_line(sys.argv[1:]))


def compare(config: Config, shared: list[str]) -> None:
    """Run the cells that are missing, then write the table and print it."""
    first = []
    if config.preset:
        preset = PRESETS[config.preset]
        first, shared, config.methods, config.data = preset["first"], [*preset["flags"], *shared], preset["methods"], preset["data"]
    out_dir = Path(config.out_dir or f"out/compare-{config.preset or hub.label(config.data)}")
    cells = make_cells(config, shared, out_dir)
    if config.dry_run:
        dry_run(cells, first, config)
        return
    if first and not (Path("out/paper-teacher") / "results.json").exists():
        raise InputError(f"--preset {config.preset}: the teacher learns the data first:  python train.py {shlex.join(first)}")
    with parallel.first_goes_first():
        toy.write_data_for([config.data])
    sets = config.sets or {"toy": list(toy.SETS), "dolly": list(PAPER_SETS)}.get(config.data, [config.data])
    for name in sets:
        hub.data_file(name, "test")             # before training, not after it
    out_dir.mkdir(parents=True, exist_ok=True)
    results = out_dir / "results.jsonl"
    wanted = {"scoring_seeds": config.scoring_seeds, "num": config.num}
    done = {}
    for record in read_results(results):
        if all(record.get(name) == value for name, value in wanted.items()) and set(sets) <= record["sets"].keys():
            done[record["key"]] = record
    for number, cell in enumerate(cells, 1):
        if cell.key in done:
            continue
        print(f"cell {number} of {len(cells)}: {cell.row}, training seed {cell.seed} → {cell.folder}", flush=True)
        (out_dir / "cells").mkdir(exist_ok=True)
        with open(cell.folder.with_name(cell.folder.name + ".log"), "a") if parallel.is_first() else contextlib.nullcontext(sys.stdout) as log, \
                contextlib.redirect_stdout(log):
            record = run_cell(cell, config, sets)
        if parallel.is_first():
            append_line(results, record)
            hub.flush(results)
            done[cell.key] = record
    if not parallel.is_first():
        return
    records = [done[cell.key] for cell in cells]
    table = summarize(records, list(dict.fromkeys(config.methods)), sets, config.data, config.baseline)
    text = markdown(table, config)
    with hub.atomic_write(out_dir / "table.md") as file:
        file.write(text)
    pictures.bars(out_dir / "table.png", table)
    print(f"\n{text}\nwrote table.md, table.png and results.jsonl into {out_dir}")


if __name__ == "__main__":
    hub.run(main)
