"""Several processes, on one machine or on many: torchrun starts them, this file connects them.

    torchrun --nproc_per_node=8 train.py --batch_size 4 --grad_accum 8 …

The forward passes of an optimizer step (--grad_accum) are dealt out to the processes; their gradients and losses, which
are sums over tokens divided by the step's number of tokens, are added. So the step is the one that a single process
would take, but for dropout, whose random numbers are each process's own.
With --shard_student and --shard_teacher each process keeps only a part of every layer (FSDP2) and fetches the rest when
it is needed. Without torchrun there is one process, and everything here does nothing."""
import contextlib
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from files.config import InputError

BUCKET = 1 << 25            # gradients, in numbers, that travel together

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1

def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0

@contextlib.contextmanager
def started():
    """Join the other processes where torchrun started several. All but the first print nothing but errors. Of an error
    the process that has it first tells; the others, which fail because it is gone, leave in silence, and none waits."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    local, flags = int(os.environ["LOCAL_RANK"]), [*zip(sys.argv, sys.argv[1:]), *(w.split("=") for w in sys.argv)]
    if torch.cuda.is_available() and ("--device", "cpu") not in map(tuple, flags):
        if local >= (gpus := torch.cuda.device_count()):
            raise InputError(f"--nproc_per_node: this machine has {gpus} GPUs; start no more, or pass --device cpu")
        torch.cuda.set_device(local)
    store, number, several = next(iter(dist.rendezvous("env://")))
    printed = sys.stdout
    try:                # also around joining: another process may have refused its command line and be gone by then
        # a process may answer or score for hours while the others wait; of a dead one torchrun tells
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                                rank=number, world_size=several, timeout=datetime.timedelta(hours=24))
        if number:
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        yield
    except Exception as error:
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from error
        raise
    finally:
        sys.stdout = printed
    dist.destroy_process_group()

@contextlib.contextmanager
def first_goes_first():
    """What is downloaded or prepared on disk is prepared once: the first process goes through the block, then the first
    of every other machine, whose disk may be another one, then the rest."""
    turn = 0 if is_first() else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()

def here() -> tuple[int, int]:
    """This process's number among those of its machine, and how many they are."""
    if world() == 1:
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()

def gather(thing) -> list:
    """Every process's thing, in order."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things

def add(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor

def add_up(sums: dict[str, torch.Tensor], norms: list[torch.Tensor]) -> tuple[dict[str, float], list[float]]:
    """Sums over this process's tokens, added over processes, and norms, as numbers: one wait for the GPU."""
    totals = add(torch.stack([value.float() for value in sums.values()]))
    numbers = torch.cat([totals, torch.stack(norms).float()]).tolist()
    return dict(zip(sums, numbers)), numbers[len(sums):]

def equal_weights(*modules) -> None:
    """Give every process the first one's weights, before anything is sharded."""
    if world() > 1:
        for module in filter(None, modules):
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), 0)

def add_gradients(parameters) -> None:
    """Sum the gradients over processes, many small ones in one message. Those of sharded layers were added by FSDP."""
    if world() == 1:
        return
    bucket, size = [], 0
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        size += gradient.numel()
        if size >= BUCKET or number == len(gradients):
            total = add(torch.cat([g.flatten() for g in bucket]))
            for g, part in zip(bucket, total.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0

# ----------------------------------------------------------------------------------------------------------- sharding
def shard(decoder, device: str) -> None:
    """Keep of every layer of a Decoder only this process's part. The first process has its weights, in the CPU's
    memory, and gives the others theirs, who have its shape alone. Embeddings, the last norm and the head, which the
    losses use at many places, stay whole. The decoder is the root, through which its layers know of each other: the
    next one's weights are fetched while one computes. On GPUs they travel and compute in bfloat16 and their gradients
    are added in float32, so that autocast keeps no copy of its own."""
    given = {name: p.detach() for name, p in decoder.named_parameters()}
    decoder.to("meta").tie()
    mesh = dist.init_device_mesh(device, (world(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device == "cuda" else MixedPrecisionPolicy()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)           # gradients are added, not averaged
        layer.set_force_sum_reduction_for_comms(True)
    in_layers = {p for layer in decoder.layers for p in layer.parameters()}
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if p not in in_layers})
    register_fsdp_forward_method(decoder, "step")       # generation goes another way than forward
    decoder.allocate(device)
    for name, parameter in decoder.named_parameters():
        whole = given.pop(name)
        whole = whole.to(device) if is_first() else torch.empty_like(whole, device=device)
        if isinstance(parameter, DTensor):
            parameter.detach().copy_(like(whole, parameter))            # each is sent no more than its part
        else:
            dist.broadcast(whole, 0)
            parameter.detach().copy_(whole)

def share(decoder) -> tuple[int, int]:
    """(first, every): of a list this process does every so many from the first on. A sharded model needs its processes
    in step, so that each does all."""
    return (0, 1) if is_sharded(decoder) else (rank(), world())

def is_part(tensor: torch.Tensor) -> bool:
    """Whether this process has only a part of it."""
    return isinstance(tensor, DTensor)

def is_sharded(module) -> bool:
    return any(map(is_part, module.parameters()))

def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """A sharded tensor as a whole one in the CPU's memory, for the first process; every process must ask for it, one
    tensor after the other, so that no GPU holds more than one."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_first() else None

def all_finite(parameters) -> bool:
    """Whether all numbers of some parameters, whole or sharded, are finite, in every process."""
    bad = sum((~torch.isfinite(p.to_local() if isinstance(p, DTensor) else p)).any().float() for p in parameters)
    return add(torch.as_tensor(bad).detach().clone()).item() == 0

def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as the parameter is."""
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                             parameter.placements) if isinstance(parameter, DTensor) else tensor

def clip_gradients(parameters: list[torch.Tensor], largest: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_, also where some of the parameters are sharded → the norm before."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    squares = [torch.nn.utils.get_total_norm(some, foreach=True).square() for some in (whole, parts)]
    norm = (squares[0] + add(squares[1])).sqrt()
    torch._foreach_mul_(whole + parts, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
