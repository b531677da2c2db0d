"""Where a run computes: the device and its type; several processes, on one machine or on many.

    torchrun --nproc_per_node=8 train.py --batch_size 4 --grad_accum 8 …

The forward passes of an optimizer step (--grad_accum) are shared out; their gradients and losses,
which are sums over tokens divided by the step's number of tokens, are added. So the step is the one
a single process would take, but for dropout. Without torchrun there is one process, and what
adds or waits does nothing."""

import contextlib
import ctypes
import datetime
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.config import InputError

BUCKET = 1 << 25  # gradients, in numbers, that travel together


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


def give_memory_back() -> None:
    """Return to the system what keep_memory has kept: in time it falls into pieces that no tensor
    fits into, and a run would hold more and more."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


# Large tensors in huge pages (Linux, CPU): else a third of a step is the system handing out pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def init(device: str) -> None:
    """Join the other processes, where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return  # other launchers set WORLD_SIZE too
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: this machine has {torch.cuda.device_count()} "
                "GPUs; start no more processes, or pass --device cpu"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # One process may answer prompts for hours while the others wait. Of a dead one torchrun tells.
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=24))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def print_first(text: str) -> None:
    """Print in the first process, above its progress bar."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_goes_first():
    """What is downloaded or prepared on disk is prepared once, by the first process."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def gather(thing) -> list:
    """Every process's thing, in order."""
    things = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(things, thing)
    return things


def gather_rows(mine: dict) -> list:
    """What all processes have by row number, in the rows' order."""
    everything = {}
    for of_process in gather(mine):
        everything |= of_process
    return [everything[i] for i in sorted(everything)]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_weights(modules) -> None:
    """Give every process the first one's weights."""
    if world_size() > 1:
        for module in modules:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), 0)


def all_reduce_gradients(parameters) -> None:
    """Sum the gradients over processes, many small ones in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1:
        return
    bucket, size = [], 0
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel()
        if size >= BUCKET or i == len(gradients) - 1:
            total = all_reduce(torch.cat([g.flatten() for g in bucket]))
            for g, part in zip(bucket, total.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0
