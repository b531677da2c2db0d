"""The papers' table: methods × training seeds, each cell trained by train.py and scored by
eval_rouge.py.

    python -m tools.compare --methods sft dskd_cma dskd_cma_ga --seeds 1 2 3 4 5        # the toy
    python -m tools.compare --methods sft "byte_kd --kd_rate 0.9" --seeds 1 2 3 --lr 1e-3
    python -m tools.compare --preset paper --dry_run            # the commands; nothing is run

A row is a method with its own flags; every other flag of train.py is for all rows. A cell is a
run's folder: it is trained, or resumed, and scored, unless that was done before, so the same
command can be given again after a kill, with more seeds or with more rows. ± is the standard
deviation over training seeds; a difference has a 95 % interval over training seeds and rows."""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import train
from data import PAPER_SETS, TOY_SETS
from methods import METHOD_OPTIONS, find_method, method_file
from methods.divergences import DIVERGENCES
from runtime.checkpoint import saved_settings
from runtime.config import InputError, checked, flag, given_flags, run_script
from runtime.files import atomic_write, file_label, fingerprint
from tools import tables

HERE = Path(__file__).resolve().parents[1]
# GPT-2 120M ← Qwen1.5-1.8B (arXiv 2406.17328, 2603.22056): what train.py's defaults don't say.
PAPER_TEACHER = "out/paper-teacher"
PAPER_FIRST = (
    "--method sft --student qwen --prompt_format alpaca --lr 2e-5 --epochs 10 "
    f"--out_dir {PAPER_TEACHER}"
)
PAPER_FLAGS = {
    "teacher": [PAPER_TEACHER],
    "student": ["gpt2"],
    "prompt_format": ["alpaca"],
    "select": ["sampled"],
    "eval_num": ["0"],
}
PAPER_NO_REPEAT_NGRAM = 6
PAPER_METHODS = ["sft", "seqkd", "uld", "mined", "alm", "byte_kd"]
for name in ("dskd_cma", "dskd_cma_ga", "dwa_kd"):
    PAPER_METHODS += [f"{name} --divergence {distance}" for distance in DIVERGENCES]
PAPER = {
    "data": "dolly",
    "methods": PAPER_METHODS,
    "baseline": ["sft", "dskd_cma --divergence forward_kl"],
}


@dataclass
class Config:
    methods: list[str] = flag(
        ["sft", "dskd_cma", "dskd_cma_ga"], "The rows: methods, in quotes with their own flags."
    )
    seeds: list[int] = flag([1, 2, 3, 4, 5], "Training seeds.")
    scoring_seeds: list[int] = flag([10, 20, 30, 40, 50], "Sampling seeds of the scoring.")
    sets: list[str] = flag([], "The columns. Without it: the toy's four, the papers' five, --data.")
    num: int = flag(0, "Score the first rows of each set only; 0: all.", minimum=0)
    checkpoint: str = flag(
        "best",
        "Which one is scored: the best on dev, or that of the last step.",
        choices=("best", "last"),
    )
    baseline: list[str] = flag(["sft", "dskd_cma"], "Rows that the others are compared with.")
    data: str = flag("toy", "Training data, as in train.py.")
    out_dir: str = flag("", "Where cells and tables go. Without it: out/compare-DATA.")
    preset: str = flag(
        "", "Other defaults: those of the papers' experiment.", choices=("", "paper")
    )
    dry_run: bool = flag(False, "Print the commands and run nothing.")


@dataclass
class Cell:
    row: str
    seed: int
    flags: list[str]  # of train.py
    settings: train.Config  # what they say
    folder: Path


def as_flags(words: list[str]) -> dict[str, list[str]]:
    """["--name", value, …] → {name: [value, …]}."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        elif not flags:
            raise InputError(f"{word}: is not a flag")
        else:
            flags[name].append(word)
    return flags


def make_cells(config: Config, shared: dict, out_dir: Path) -> list[Cell]:
    """Every cell, its flags checked by train.py. shared: train.py's flags for all rows."""
    cells = []
    methods = {row: find_method(shlex.split(row)[0]) for row in config.methods}
    for option in METHOD_OPTIONS:
        if option in shared and not any(option in method.uses for method in methods.values()):
            raise InputError(f"--{option}: no row uses it")
    for row in config.methods:
        method = methods[row]
        name, *words = shlex.split(row)
        flags = {"method": [name], **shared, **as_flags(words), "data": [config.data]}
        for option in METHOD_OPTIONS:  # a flag for all rows is for those that use it
            if option in shared and option not in method.uses:
                flags.pop(option, None)
        if not method.needs_teacher:
            flags.pop("teacher", None)
        for seed in config.seeds:
            folder = out_dir / "cells" / f"{file_label(row)}-seed{seed}"
            words = [
                word
                for name, values in (flags | {"seed": [str(seed)]}).items()
                for word in (f"--{name}", *values)
            ]
            try:
                settings = train.read_settings([*words, "--out_dir", str(folder)])
            except InputError as error:
                raise InputError(f"{row}: {error}") from error
            cells.append(Cell(row, seed, words, settings, folder))
    folders = [cell.folder for cell in cells]
    if len(set(folders)) < len(folders):
        raise InputError(
            "--methods: two rows would be written into one folder; tell them apart by "
            "more than punctuation"
        )
    return cells


def run_cell(cell: Cell, config: Config, sets: list[str], log) -> dict:
    """Train and score what is missing → the sets of rouge.json."""
    of_train = [*cell.flags, "--out_dir", str(cell.folder)]
    if (cell.folder / "config.json").exists():
        before = saved_settings(cell.folder)
        for name in ("epochs", "max_steps"):  # which --resume lets be changed
            if getattr(cell.settings, name) != before[name]:
                raise InputError(
                    f"{cell.folder}: was trained with --{name} {before[name]}; move this folder, "
                    "or name another --out_dir"
                )
        of_train.append("--resume")
        train.read_settings(of_train)  # raises InputError where another setting is not the run's
    if not (cell.folder / "results.json").exists():
        start("train.py", of_train, log)
    else:
        state = json.loads((cell.folder / "best/training.json").read_text(encoding="utf-8"))
        made_of = state.get("made_of", {}).get("method")  # none in cells of older versions
        if made_of and made_of != fingerprint(method_file(cell.settings.method)):
            raise InputError(
                f"{cell.folder}: {cell.settings.method} has changed since; move this folder, or "
                "name another --out_dir"
            )
    checkpoint = cell.folder / config.checkpoint
    rouge = checkpoint / "rouge.json"
    scored = json.loads(rouge.read_text(encoding="utf-8")) if rouge.exists() else {}
    trained = saved_settings(cell.folder)
    settings = {"seeds": config.scoring_seeds, "num": config.num, "temperature": 1.0}
    settings["no_repeat_ngram"] = PAPER_NO_REPEAT_NGRAM if config.preset else 0
    settings["prompt_format"] = "auto"
    settings |= {name: trained[name] for name in ("max_length", "max_prompt_length")}
    scored_with = {"prompt_format": "auto"} | scored.get("settings", {})  # older files lack it
    if scored_with != settings or not set(sets) <= scored["sets"].keys():
        arguments = [str(checkpoint), "--data", *sets]
        flags = settings | {name: trained[name] for name in ("device", "dtype")}
        for name, value in flags.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
        start("eval_rouge.py", arguments, log)
        scored = json.loads(rouge.read_text(encoding="utf-8"))
    return scored["sets"]


def start(script: str, arguments: list[str], log) -> None:
    process = subprocess.Popen([sys.executable, str(HERE / script), *arguments], stdout=log)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which the script gets from the terminal, too
        process.wait()  # it saves
        raise
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        raise InputError(f"{script} {shlex.join(arguments)}: ended with exit code {code}")


def main(argv: list[str] | None = None) -> None:
    others = []
    given = given_flags(Config, __doc__, argv, others=others)
    shared = as_flags(others)
    if given.get("preset") == "paper":
        given = PAPER | given
        shared = PAPER_FLAGS | shared
    config = checked(Config, given)
    for name in ("method", "seed", "data", "out_dir", "resume"):
        if name in shared:
            raise InputError(f"--{name}: tools.compare sets it")
    out_dir = Path(config.out_dir or f"out/compare-{config.preset or file_label(config.data)}")
    cells = make_cells(config, shared, out_dir)
    sets = config.sets or {"toy": list(TOY_SETS), "dolly": list(PAPER_SETS)}.get(
        config.data, [config.data]
    )
    if config.dry_run:
        if config.preset:
            print(f"python train.py {PAPER_FIRST}")
        for cell in cells:
            print(f"python train.py {shlex.join(cell.flags)} --out_dir {cell.folder}")
        return
    if config.preset and not (Path(PAPER_TEACHER) / "results.json").exists():
        raise InputError(f"first, the teacher learns the data:  python train.py {PAPER_FIRST}")

    (out_dir / "cells").mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[int, dict]] = {}
    for number, cell in enumerate(cells, 1):
        print(
            f"cell {number} of {len(cells)}: {cell.row}, training seed {cell.seed} → "
            f"{cell.folder}",
            flush=True,
        )
        with open(f"{cell.folder}.log", "a", encoding="utf-8") as log:
            scores.setdefault(cell.row, {})[cell.seed] = run_cell(cell, config, sets, log)
    columns = tables.columns_of(sets, config.data)
    text = tables.markdown(scores, columns, config.data, config.baseline)
    seeds = ", ".join(map(str, config.seeds))
    text += (
        f"\nMeans ± standard deviations over training seeds ({seeds}), sampled with the seeds "
        f"{', '.join(map(str, config.scoring_seeds))}. Brackets: 95 % intervals over "
        f"{'training seeds and rows' if len(config.seeds) > 1 else 'rows only'}. Bold: the best of "
        "a column, where it is ahead of the next clear of zero. OOD: the sets not trained on.\n"
    )
    with atomic_write(out_dir / "table.md") as file:
        file.write(text)
    with atomic_write(out_dir / "results.json") as file:
        json.dump(scores, file)
    print(f"\n{text}\nwrote table.md and results.json into {out_dir}")


if __name__ == "__main__":
    run_script(main)
