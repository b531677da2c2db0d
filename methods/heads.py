"""Losses over the vocabulary, a chunk of positions at a time: no tensor of shape (B, T, V) ever exists.

in_chunks computes logits z = W h for CHUNK positions, the losses of these positions, and their gradient at once, while
the logits are there: nothing is computed twice, and nothing of the vocabulary's size waits for the backward pass. To
add up the gradients of several losses it must know what the total will multiply each of them by: `factors`, a table
that train.py makes where it writes the total.

Every loss is returned by name as a SUM over valid positions."""
import math

import torch
import torch.nn.functional as F

from methods.divergences import divergence
from methods.fused import fused
from methods.sides import Side

CHUNK = 128         # positions whose logits exist at one time; 8 times as many on a GPU

Parts = dict[str, torch.Tensor]

class _KnownGradients(torch.autograd.Function):
    """Values (K,) of which Σ factor_k · value_k has these gradients with respect to these tensors."""

    @staticmethod
    def forward(ctx, values, factors, gradients, *tensors):
        ctx.factors, ctx.gradients = factors, gradients
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, None          # let go of them, so that they need no copy
        strongest = max(range(len(ctx.factors)), key=lambda k: abs(ctx.factors[k]))
        scale = upstream[strongest] / (ctx.factors[strongest] or 1.0)
        known = upstream.device.type == "cpu" and type(upstream) is torch.Tensor    # no wait for a GPU; no fake tensor
        found = upstream.tolist() if known else []
        if found and all(map(math.isfinite, found)):
            expected = [found[strongest] / (ctx.factors[strongest] or 1.0) * factor for factor in ctx.factors]
            if not all(math.isclose(*both, rel_tol=1e-3, abs_tol=1e-8) for both in zip(found, expected)):
                raise RuntimeError(f"the total weighs its parts by {found}, in_chunks by {ctx.factors}")
        return None, None, None, *(gradient.mul_(scale) for gradient in gradients)

def chunk_size(kind: str) -> int:
    """Positions whose logits exist at one time on this kind of device."""
    return CHUNK if kind == "cpu" else 8 * CHUNK

def slices(hidden: torch.Tensor) -> list[slice]:
    """Positions 0 … N − 1 of (N, d), in chunks; no position at all is one empty chunk."""
    size = chunk_size(hidden.device.type)
    return [slice(start, start + size) for start in range(0, max(len(hidden), 1), size)]

def in_chunks(function, hidden: list[torch.Tensor], heads: list[torch.Tensor], factors: dict[str, float],
              *others: torch.Tensor, pieces: list[slice] | None = None) -> Parts:
    """The sums of function(*logits, *others), which is called for CHUNK positions at a time.
    hidden: (N, d) each. heads: (V, d), one for each of hidden or one for all; only the first can learn, and from the
    first of hidden alone. others: (N, ...), what belongs to the positions and needs no gradient, or a function of the
    positions, a slice. pieces: the positions of every call, in place of CHUNK at a time. function returns values by
    name; the sums of those named in `factors` have a gradient, where the total is Σ factor · sum. backward() can run
    through it once."""
    kind = hidden[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden[0].dtype
    matrices = [head.detach().to(dtype) for head in heads]
    matrices = matrices * len(hidden) if len(heads) == 1 else matrices
    of_hidden = [torch.zeros_like(h) if h.requires_grad else None for h in hidden]
    of_head = torch.zeros_like(heads[0]) if heads[0].requires_grad else None
    learning = [k for k, h in enumerate(hidden) if h.requires_grad or k == 0 and of_head is not None]
    sums = {}
    for here in pieces or slices(hidden[0]):
        states = [h.detach()[here].to(dtype) for h in hidden]
        logits = [x @ matrix.t() for x, matrix in zip(states, matrices)]
        for k in learning:
            logits[k].requires_grad_()
        parts = [x(here) if callable(x) else x[here] for x in others]
        with torch.enable_grad():
            values = {name: value.sum() for name, value in function(*logits, *parts).items()}
            loss = sum(factors[name] * value for name, value in values.items() if name in factors)
        gradients = torch.autograd.grad(loss, [logits[k] for k in learning]) if learning else []
        for k, gradient in zip(learning, gradients):
            if of_hidden[k] is not None:
                of_hidden[k][here] = gradient @ matrices[k]
            if k == 0 and of_head is not None:
                _add_product(of_head, gradient, states[0])
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach()
    known = [(h, gradient) for h, gradient in zip([*hidden, heads[0]], [*of_hidden, of_head]) if gradient is not None]
    names = [name for name in sums if name in factors]
    if known:
        tensors, gradients = zip(*known)
        stacked = torch.stack([sums[name] for name in names])
        stacked = _KnownGradients.apply(stacked, [factors[name] for name in names], gradients, *tensors)
        sums |= dict(zip(names, stacked.unbind()))
    return sums

def _add_product(total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor) -> None:
    """total (V, d) += gradientᵀ (V, n) · states (n, d), without a copy where the types are the same; else on a CPU some
    rows at a time, which are added while the cache holds them."""
    if total.dtype == states.dtype:
        torch.addmm(total, gradient.t(), states, out=total)
        return
    rows = 1024 if total.device.type == "cpu" else len(total)
    for some, of_logits in zip(total.split(rows), gradient.t().split(rows)):
        some += of_logits @ states

@torch.no_grad()
def entropies(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """H(softmax W h) in nats at each position: (N, d), (V, d) → (N,)."""
    results = []
    for here in slices(hidden):
        log_p = F.linear(hidden[here], head).float().log_softmax(-1)
        results.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(results)

@torch.no_grad()
def first_guesses(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """argmax W h at each position: (N, d), (V, d) → (N,)."""
    return torch.cat([F.linear(hidden[here], head).argmax(-1) for here in slices(hidden)])

@torch.no_grad()
def label_nats(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p(y) at each position: (N, d), (V, d), (N,) → (N,)."""
    return torch.cat([F.cross_entropy(F.linear(hidden[here], head).float(), labels[here], reduction="none")
                      for here in slices(hidden)])

@fused
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> Parts:
    """−log p(y), and whether the first guess is right, at each position: (n, V), (n,) → (n,) each."""
    logits = logits.float()
    return {"nll_loss": F.cross_entropy(logits, labels, reduction="none"), "accuracy": logits.argmax(-1) == labels}

def sft(student: Side, factors: dict[str, float]) -> Parts:
    """CE(z_s, y_s) → nll_loss, accuracy (a count)."""
    def chunk(z_s, y):
        return cross_entropy(z_s, y)
    return in_chunks(chunk, [student.packed], [student.head], factors, student.valid.labels)

def kd(student: Side, teacher: Side, options, factors: dict[str, float]) -> Parts:
    """CE(z_s, y_s) and D(z_s, sg z_t) over one vocabulary → nll_loss, accuracy, kd_loss."""
    def chunk(z_s, z_t, y):
        z_s, vocabulary = z_s.float(), min(z_s.size(-1), z_t.size(-1))      # one may be padded beyond the tokenizer
        return cross_entropy(z_s, y) | {
            "kd_loss": divergence(options.divergence, z_s[:, :vocabulary], z_t[:, :vocabulary], options.temperature)}
    return in_chunks(chunk, [student.packed, teacher.packed.detach()], [student.head, teacher.head.detach()], factors,
                     student.valid.labels)
