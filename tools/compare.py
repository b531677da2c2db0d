"""The papers' table: methods × training seeds, each cell trained by train.py and scored by eval_rouge.py.

    python -m tools.compare --methods sft dskd_cma dskd_cma_ga --seeds 1 2 3 4 5                     # the toy
    python -m tools.compare --methods dskd_cma "dskd_cma_ga --ga_weight 1" --seeds 1 2 3 --lr 1e-3   # rows have flags
    python -m tools.compare --preset paper --dry_run                     # commands and costs, nothing is run

A row is a method with its own flags; every other flag of train.py is for all rows. Training seeds are --seeds; every
trained student is scored with the sampling seeds --scoring_seeds, and a cell's score is their mean. ± is the standard
deviation over training seeds.

Notable here: a finished cell is a line of results.jsonl and never runs again, a half one goes on where it stopped, so
that the same command can be given again after a kill, and with more seeds or rows. A cell is known by train.py's
settings, however they were spelled, and the data and models by their contents. The difference to --baseline has a
paired bootstrap interval: training seeds are drawn, and within each set its rows, for both methods alike."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_rouge
import toy
import train
from files import hub
from files.config import InputError, flag, parse
from files.rows import read_rows
from methods.divergences import DIVERGENCES
from model import shape_of
from running import flops, parallel, pictures, tables
from running.checks import read_settings
from running.run_folder import FREE, append_line, locked, saved_config
from tokenize_align import encode_prompt, encode_rows, load_tokenizer

DEFAULT_BASELINES = ("sft", "dskd_cma")
APART = set(FREE) - {"dtype"}       # settings that a cell's scores don't depend on
LATER = ("on_policy",)              # settings that tables of before know nothing of: a default has no part in a key
PAPER_TEACHER = "out/paper-teacher"
PRESETS = {
    # GPT-2 120M ← Qwen1.5-1.8B (arXiv 2406.17328, 2603.22056): what train.py's defaults don't say already
    "paper": dict(
        first=f"--method sft --student qwen --data dolly --lr 2e-5 --epochs 3 --out_dir {PAPER_TEACHER}",
        flags=f"--teacher {PAPER_TEACHER} --student gpt2", data="dolly",
        baseline=["sft", "dskd_cma --divergence forward_kl"],
        methods=["sft", "seqkd", "uld", "mined", "alm", "byte_kd", *(f"{method} --divergence {name}" for method in
                                                   ("dskd_cma", "dskd_cma_ga", "dwa_kd") for name in DIVERGENCES),
                 "dskd_cma --adversary energy --ga_weight 1"]),
    # on the toy, what the release leaves open: λ_GA (its own is 1/n, n = 175 tokens a step), adversary, its training
    "ablation": dict(
        first="", flags="--epochs 24 --probe_interval 0 --cache_teacher", data="toy", baseline=["dskd_cma"],
        methods=["sft", "dskd_cma", *(f"dskd_cma_{adversary} --ga_weight {weight} --ga_lr {lr}"
                                      for adversary in ("ga", "ct") for weight in ("0.0057", "0.01", "0.1", "0.3", "1")
                                      for lr in ("1e-3", "0"))])}

@dataclass
class Config:
    methods: list[str] = flag(["sft", "dskd_cma", "dskd_cma_ga"], "the rows: methods, in quotes with their own flags")
    seeds: list[int] = flag([1, 2, 3, 4, 5], "training seeds", at_least=0, at_most=2**40)
    scoring_seeds: list[int] = flag([10, 20, 30, 40, 50], "sampling seeds of the scoring", at_least=0, at_most=2**40)
    sets: list[str] = flag([], "the columns: sets to score on (default: the toy's four, the papers' five, or --data)")
    num: int = flag(0, "score only the first N rows of each set (0: all)", at_least=0)
    baseline: list[str] = flag([], "rows to which the others' differences are given (default: sft and dskd_cma)")
    data: str = flag("toy", "training data, as in train.py")
    out_dir: str = flag("", "where cells, results.jsonl, table.md and table.png go (default: out/compare-DATA)")
    preset: str = flag("", "a known experiment, in place of --methods and --data", choices=("", *PRESETS))
    dry_run: bool = flag(False, "print every command and its estimated cost, and run nothing")
    peak: float = flag(989.0, "for --dry_run: the machine's peak (TFLOP/s; an H100 in bfloat16: 989)", at_least=1e-3)
    mfu: float = flag(0.4, "for --dry_run: the share of the peak that is reached", at_least=1e-3, at_most=1)
    token_ms: float = flag(5.0, "for --dry_run: milliseconds to one more token of 32 answers", at_least=0)

@dataclass
class Cell:
    """One training run: a row of the table, a training seed, and all of train.py's flags and settings."""
    row: str
    seed: int
    flags: list[str]
    folder: Path
    settings: train.Config

    def key(self, without: tuple[str, ...] = ()) -> str:
        """What a finished cell is known by: settings that its scores depend on. without "seed": those of its row."""
        settings = dataclasses.asdict(self.settings)
        kept = {name: value for name, value in settings.items() if name not in APART.union(without)}
        for name in LATER:
            if kept[name] == getattr(train.Config, name):
                del kept[name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

def read_command_line(argv: list[str]) -> tuple[Config, list[str]]:
    """Our flags, and the rest, which is for train.py."""
    names, given, ours, others = {field.name for field in dataclasses.fields(Config)} | {"help"}, set(), [], []
    target = ours
    for part in argv:
        if part.startswith("--"):
            name = part[2:].split("=")[0]
            given.add(name)
            target = ours if name in names else others
        target.append(part)
    config = parse(Config, __doc__, ours)
    for name in ("methods", "data", "baseline"):
        if config.preset and name in given:
            raise InputError(f"--preset {config.preset} --{name}: a preset has its own")
    return config, others

def as_flags(argv: list[str]) -> dict[str, list[str]]:
    """--name value …, or --name=value → {name: [value, …]}."""
    flags: dict[str, list[str]] = {}
    for word in argv:
        if not word.startswith("--"):
            if not flags:
                raise InputError(f"{word!r}: which flag's value is it?")
            flags[list(flags)[-1]].append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name in flags:
            raise InputError(f"--{name} is given twice")
        if name in ("method", "seed", "data", "out_dir", "resume", "overwrite"):
            raise InputError(f"--{name}: compare.py sets it (--methods, --seeds, --data, --out_dir)")
        flags[name] = [value] if equals else []
    return flags

def make_cells(config: Config, shared: dict, out_dir: Path, preset: dict = {}) -> list[Cell]:
    """Every cell, its flags checked by train.py. shared: as_flags of all rows; preset: flags that these may change."""
    cells, of_folder, of_key, resolved = [], {}, {}, functools.cache(hub.pick_device)       # it may print a note, once
    for row in dict.fromkeys(config.methods):
        try:
            method, *own = shlex.split(row)
        except ValueError as error:
            raise InputError(f"--methods {row!r}: is not a method with its flags ({error})") from error
        own = as_flags(own)
        for name in own.keys() & shared.keys():
            raise InputError(f"--{name}: is given for the row {row!r} and for all rows")
        flags = {"method": [method], **preset, **shared, **own, "data": [config.data]}
        for name in {"sft": ("teacher", "cache_teacher"), "seqkd": ("cache_teacher",)}.get(method, ()):  # they refuse
            if name not in own:
                flags.pop(name, None)
        for seed in dict.fromkeys(config.seeds):
            folder = out_dir / "cells" / f"{hub.label(row)}-seed{seed}"
            argv = [word for name, values in {**flags, "seed": [str(seed)]}.items() for word in (f"--{name}", *values)]
            settings = read_settings(train.Config, train.__doc__, [*argv, "--out_dir", str(folder)])
            _, dtype = resolved(settings.device, settings.dtype)
            settings.dtype = str(dtype).removeprefix("torch.")              # a cell in "auto" is one in what that means
            cells.append(Cell(row, seed, argv, folder, settings))
            if (other := of_folder.setdefault(folder, row)) != row:
                raise InputError(f"--methods: the rows {other!r} and {row!r} would be written into one folder, "
                                 f"{folder}; tell them apart by more than punctuation")
            if (other := of_key.setdefault(cells[-1].key(("seed",)), row)) != row:
                raise InputError(f"--methods: the rows {other!r} and {row!r} have the same settings")
            check_begun(folder, settings)
    return cells

def check_begun(folder: Path, wanted) -> None:
    """Raise InputError where the folder holds a run with other settings than this cell's."""
    if not (folder / "config.json").exists():
        return
    saved = saved_config(train.Config, folder, {})
    for name, value in dataclasses.asdict(wanted).items():
        if name not in APART and (before := saved.get(name, getattr(train.Config, name))) != value:
            raise InputError(f"{folder}: holds a run with --{name} {before}, not {value}; pass another --out_dir")

def check_inputs(path: Path, cells: list[Cell], sets: list[str]) -> None:
    """Keep the hash of every data file and model folder. Raises InputError where one has changed since another cell."""
    data = cells[0].settings.data
    found = {f"{name}, {split}": hub.fingerprint(hub.data_file(name, split))
             for name, split in [(data, "train"), (data, "dev"), *((name, "test") for name in sets)]}
    models = {(getattr(cell.settings, side), side) for cell in cells for side in ("student", "teacher")}
    for name, side in sorted(models):
        if name == "toy":
            found[f"toy {side}"] = hub.fingerprint(toy.folder(side))
        elif name:
            found[name] = hub.fingerprint(hub.model_dir(name))
    try:
        known = hub.claim(path.parent, path.name, set(), ["results.jsonl", "table.md", "table.png", "cells"]) or {}
        if not all(re.fullmatch("[0-9a-f]{64}", value) for value in known.values()):
            raise TypeError("values that are no hashes")
    except TypeError as error:
        raise InputError(f"{path}: not what compare.py writes ({error}); pass another --out_dir") from error
    for name, value in found.items():
        if known.get(name, value) != value:
            raise InputError(f"{name}: has changed since the cells in {path.parent} were made; pass another --out_dir")
    if known | found != known:
        with hub.atomic_write(path) as file:
            json.dump(known | found, file, indent=2)

# -------------------------------------------------------------------------------------------------------------- cells
def run_cell(cell: Cell, config: Config, sets: list[str]) -> dict:
    """Train, or go on training, and score → the cell's line of results.jsonl."""
    settings = dataclasses.replace(cell.settings, resume=(cell.folder / "config.json").exists())
    if not (cell.folder / "results.json").exists():             # train.py's last word
        with contextlib.ExitStack() as stack:
            train.conclude(*train.train(settings, stack))
    parallel.barrier()
    same = {name: getattr(settings, name) for name in ("max_length", "max_prompt_length", "device", "dtype")}
    eval_rouge.evaluate(eval_rouge.Config(model=str(cell.folder), data=sets, seeds=config.scoring_seeds, num=config.num,
                                          **same))
    if not parallel.is_first():
        return {}
    best = cell.folder / "best"
    scored, training = (json.loads((best / file).read_text()) for file in ("rouge.json", "training.json"))
    record = {"key": cell.key(), "row_key": cell.key(("seed",)), "row": cell.row, "seed": cell.seed,
              "flags": cell.flags, "scoring_seeds": config.scoring_seeds, "num": config.num,
              "dev_rouge_l": training["best_dev_rouge_l"],
              "dev_bits_per_byte": training.get("best_dev_bits_per_byte"), "sets": {}}
    for name in sets:
        files = [best / f"answers-{hub.label(name)}-seed{seed}.jsonl" for seed in config.scoring_seeds]
        rows = [[json.loads(line)["rouge_l"] for line in open(file, encoding="utf-8")] for file in files]
        kept = ("rouge_l", "exact_match", "bits_per_byte", "kl_to_truth", "bits", "bytes")
        record["sets"][name] = {what: scored["sets"][name][what] for what in kept}
        record["sets"][name]["rows"] = [round(statistics.mean(r), 3) for r in zip(*rows)]
    return record

def is_cell(record: dict) -> bool:
    """Whether a line of results.jsonl has all that the table needs."""
    names = {"key", "row_key", "row", "seed", "scoring_seeds", "num", "dev_rouge_l", "sets"}
    return names <= record.keys() and isinstance(record["dev_rouge_l"], float) and all(
        isinstance(scores["rouge_l"], float) and np.array(scores["rows"], float).ndim == 1
        and len(scores.get("bits", scores["rows"])) == len(scores["rows"]) for scores in record["sets"].values())

def read_results(path: Path) -> list[dict]:
    """The finished cells; a line whose writing was interrupted is dropped from the file."""
    if not path.exists():
        return []
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in whole]
        damaged = [record for record in records if not is_cell(record)]
        if damaged:
            raise ValueError(f"{damaged[0]!r:.100}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not what compare.py writes ({error!r:.200}); move it away to begin anew") from error
    if rest and parallel.is_first():
        with hub.atomic_write(path) as file:
            file.writelines(line + "\n" for line in whole)
    return records

# ------------------------------------------------------------------------------------------------ what it would cost

def dry_run(cells: list[Cell], first: list[str], config: Config, sets: list[str]) -> None:
    """Print every command with its tokens, operations and hours. Only config.json, tokenizers and data are read."""
    print(f"# hours of training at {config.peak:g} TFLOP/s and an MFU of {config.mfu:g}, without the answers of "
          "students (--on_policy) and teachers (seqkd)")
    total, commands = 0.0, [first] if first else []
    for argv in commands + [[*cell.flags, "--out_dir", str(cell.folder)] for cell in cells]:
        teacher = "qwen" if first and argv != first else None
        tokens, operations = cost(read_settings(train.Config, train.__doc__, argv), teacher)
        hours = operations / (config.peak * 1e12 * config.mfu) / 3600
        total += hours
        print(f"python train.py {shlex.join(argv)}\n"
              f"    # {tokens / 1e6:.1f}M student tokens, {operations:.2e} FLOPs, {hours:.2f} h")
    answers, steps = scoring_cost(cells[0].settings, config, sets)
    scoring = steps * config.token_ms / 3.6e6
    print(f"# scoring a cell: {answers:,} answers in batches of 32, at the most {steps:,} steps to one more token, "
          f"{scoring:.2f} h at {config.token_ms:g} ms\n"
          f"# together {total:.1f} h of training and {len(cells) * scoring:.1f} h of scoring")

def scoring_cost(options, config: Config, sets: list[str]) -> tuple[int, int]:
    """Answers that a cell's scoring samples, and its batches' steps if each has an answer that reaches the limit."""
    student = options.student if options.student != "toy" else toy.folder(
        "student" if toy.folder("student").exists() else "student-start")
    tokenizer, answers, steps = load_tokenizer(student), 0, 0
    for name in sets:
        rows = read_rows(hub.data_file(name, "test"))[:config.num or None]
        longest = max(len(encode_prompt(row.prompt, tokenizer, options.max_prompt_length)[0]) for row in rows)
        answers += len(rows) * len(config.scoring_seeds)
        steps += math.ceil(len(rows) / 32) * (options.max_length - longest) * len(config.scoring_seeds)
    return answers, steps

def cost(options, teacher_shape: str | None) -> tuple[int, int]:
    """Student tokens and operations of a whole run. teacher_shape: a name for a teacher that is only to be trained."""
    names = [options.student] + ([teacher_shape or options.teacher] if options.teacher else [])
    folders = [toy.folder(side if toy.folder(side).exists() else f"{side}-start") if name == "toy" else name
               for side, name in zip(("student", "teacher"), names)]
    models, tokenizers = [shape_of(folder) for folder in folders], [load_tokenizer(folder) for folder in folders]
    examples = encode_rows(read_rows(hub.data_file(options.data, "train")), tokenizers[0], tokenizers[-1],
                           options.max_length, options.max_prompt_length)[0]
    steps = math.ceil(len(examples) / (options.batch_size * options.grad_accum))
    passes = options.max_steps / steps if options.max_steps else options.epochs
    operations = flops.step_flops(options, *[*models, None][:2], examples, cached=options.cache_teacher)
    return round(passes * sum(len(e.student.ids) for e in examples)), round(passes * operations)

# --------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    with parallel.started():
        run_table(*read_command_line(sys.argv[1:]))

def run_table(config: Config, argv: list[str]) -> None:
    """Run the cells that are missing, then write the table and print it. argv: flags of train.py for all rows."""
    shared, first, more = as_flags(argv), [], {}
    if config.preset:
        preset = PRESETS[config.preset]
        config.methods, config.data, config.baseline = preset["methods"], preset["data"], preset["baseline"]
        first, more = preset["first"].split(), as_flags(preset["flags"].split())
    for row in set(config.baseline) - set(config.methods):
        raise InputError(f"--baseline {row!r}: is not one of the rows, {str(config.methods)[1:-1]}")
    config.baseline = config.baseline or list(DEFAULT_BASELINES)
    out_dir = Path(config.out_dir or f"out/compare-{config.preset or hub.label(config.data)}")
    cells = make_cells(config, shared, out_dir, more)
    sets = config.sets or {"toy": list(toy.SETS), "dolly": list(hub.PAPER_SETS)}.get(config.data, [config.data])
    if len({hub.label(name) for name in sets}) < len(sets):
        raise InputError(f"--sets {' '.join(sets)}: two of them would write into the same files")
    with parallel.first_goes_first():
        toy.write_data_for([config.data, *sets])
    if config.dry_run:
        dry_run(cells, first, config, sets)
        return
    if first and not (Path(PAPER_TEACHER) / "results.json").exists():
        raise InputError(f"--preset {config.preset}: the teacher learns the data first:  python train.py "
                         f"{shlex.join(first)}")
    for name in sets:
        read_rows(hub.data_file(name, "test"))             # before training, not after it
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir) if parallel.is_first() else contextlib.nullcontext():
        with parallel.first_goes_first():
            for cell in cells:
                toy.prepare_for(cell.settings)
            check_inputs(out_dir / "inputs.json", cells, sets)
        fill(config, cells, out_dir, sets)

def fill(config: Config, cells: list[Cell], out_dir: Path, sets: list[str]) -> None:
    """Run what results.jsonl does not have, and write the table of these cells' rows with all their training seeds."""
    results = out_dir / "results.jsonl"

    def scored_alike(record):
        wanted = record["scoring_seeds"] == config.scoring_seeds and record["num"] == config.num
        return wanted and all("bits" in record["sets"].get(name, ()) for name in sets)
    done = {record["key"]: record for record in read_results(results) if scored_alike(record)}
    try:
        for number, cell in enumerate(cells, 1):
            if cell.key() in done:
                continue
            print(f"cell {number} of {len(cells)}: {cell.row}, training seed {cell.seed} → {cell.folder}", flush=True)
            (out_dir / "cells").mkdir(exist_ok=True)
            with contextlib.ExitStack() as stack:
                if parallel.is_first():
                    path = cell.folder.with_name(cell.folder.name + ".log")
                    log = stack.enter_context(open(path, "a", encoding="utf-8"))
                    stack.enter_context(contextlib.redirect_stdout(log))
                record = run_cell(cell, config, sets)
            if parallel.is_first():
                append_line(results, record)
                hub.flush(results)
                done[cell.key()] = record
    except InputError as error:
        raise InputError(f"{cell.folder}: {error}") from error
    finally:
        rows = {cell.key(("seed",)): cell.row for cell in cells}
        records = [record | {"row": rows[record["row_key"]]} for record in done.values() if record["row_key"] in rows]
        if parallel.is_first() and records:
            table = tables.summarize(records, list(rows.values()), sets, config.data, config.baseline)
            text = tables.markdown(table, config.scoring_seeds)
            with hub.atomic_write(out_dir / "table.md") as file:
                file.write(text)
            pictures.bars(out_dir / "table.png", table)
            print(f"\n{text}\nwrote table.md, table.png and results.jsonl into {out_dir}")

if __name__ == "__main__":
    hub.run(main)
