"""A run's folder: which one, who may write in it, what of it goes on after an interruption.

    out_dir/config.json      every setting              out_dir/best/            on dev, by what --select says
    out_dir/metrics.jsonl    a line for every step      out_dir/last/            to go on from (checkpoint.py)
    out_dir/results.json     the table at the end       out_dir/last.previous/   the one before, should that be damaged

Notable here: a run is known by what only train.py writes, and of it only the names in WRITTEN are ever deleted; two
processes never write into one folder; signals save first."""
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

from files import hub
from files.config import InputError
from running import parallel

# What may change between a run and its continuation.
FREE = ("resume", "overwrite", "out_dir", "device", "dtype", "num_threads", "shard_student", "shard_teacher")
# All that train.py writes into out_dir beside config.json and metrics.jsonl, and all that --overwrite deletes.
WRITTEN = ("results.json", "best", "best.tmp", "best.previous", "last", "last.tmp", "last.previous", "heatmap.png",
           "next_bytes.png", "curves.png", "results.png")
SETTINGS = {"method", "teacher", "student", "data", "seed", "epochs", "kd_rate", "out_dir"}      # of every version

def run_name(config) -> Path:
    """out/TEACHER-STUDENT-METHOD"""
    names = [Path(name).name for name in (config.teacher, config.student) if name and name != "toy"]
    return Path("out") / "-".join([*(names or ["toy"]), config.method])

def numbered(name: Path, number: int) -> Path:
    return name if number == 1 else name.with_name(f"{name.name}-{number}")

def newest_run(config) -> Path:
    """The last of out/NAME, out/NAME-2, … that is a run; else the first of these names."""
    name, number, newest = run_name(config), 1, 1
    while numbered(name, number).exists():
        newest = number if is_run(numbered(name, number)) else newest
        number += 1
    return numbered(name, newest)

def settings_in(folder: Path) -> dict | None:
    """The settings that train.py wrote into a folder, or None: not there, damaged, or another program's."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return saved if isinstance(saved, dict) and SETTINGS <= saved.keys() else None

def is_run(folder: Path) -> bool:
    """Whether train.py began a run here: a config.json with its settings, and a metrics.jsonl with lines of steps. The
    last line may be cut, and a run that was killed before its first step has none."""
    try:
        *whole, _ = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
        steps = [json.loads(line)["step"] for line in whole[:1]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return False
    return all(type(step) is int for step in steps) and settings_in(folder) is not None

def read_metrics(out_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises InputError for a line that train.py did not write, or where there is
    none."""
    records, text = [], (out_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(True), 1):
        if line.endswith("\n"):             # the last line of a run that is going on may be half-written
            try:
                record = json.loads(line)
                records.append({"step": record["step"], **record})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{out_dir}/metrics.jsonl:{number}: not what train.py writes ({error!r})") from error
    if not records:
        raise InputError(f"{out_dir}/metrics.jsonl: no step is recorded yet")
    return records

def saved_config(cls, out_dir: Path, given: dict) -> dict:
    """The settings, fields of cls, of a run; one that an earlier version did not have is left out, and named. Raises
    InputError where there is no run, where it has a setting that is no more, or a given flag says otherwise."""
    if not (out_dir / "config.json").exists():
        raise InputError(f"--resume: no run in {out_dir} (no config.json); leave --resume out to start one")
    saved, fields = settings_in(out_dir), {field.name: field for field in dataclasses.fields(cls)}
    if saved is None:
        raise InputError(f"--resume: {out_dir} is not the folder of a run (its config.json is not train.py's)")
    if gone := sorted(saved.keys() - fields.keys()):
        raise InputError(f"--resume: the run in {out_dir} was made by another version of train.py, with settings that "
                         f"are no more: {', '.join(gone)}")
    if new := [f"--{name} {fields[name].default}" for name in fields if name not in saved]:
        print(f"note: the run in {out_dir} was made by an earlier version; what that did not have: {' '.join(new)}")
    for name, value in given.items():
        if name not in FREE and value != (before := saved.get(name, fields[name].default)):
            raise InputError(f"--resume: the run in {out_dir} has --{name} {before}, not {value}; leave it out")
    return {**saved, "out_dir": str(out_dir)}

def check_out_dir(config, inputs: list[Path]) -> Path:
    """Choose or check the run's folder and touch nothing yet. Raises InputError where it holds another run or anything
    else, cannot be written, or where --overwrite would delete one of the inputs."""
    if not config.out_dir:
        number = 1
        while not config.overwrite and numbered(run_name(config), number).exists():
            number += 1
        config.out_dir = str(numbered(run_name(config), number))
    out_dir = Path(config.out_dir)
    if out_dir.exists() and not out_dir.is_dir() or out_dir.is_symlink() and not out_dir.exists():
        raise InputError(f"--out_dir {out_dir}: is a file, or a link to nothing")
    there = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out_dir {out_dir}: nothing can be written into {there}")
    if config.resume:
        return out_dir
    if out_dir.is_dir() and any(holds(out_dir)):
        check_is_run(out_dir)
        if not config.overwrite:
            raise InputError(f"--out_dir {out_dir}: holds a run; pass --resume to go on, --overwrite or another folder")
        own = [out_dir.resolve(), *(out_dir.resolve() / name for name in WRITTEN)]
        for path in inputs:
            if path.resolve() == own[0] or any(path.resolve().is_relative_to(folder) for folder in own[1:]):
                raise InputError(f"--overwrite would delete {path}, which this run reads; pass another --out_dir")
    return out_dir

def check_is_run(out_dir: Path) -> None:
    if not is_run(out_dir):
        raise InputError(f"--out_dir {out_dir}: holds files that are not a run's; pass another folder")

def holds(out_dir: Path) -> list[Path]:
    """What a folder holds but for what start_run leaves when it is interrupted: an empty metrics.jsonl."""
    def left_over(path):
        empty = path.name == "metrics.jsonl" and path.is_file() and not path.stat().st_size
        return empty or re.fullmatch(r"(metrics\.jsonl|config\.json)\..*\.tmp", path.name)
    return [path for path in out_dir.iterdir() if not left_over(path)]

@contextlib.contextmanager
def locked(out_dir: Path):
    """Keep other runs out of a folder. The system lets go of the lock when this process ends, however it ends."""
    descriptor = os.open(out_dir, os.O_RDONLY)
    try:
        if not hub.lock(descriptor, out_dir, wait=False):
            raise InputError(f"--out_dir {out_dir}: another run is writing there; wait, or pass another")
        yield
    finally:
        os.close(descriptor)

def start_run(config, out_dir: Path) -> None:
    """Make the folder, which is locked, a new run's. With --overwrite the old run loses its lines first, so that its
    checkpoints are never gone on with, and what is named in WRITTEN last. Whenever this ends, the folder is as free as
    it was, or a run's that can be overwritten."""
    if any(holds(out_dir)):
        if not config.overwrite:            # it was empty when this run began to prepare its data
            raise InputError(f"--out_dir {out_dir}: another run has begun there; pass another folder")
        check_is_run(out_dir)
    with hub.atomic_write(out_dir / "metrics.jsonl"):
        pass
    with hub.atomic_write(out_dir / "config.json") as file:
        json.dump(dataclasses.asdict(config), file, indent=2)
    for path in (out_dir / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

# ------------------------------------------------------------------------------------------------------ metrics.jsonl
def append_line(path: Path, record: dict) -> None:
    """Write a line of JSON, in the first process. Raises InputError where the disk does not take it."""
    if not parallel.is_first():
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, go on with --resume") from error

def keep_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again. Raises InputError where one of those before is missing."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True) if path.exists() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] == len(lines) + 1 <= step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):       # the end of a file whose writing was interrupted
            break
    if len(lines) < step:
        raise InputError(f"{path}: the line of step {len(lines) + 1} is missing or damaged; the checkpoint's step is "
                         f"{step}")
    with hub.atomic_write(path) as file:
        file.writelines(lines)

# ------------------------------------------------------------------------------------------------------------ signals
class Interrupted(Exception):
    """A signal came while the run may be interrupted at once."""

class Stop:
    """SIGTERM and SIGINT, until close(): `signal` is its number, and the run saves and leaves after its step; inside
    at_once() Interrupted is raised. A second Ctrl-C does not wait; torchrun's processes may get a signal twice."""

    def __init__(self):
        self.signal, self._at_once = 0, False
        self._before = {number: signal.signal(number, self._caught) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number, frame):
        again, self.signal = self.signal, self.signal or number
        if again and number == signal.SIGINT and parallel.world() == 1:
            raise KeyboardInterrupt
        if self._at_once:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self):
        self._at_once = True
        try:
            if self.signal:
                raise Interrupted
            yield
        finally:
            self._at_once = False
