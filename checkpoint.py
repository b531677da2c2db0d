"""Checkpoints: a model in the hub's layout with everything a run needs to go on beside it, whole or not at all."""
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hub
from hub import InputError


def save_checkpoint(folder: Path, student, projectors, discriminator, optimizer, state: dict) -> None:
    """Write a checkpoint beside the old one, flush it, and put it in the old one's place.

    The folder is a model in the hub's layout, with projectors.safetensors, discriminator.safetensors, training.json
    (step, scores, data) and, where an optimizer is given, resume.safetensors: all that a run needs to go on.
    """
    temporary, previous = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    student.save(temporary)
    tensors = {"projectors": projectors and projectors.state_dict(), "discriminator": discriminator and discriminator.state_dict(),
               "resume": optimizer and resume_tensors(optimizer)}
    for name, content in tensors.items():
        if content:
            save_file({k: v.detach().contiguous() for k, v in content.items()}, temporary / f"{name}.safetensors")
    (temporary / "training.json").write_text(json.dumps(state, indent=2))
    for path in (*temporary.iterdir(), temporary):
        hub.flush(path)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    hub.flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def resume_tensors(optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments by parameter number, and the state of the random number generators."""
    tensors = {f"{number}.{name}": value for number, values in optimizer.state_dict()["state"].items() for name, value in values.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def last_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint to go on with, or None where the run had none yet. A run that died between the two renames of
    save_checkpoint has left the one before as last.old."""
    last, previous = out_dir / "last", out_dir / "last.old"
    if previous.exists() and not last.exists():
        previous.rename(last)
    return last if last.exists() else None


def load_checkpoint(folder: Path, projectors, discriminator, optimizer) -> tuple[int, float]:
    """Put back what save_checkpoint wrote, but for the student, which load() reads like any model → (steps done, best
    score so far). Raises InputError where a file is damaged."""
    load_modules(folder, projectors, discriminator)
    try:
        _load_optimizer(folder, optimizer)
        state = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return state["step"], state["best_dev_rouge_l"]
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}: this checkpoint is damaged ({error}); best/ beside it may still be whole") from error


def load_modules(folder: Path, projectors, discriminator) -> None:
    """Put back the modules that a checkpoint has beside the student; None: not this one."""
    for name, module in (("projectors", projectors), ("discriminator", discriminator)):
        if module is not None:
            try:
                module.load_state_dict(load_file(folder / f"{name}.safetensors"))
            except (SafetensorError, RuntimeError, OSError) as error:
                raise InputError(f"{folder}/{name}.safetensors: missing or damaged ({error})") from error


def _load_optimizer(folder: Path, optimizer) -> None:
    tensors = load_file(folder / "resume.safetensors")
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    tensors.pop("rng.cuda", None)
    state = optimizer.state_dict()
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(state)
