"""A run's folder: which one, who may write in it, what of it goes on after an interruption.

    out_dir/config.json      every setting              out_dir/best/            by ROUGE-L on dev
    out_dir/metrics.jsonl    a line for every step      out_dir/last/            to go on from (checkpoint.py)
    out_dir/results.json     the table at the end       out_dir/last.previous/   the one before, should that be damaged

Notable here: nothing is deleted that is not a run's; two processes never write into one folder; signals save first."""
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

from files import hub
from running import parallel
from files.config import InputError

# What may change between a run and its continuation.
FREE = ("resume", "overwrite", "out_dir", "device", "num_threads", "shard_student", "shard_teacher")

def run_name(config) -> Path:
    """out/TEACHER-STUDENT-METHOD"""
    names = [Path(name).name for name in (config.teacher, config.student) if name and name != "toy"]
    return Path("out") / "-".join([*(names or ["toy"]), config.method])

def numbered(name: Path, number: int) -> Path:
    return name if number == 1 else name.with_name(f"{name.name}-{number}")

def newest_run(config) -> Path:
    """The last of out/NAME, out/NAME-2, …"""
    name, number = run_name(config), 1
    while (numbered(name, number + 1) / "config.json").exists():
        number += 1
    return numbered(name, number)

def saved_config(cls, out_dir: Path, given: dict) -> dict:
    """The settings, fields of cls, of a run. Raises InputError where there is none or a given flag says otherwise."""
    path = out_dir / "config.json"
    if not path.exists():
        raise InputError(f"--resume: no run in {out_dir} (no config.json); leave --resume out to start one")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        other_fields = saved.keys() ^ {field.name for field in dataclasses.fields(cls)}
    except (ValueError, AttributeError):
        saved, other_fields = {}, set()
    if "method" not in saved:
        raise InputError(f"--resume: {out_dir} is not the folder of a run (its config.json is not train.py's)")
    if other_fields:
        raise InputError(f"--resume: the run in {out_dir} was made by another version of train.py (they differ in: "
                         f"{', '.join(sorted(other_fields))})")
    for name, value in given.items():
        if name not in FREE and value != saved[name]:
            raise InputError(f"--resume: the run in {out_dir} has --{name} {saved[name]}, not {value}; leave it out")
    return {**saved, "out_dir": str(out_dir)}

def check_out_dir(config, inputs: list[Path]) -> Path:
    """Choose or check the run's folder and touch nothing yet. Raises InputError where it holds another run, cannot be
    written, or where --overwrite would delete one of the inputs."""
    if not config.out_dir:
        number = 1
        while not config.overwrite and (numbered(run_name(config), number) / "config.json").exists():
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
        if not any((out_dir / name).exists() for name in ("config.json", "metrics.jsonl")):
            raise InputError(f"--out_dir {out_dir}: holds files that are not a run's; pass another folder")
        if not config.overwrite:
            raise InputError(f"--out_dir {out_dir}: holds a run; pass --resume to go on, --overwrite or another folder")
        for path in inputs:
            if path.resolve().is_relative_to(out_dir.resolve()):
                raise InputError(f"--overwrite would delete {path}, which this run reads; pass another --out_dir")
    return out_dir

def holds(out_dir: Path) -> list[Path]:
    """What a folder holds but for files whose writing was interrupted."""
    return [path for path in out_dir.iterdir() if not path.name.endswith(".tmp")]

@contextlib.contextmanager
def locked(out_dir: Path):
    """Keep other runs out of a folder. The system lets go of the lock when this process ends, however it ends."""
    descriptor = os.open(out_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out_dir {out_dir}: another run is writing there; wait, or pass another") from error
        except OSError as error:            # a network file system without locks
            print(f"note: {out_dir} cannot be locked ({error.strerror}); start no other run in it")
        yield
    finally:
        os.close(descriptor)

def start_run(config, out_dir: Path) -> None:
    """Empty the run's folder, which is locked, and write config.json. Of a link the folder behind it is emptied.
    Whenever this ends, the folder is empty, or a run's that can be resumed or overwritten."""
    # config.json goes first, so that no old run is resumed, metrics.jsonl last, by which it is known
    if config.overwrite:
        for path in sorted(out_dir.iterdir(),
                           key=lambda path: {"config.json": 0, "metrics.jsonl": 2}.get(path.name, 1)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if any(holds(out_dir)):             # it was empty when this run began to prepare its data
        raise InputError(f"--out_dir {out_dir}: another run has begun there; pass another folder")
    with hub.atomic_write(out_dir / "config.json") as file:
        json.dump(dataclasses.asdict(config), file, indent=2)
    (out_dir / "metrics.jsonl").touch()

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
