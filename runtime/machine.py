"""Where a model runs: device, type, memory."""

import contextlib
import ctypes
import os
import sys

import torch

from runtime.config import InputError


def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """("auto", "auto") → CUDA and bfloat16 where there is a GPU that has it, else float32.

    Raises InputError where CUDA is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here (--device cpu works)")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        has_bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return device, getattr(torch, dtype)


def autocast(device: str, dtype: torch.dtype):
    """The context in which a model runs: bfloat16 autocast where that is the type, else none."""
    if dtype == torch.bfloat16:
        return torch.autocast(device, dtype)
    return contextlib.nullcontext()


def keep_memory() -> None:
    """On a CPU, let glibc keep freed tensors for the next ones. It would return large pieces to the
    system, which clears their pages anew each time: a fifth of a step (docs/speed.md)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no piece of memory is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned


# Large tensors in huge pages (Linux, CPU): else a third of a step is the system handing out pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
