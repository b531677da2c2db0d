"""--shard: every process keeps only a part of each layer (FSDP2) and fetches the rest when it is
needed. Embeddings, the last norm and the head, which the losses use at many places, stay whole."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Decoder, load, shape_of
from runtime.config import InputError
from runtime.distributed import all_reduce, is_first, world_size


def load_sharded(folder, dtype: torch.dtype, device: str, change=None, **how) -> Decoder:
    """model.load for a model that is too large for one process: the first one reads the weights,
    into the CPU's memory, and sends each its part, a tensor at a time.

    change: a function of the decoder that is called before. how: load's other arguments."""
    if is_first():
        decoder = load(folder, dtype=dtype, device="cpu", **how)
        if not isinstance(decoder, Decoder):
            raise InputError(f"--shard: {folder} is run by transformers, which is not sharded here")
    else:
        decoder = shape_of(folder).to(dtype)
    if change:
        change(decoder)
    whole = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    decoder.to("meta").restore_constants()
    mesh = dist.init_device_mesh(device, (world_size(),))
    # On GPUs layers travel and compute in bfloat16; their gradients are added in float32.
    policy = MixedPrecisionPolicy()
    if device == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)  # gradients are added, not averaged
        layer.set_force_sum_reduction_for_comms(True)
    # The decoder is the root, so that a layer is fetched while the one before it computes.
    in_layers = {p for layer in decoder.layers for p in layer.parameters()}
    others = {p for p in decoder.parameters() if p not in in_layers}
    fully_shard(decoder, mesh=mesh, ignored_params=others)
    decoder.allocate(device)
    for name, parameter in decoder.named_parameters():
        tensor = whole.pop(name)
        if is_first():
            tensor = tensor.to(device)
        else:
            tensor = torch.empty_like(tensor, device=device)
        if isinstance(parameter, DTensor):
            parameter.detach().copy_(like(tensor, parameter))
        else:
            dist.broadcast(tensor, 0)
            parameter.detach().copy_(tensor)
    return decoder


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as the parameter is."""
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def clip_gradients(parameters: list[torch.Tensor], largest: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ where some parameters are sharded → the norm before."""
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    shards = [
        p.grad.to_local() for p in parameters if p.grad is not None and isinstance(p, DTensor)
    ]
    square = torch.nn.utils.get_total_norm(whole).square()
    square = square + all_reduce(torch.nn.utils.get_total_norm(shards).square())
    norm = square.sqrt()
    torch._foreach_mul_(whole + shards, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
