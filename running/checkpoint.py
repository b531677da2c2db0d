"""Checkpoints: a model in the hub's layout with everything a run needs to go on beside it, whole or not at all.

A checkpoint is written under another name, flushed with its folder and renamed; the one before it stays. checksums.json
has the SHA-256 of every file, so that a damaged checkpoint is noticed and the one before is taken. Nothing is pickled.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from files import hub
from running import lora
from running import parallel
from files.config import InputError

def save_checkpoint(folder: Path, student, projectors, adversary, optimizer, state: dict) -> None:
    """Write a checkpoint beside the old one, flush it, and put it in the old one's place.

    The folder is a model in the hub's layout, with projectors.safetensors, discriminator.safetensors, training.json
    (step, scores, data), with LoRA adapter/ and, where an optimizer is given, resume.safetensors: all that a run needs
    to go on. A checkpoint with an optimizer that was there before stays as FOLDER.previous. Every process calls this,
    the first one writes. Raises InputError where the disk does not take it or a weight is not finite; what was there
    before is untouched then."""
    if not parallel.all_finite(p for module in (student, projectors, adversary)
                               if module is not None for p in module.parameters()):
        raise InputError(f"{folder}: not saved at step {state['step']}, because weights are not finite; the checkpoint "
                         "before it is kept. Try a lower --lr or a longer --warmup_steps in a new run")
    tensors = {"projectors": projectors and projectors.state_dict(),
               "discriminator": adversary and adversary.state_dict(),
               "resume": optimizer and resume_tensors(optimizer)}
    weights = {name: parallel.whole(tensor.detach()) for name, tensor in student.state_dict().items()}
    if not parallel.is_first():
        return
    temporary, previous = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".previous")
    try:
        if optimizer is not None:                   # no step of a checkpoint to go on from may lack its line
            hub.flush(folder.parent / "metrics.jsonl")
        if temporary.exists():
            shutil.rmtree(temporary)
        student.save(temporary, lora.merged(student, weights))
        if lora.has_lora(student):
            lora.save_adapter(temporary / "adapter", student, weights, state["student"])
        for name, content in tensors.items():
            if content:
                save_file({k: v.detach().contiguous() for k, v in content.items()}, temporary / f"{name}.safetensors")
        (temporary / "training.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        checksums = {str(path.relative_to(temporary)): hub.sha256(path) for path in files}
        (temporary / "checksums.json").write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            hub.flush(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}); make room, then --resume goes on from the one before"
                         ) from error
    if previous.exists():
        shutil.rmtree(previous)
    if folder.exists():
        folder.rename(previous)
    temporary.rename(folder)
    hub.flush(folder.parent)
    if optimizer is None and previous.exists():
        shutil.rmtree(previous)

def resume_tensors(optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments by parameter number, and the state of every process's random number generators."""
    parameters = sorted(numbered(optimizer).items())
    tensors = {f"{number}.{name}": parallel.whole(value)
               for number, p in parameters for name, value in optimizer.state.get(p, {}).items()}
    states = {"rng.cpu": torch.get_rng_state()} | ({"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available()
                                                   else {})
    for rank, of_rank in enumerate(parallel.gather(states)):
        tensors |= {f"{name}.{rank}": value for name, value in of_rank.items()}
    return tensors

def numbered(optimizer) -> dict[int, torch.Tensor]:
    """The parameters by the numbers that train.parameter_groups gave them."""
    return {number: p for group in optimizer.param_groups for number, p in zip(group["numbers"], group["params"])}

def check(folder: Path) -> None:
    """Raise InputError where a file of a checkpoint to go on from is missing or not what was written."""
    try:
        checksums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        needed = {"config.json", "model.safetensors", "resume.safetensors", "training.json"}
        wrong = [*needed - checksums.keys(), *(name for name, checksum in checksums.items() if not
                                               (folder / name).is_file() or hub.sha256(folder / name) != checksum)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{folder}: this checkpoint is damaged (checksums.json: {error})") from error
    if wrong:
        raise InputError(f"{folder}: this checkpoint is damaged ({', '.join(wrong)})")

def last_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint to go on with, or None where there is none yet. Where the last one is damaged, or was lost between
    the renames of save_checkpoint, the one before takes its place. Raises InputError where none is whole."""
    last, previous = out_dir / "last", out_dir / "last.previous"
    try:
        if last.exists():
            check(last)
            return last
        if not previous.exists():
            return None
    except InputError as error:
        if not previous.exists():
            raise
        print(f"note: {error}; going on from the one before it")
    check(previous)
    if last.exists():
        shutil.rmtree(last)
    previous.rename(last)
    return last

def load_checkpoint(folder: Path, projectors, adversary, optimizer) -> dict:
    """Put back what save_checkpoint wrote, but for the student, which load() reads like any model → training.json's
    content. Raises InputError where a file is damaged."""
    load_modules(folder, projectors, adversary)
    try:
        _load_optimizer(folder, optimizer)
        state = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return {"step": state["step"], "best_dev_rouge_l": state["best_dev_rouge_l"], **state}
    except (SafetensorError, RuntimeError, ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise InputError(f"{folder}: this checkpoint is damaged ({error!r:.200})") from error

def load_modules(folder: Path, projectors, adversary) -> None:
    """Put back the modules that a checkpoint has beside the student; None: not this one."""
    for name, module in (("projectors", projectors), ("discriminator", adversary)):
        if module is not None:
            try:
                module.load_state_dict(load_file(folder / f"{name}.safetensors"))
            except (SafetensorError, RuntimeError, OSError) as error:
                raise InputError(f"{folder}/{name}.safetensors: missing or damaged ({error})") from error

def _load_optimizer(folder: Path, optimizer) -> None:
    tensors = load_file(folder / "resume.safetensors")
    states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
    if len({name.rsplit(".", 1)[1] for name in states}) != parallel.world():
        print("note: the run had another number of processes; what is random (dropout) goes on differently")
    if f"rng.cpu.{parallel.rank()}" in states:
        torch.set_rng_state(states[f"rng.cpu.{parallel.rank()}"])
    if f"rng.cuda.{parallel.rank()}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"rng.cuda.{parallel.rank()}"])
    parameters, state = numbered(optimizer), optimizer.state_dict()
    place = {number: k for k, number in enumerate(parameters)}              # state_dict's own numbers follow the groups
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        value = parallel.like(value, parameters[int(number)]) if value.dim() else value
        state["state"].setdefault(place[int(number)], {})[name] = value
    optimizer.load_state_dict(state)
