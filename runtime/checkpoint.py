"""A run's folder, and checkpoints that are whole or not there at all.

    out_dir/config.json      every setting            out_dir/best/            the best on dev
    out_dir/metrics.jsonl    a line for every step    out_dir/last/            to resume from
    out_dir/results.json     the table at the end     out_dir/last.previous/   the one before

best/ and last/ are models in the hub's layout; in them are also modules/ (the projectors, the
adversary), training.json (step, scores, data) and, in last/, resume.safetensors: AdamW's moments
and the random number generators. A checkpoint is written under another name, flushed and renamed,
and the one before it stays. Nothing is pickled."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from runtime.config import InputError
from runtime.distributed import all_reduce, gather, is_first, print_first, rank, world_size
from runtime.files import atomic_write, flush

# What may differ between a run and its continuation.
FREE = (
    "resume",
    "out_dir",
    "cache_dir",
    "device",
    "dtype",
    "shard",
    "report_to",
    "epochs",
    "max_steps",
)
LOCKS: list[int] = []  # of the folder that this process writes into


# ------------------------------------------------------------------------------------- run's folder


def refuse_used(out_dir: Path) -> None:
    """A new run wants a folder that is not there or empty. Raises InputError for any other."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(
            f"--out_dir {out_dir}: is not empty; pass a new folder, or --resume to "
            "continue the run in it"
        )


def start_run(config) -> None:
    """Make a new run's folder, with its settings in it: --out_dir, which without one becomes the
    first of out/TEACHER-STUDENT-METHOD, …-2, …-3 that is not there."""
    if config.out_dir:
        out_dir = Path(config.out_dir)
        refuse_used(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
    else:
        out_dir = make_run_folder(config.teacher, config.student, config.method)
    config.out_dir = str(out_dir)
    lock_run(out_dir)
    write_settings(config, out_dir)


def make_run_folder(teacher: str, student: str, method: str) -> Path:
    names = [Path(name).name for name in (teacher, student) if name and name != "toy"]
    name = "-".join([*(names or ["toy"]), Path(method).stem])
    for number in itertools.count(1):
        folder = Path("out") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def write_settings(config, out_dir: Path) -> None:
    """Write config.json, which --resume reads."""
    settings = dataclasses.asdict(config) | {"resume": False}
    with atomic_write(out_dir / "config.json") as file:
        json.dump(settings, file, indent=2)


def saved_settings(out_dir: Path) -> dict:
    """The settings of the run in a folder. Raises InputError where there is none."""
    try:
        return json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out_dir}: no run in this folder (config.json: {error})") from error


def best_scores(out_dir: Path, step: int) -> dict[str, float]:
    """The scores of best/, which is written after the last/ of its step and so may be newer. {}
    where it is newer than this step, which will come by it again."""
    path = out_dir / "best/training.json"
    if not path.exists():
        return {}
    best = json.loads(path.read_text(encoding="utf-8"))
    if best["step"] > step:
        return {}
    return {name: value for name, value in best.items() if name.startswith("best_dev_")}


def refuse_changed(out_dir: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raise InputError where the data, a model or the method is not what the run began with."""
    if not before:
        raise InputError(f"--resume: the run in {out_dir} was made by another version of train.py")
    for name, fingerprint in now.items():
        if before.get(name, fingerprint) != fingerprint:
            raise InputError(
                f"--resume: the {name} of the run in {out_dir} changed since it began, so it "
                "cannot be continued; put it back, or start a new run"
            )


def lock_run(out_dir: Path) -> None:
    """Keep other processes out of a run's folder until this one ends or trains another run."""
    for lock in LOCKS:
        os.close(lock)
    LOCKS[:] = [os.open(out_dir, os.O_RDONLY)]
    try:
        fcntl.flock(LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out_dir {out_dir}: another run is writing there") from error
    except OSError:
        print(f"note: {out_dir} cannot be locked; start nothing else that writes there")


def append_metrics(out_dir: Path, record: dict) -> None:
    """Write a line of metrics.jsonl, in the first process."""
    if is_first():
        with open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(out_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that a kill cut."""
    path = out_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def rewind_metrics(out_dir: Path, step: int, scored_again: bool) -> None:
    """Drop what was written after the checkpoint of this step; its scores too where it is scored
    again."""
    kept = []
    for record in read_metrics(out_dir):
        dropped = scored_again and "dev_bits_per_byte" in record
        if record["step"] < step or record["step"] == step and not dropped:
            kept.append(json.dumps(record) + "\n")
    with atomic_write(out_dir / "metrics.jsonl") as file:
        file.writelines(kept)


class Stop:
    """The first SIGTERM or Ctrl-C asks the run to save after its step; a second one, or one where
    all is saved, ends it on the spot."""

    def __init__(self, how_to_continue: str):
        self.how_to_continue = how_to_continue
        self.requested, self.all_is_saved = False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._caught)

    def _caught(self, number, frame):
        # torchrun's processes may get a signal twice, from the terminal and from torchrun.
        again = self.requested and world_size() == 1
        self.requested = True
        if again or self.all_is_saved:
            self.leave()

    @contextlib.contextmanager
    def at_once(self):
        """A block in which nothing can be lost."""
        self.all_is_saved = True
        if self.requested:
            self.leave()
        yield
        self.all_is_saved = False

    def in_any_process(self) -> bool:
        """Whether all processes are to leave, after the same step."""
        return all_reduce(torch.tensor(float(self.requested))).item() > 0

    def leave(self):
        print_first(f"\ninterrupted; {self.how_to_continue}")
        raise SystemExit(130)


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, student, modules: dict, optimizer, state: dict) -> None:
    """Write a checkpoint beside the old one, flush it, and put it in the old one's place.

    With an optimizer the one before stays as FOLDER.previous. All processes call this, the first
    one writes. Raises InputError where a weight is not finite; what is there stays."""
    weights = {name: whole(tensor.detach()) for name, tensor in student.state_dict().items()}
    moments = resume_tensors(optimizer) if optimizer is not None else None
    if not is_first():
        return
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise InputError(
            f"{folder}: not saved at step {state['step']}, because weights are not "
            "finite; try a lower --lr or a longer --warmup_steps in a new run"
        )
    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(temporary, ignore_errors=True)
    if student.has_lora:
        from runtime import lora

        student.save(temporary, lora.merged(student, weights))
        lora.save_adapter(temporary / "adapter", student, weights, state["student"])
    else:
        student.save(temporary, weights)
    write_end_tokens(temporary, state["eos_ids"])
    for name, module in modules.items():  # in a folder, because vLLM loads all weights beside
        (temporary / "modules").mkdir(exist_ok=True)
        save_file(module.state_dict(), temporary / f"modules/{name}.safetensors")
    if moments is not None:
        save_file(moments, temporary / "resume.safetensors")
    text = json.dumps(state, indent=2)
    (temporary / "training.json").write_text(text, encoding="utf-8")
    if moments is not None:
        flush(folder.parent / "metrics.jsonl")  # no step before a checkpoint may lack its line
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    temporary.rename(folder)
    flush(folder.parent)
    if moments is None:
        shutil.rmtree(previous, ignore_errors=True)


def write_end_tokens(folder: Path, eos_ids: list[int]) -> None:
    """Tell others, in config.json and generation_config.json, what ends an answer: first the token
    that was trained."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            values["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
            path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """A sharded tensor as a whole one on the CPU, in the first process. All processes must ask."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_first() else None


def resume_tensors(optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, and the state of every process's random generators."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = whole(value)
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for process, of_process in enumerate(gather(states)):
        for kind, value in of_process.items():
            tensors[f"rng/{kind}/{process}"] = value
    return tensors


def load_optimizer(folder: Path, optimizer) -> None:
    """Put back what resume_tensors saved."""
    tensors = load_file(folder / "resume.safetensors")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"{name}/{key}")
                if value is None:
                    continue
                if hasattr(parameter, "full_tensor") and value.dim():
                    from runtime.sharding import like

                    value = like(value, parameter)
                state[key] = value.to(parameter.device)
            if state:
                optimizer.state[parameter] = state
    if f"rng/cpu/{world_size() - 1}" not in tensors or f"rng/cpu/{world_size()}" in tensors:
        print_first("note: the run had another number of processes; dropout continues differently")
    if f"rng/cpu/{rank()}" in tensors:
        torch.set_rng_state(tensors[f"rng/cpu/{rank()}"])
    if f"rng/cuda/{rank()}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng/cuda/{rank()}"])


def load_modules(folder: Path, modules: dict) -> None:
    """Put back what a checkpoint has beside the student."""
    for name, module in modules.items():
        module.load_state_dict(load_file(folder / f"modules/{name}.safetensors"))


def last_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint to resume from: last/, or the one before, which replaces it where last/ is
    damaged or missing; None without any. Raises InputError where none is whole."""
    last, previous = out_dir / "last", out_dir / "last.previous"
    problems = []
    for folder in (last, previous):
        if not folder.exists():
            continue
        problem = damage(folder)
        if problem is None:
            if folder == previous:
                shutil.rmtree(last, ignore_errors=True)
                previous.rename(last)
            return last
        print(f"note: {folder} is damaged ({problem})")
        problems.append(f"{folder} ({problem})")
    if problems:
        raise InputError(f"--resume: no checkpoint is whole: {', '.join(problems)}")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint to resume from."""
    try:
        for name in ("config.json", "training.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))
        needed = [folder / "model.safetensors", folder / "resume.safetensors"]
        for file in {*needed, *folder.rglob("*.safetensors")}:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None
