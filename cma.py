"""Dual-space knowledge distillation: the losses of DSKD (arXiv 2406.17328) and its cross-model attention (CMA).

Names as in the paper: query, key, value; t2s: the teacher's states projected into the student's space, s2t: the other
way; h: final hidden states; W: head; z = W h: logits; "valid" positions have a response token or EOS as their label.

    Q = P_q([E_s(x_s); E_s(y_s)])    K = [E_t(x_t); E_t(y_t)] / σ_K    A = Q Kᵀ / √(2 d_t)
    z_t2s = sg(W_s) softmax_rows(A) P_t2s(h_t/σ_h + E_t(y_t)/σ_y)      z_s2t = W_t softmax_rows(Aᵀ) P_s2t(h_s)
    KD = CE(z_t2s, y_s) + Σ g · D(z_s, sg z_t2s) + Σ w_t · KL(softmax(z_t/T) ‖ softmax(z_s2t/T))
    g = 1[argmax z_t2s = y_s], w_t = 1;   DWA-KD (arXiv 2602.21669): g = ramp · max softmax(z_t2s) · w_s, entropy weights w

Notable here:
- every loss is returned by name as a SUM over valid positions; the caller divides by n, the number of valid student
  tokens in the whole optimizer step, so that neither padding nor the split into micro-batches changes a token's weight;
- beside them "loss" is the sum to minimize, (1 − α) CE + α KD, the only part with a gradient;
- attention lives on (B, S, T) of valid positions only; the heads run on packed valid positions, a chunk at a time, and each
  chunk's gradient is taken at once: no tensor of shape (B, T, V) ever exists;
- the probes CLP and CLA are the same loss with chunks of text in place of attention, or around it (`mixing_weights`).
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")
ALIGNMENTS = ("attention", "chunk_attention", "chunk_mean")
CHUNK = 128         # positions whose logits exist at one time; 8 times as many on a GPU


# ------------------------------------------------------------------------------------------------------ divergences

def divergence(name: str, student_logits: torch.Tensor, target_logits: torch.Tensor, temperature: float,
               skew: float = 0.1, head_mass: float = 0.5) -> torch.Tensor:
    """D between softmax(target/T) = p and softmax(student/T) = q at each position: (N, V), (N, V) → (N,), in nats.

    skew: λ of the two skewed divergences (DistiLLM, 2402.03898). head_mass: where adaptive_kl (2404.02657) parts the
    vocabulary: its tail are the least likely tokens with that much probability together. No T² factor.
    Raises KeyError for an unknown name.
    """
    p_log = F.log_softmax(target_logits.float() / temperature, -1)
    q_log = F.log_softmax(student_logits.float() / temperature, -1)
    return _DIVERGENCES[name](p_log, q_log, skew, head_mass)


def _kl(a_log, b_log):
    """KL(a ‖ b) over the last dimension."""
    return (a_log.exp() * (a_log - b_log)).sum(-1)


def _mixture_log(weight, a_log, b_log):
    """log(weight · a + (1 − weight) · b)"""
    return torch.logaddexp(a_log + math.log(weight), b_log + math.log(1 - weight))


def _js(p_log, q_log, skew, head_mass):
    middle_log = _mixture_log(0.5, p_log, q_log)
    return 0.5 * _kl(p_log, middle_log) + 0.5 * _kl(q_log, middle_log)


def _adaptive_kl(p_log, q_log, skew, head_mass):
    with torch.no_grad():
        p, q = p_log.exp(), q_log.exp()
        ascending, order = p.sort(-1)
        in_tail = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ascending.cumsum(-1) <= head_mass)
        gap = (p - q).abs()
        gap_tail, gap_all = (gap * in_tail).sum(-1), gap.sum(-1).clamp(min=1e-12)
        tail_share = gap_tail / gap_all
    return (1 - tail_share) * _kl(p_log, q_log) + tail_share * _kl(q_log, p_log)


_DIVERGENCES = {
    "forward_kl": lambda p_log, q_log, skew, head_mass: _kl(p_log, q_log),
    "reverse_kl": lambda p_log, q_log, skew, head_mass: _kl(q_log, p_log),
    "js_divergence": _js,
    "skewed_forward_kl": lambda p_log, q_log, skew, head_mass: _kl(p_log, _mixture_log(skew, p_log, q_log)),
    "skewed_reverse_kl": lambda p_log, q_log, skew, head_mass: _kl(q_log, _mixture_log(skew, q_log, p_log)),
    "adaptive_kl": _adaptive_kl,
}


# ------------------------------------------------------------------------------------------------- valid positions

class Valid:
    """The valid positions of one side of a batch: where they are, as a packed list and as a (B, L) grid.

    labels: (B, T), −100 where not valid. `labels` (N,) are the others, packed; `mask` (B, L) is true on the grid's real cells; a row's valid positions come
    first, in order, and L is the largest number of them in a row.
    """

    def __init__(self, labels: torch.Tensor):
        is_valid = labels != -100
        self.labels = labels[is_valid]
        lengths = is_valid.sum(1)
        longest = int(lengths.max())
        self.index = is_valid.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.mask = torch.arange(longest, device=labels.device)[None] < lengths[:, None]

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) or (B, T, d) → the same at the grid's positions, (B, L) or (B, L, d); zero where there is no position."""
        index = self.index if x.dim() == 2 else self.index[..., None].expand(-1, -1, x.size(-1))
        mask = self.mask if x.dim() == 2 else self.mask[..., None]
        return x.gather(1, index) * mask

    def pack(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) → (N, ...), the valid positions of all rows one after the other."""
        return grid[self.mask]

    def deviation(self, grid: torch.Tensor) -> torch.Tensor:
        """The standard deviation of (B, L, d) over valid positions and features."""
        return self.pack(grid).float().std()

    def mean_one(self, weights: torch.Tensor) -> torch.Tensor:
        """Rescale weights (N,) of the packed positions so that each row's positions have the mean 1."""
        grid = torch.zeros_like(self.mask, dtype=weights.dtype).masked_scatter(self.mask, weights)
        mean = grid.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)
        return self.pack(grid / mean.clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------------- projectors

class Projectors(nn.Module):
    """P_t2s: d_t → d_s, P_s2t: d_s → d_t and, where asked for, P_q: 2 d_s → 2 d_t (query) and DWA-KD's P_e: d_t → d_s
    (dtw_embed). Linear layers with bias."""

    def __init__(self, student_size: int, teacher_size: int, query: bool, dtw_embed: bool = False):
        super().__init__()
        self.t2s = nn.Linear(teacher_size, student_size)
        self.s2t = nn.Linear(student_size, teacher_size)
        self.query = nn.Linear(2 * student_size, 2 * teacher_size) if query else None
        self.dtw_embed = nn.Linear(teacher_size, student_size) if dtw_embed else None


# ----------------------------------------------------------------------------------------------- the heads, chunked

def _chunk_size(hidden: torch.Tensor) -> int:
    return CHUNK if hidden.device.type == "cpu" else 8 * CHUNK


class _InChunks(torch.autograd.Function):
    """The sum of function's "loss", whose gradient is taken chunk by chunk in the forward pass, while a chunk's logits are
    there: nothing is computed twice, and nothing of the vocabulary's size waits for the backward pass."""

    @staticmethod
    def forward(ctx, function, names, number, *tensors):
        hidden, heads, others = tensors[:number], tensors[number:2 * number], tensors[2 * number:]
        kind = hidden[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden[0].dtype
        cast = {head.data_ptr(): head.detach().to(dtype) for head in heads}
        gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors[:2 * number]]
        size = _chunk_size(hidden[0])
        loss, results = 0.0, []
        for start in range(0, max(len(hidden[0]), 1), size):           # no position at all is one empty chunk
            here = slice(start, start + size)
            states = [h[here].to(dtype) for h in hidden]
            logits = [(x @ cast[head.data_ptr()].t()).requires_grad_(h.requires_grad or head.requires_grad) for x, h, head in zip(states, hidden, heads)]
            with torch.enable_grad():
                values = function(*logits, *(x[here] for x in others))
                part = values.pop("loss").sum()
            wanted = [k for k in range(number) if logits[k].requires_grad]
            for k, gradient in zip(wanted, torch.autograd.grad(part, [logits[k] for k in wanted]) if wanted else []):
                if gradients[k] is not None:
                    gradients[k][here] = gradient @ cast[heads[k].data_ptr()]
                if gradients[number + k] is None:
                    continue
                if dtype == gradients[number + k].dtype:
                    torch.addmm(gradients[number + k], gradient.t(), states[k], out=gradients[number + k])
                else:
                    gradients[number + k] += gradient.t() @ states[k]
            loss = loss + part.detach()
            results.append([value.detach() for value in values.values()])
            names[:] = values
        ctx.gradients, ctx.others = gradients, len(others)
        results = [torch.cat(column) for column in zip(*results)]
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        gradients, ctx.gradients = ctx.gradients, None          # let go of them, so that they need no copy
        return None, None, None, *(None if g is None else g.mul_(scale) for g in gradients), *[None] * ctx.others


def in_chunks(function, streams: list[tuple[torch.Tensor, torch.Tensor]], *others: torch.Tensor) -> dict[str, torch.Tensor]:
    """function(*logits, *others) for CHUNK positions at a time, with the logits W h of every stream (h, W).

    h: (N, d); W: (V, d); others: (N, ...), what belongs to the positions and needs no gradient. function returns a
    dictionary of values (n,), of which "loss" is to be minimized. → "loss", the sum, with its gradient to every h and W
    that wants one, and all other values for all positions, (N,), without. backward() can run through it once.
    """
    hidden, heads = zip(*streams)
    names: list[str] = []
    loss, *values = _InChunks.apply(function, names, len(streams), *hidden, *heads, *others)
    return {"loss": loss, **dict(zip(names, values))}


def sums(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values per position, (N,), as loss parts."""
    return {name: value.sum() for name, value in values.items()}


def _nll(z, labels):
    """Cross-entropy, and whether the first guess is right, at each position."""
    return {"nll_loss": F.cross_entropy(z, labels, reduction="none"), "accuracy": z.argmax(-1) == labels}


@torch.no_grad()
def entropies(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """H(softmax W h) in nats at each position: (N, d), (V, d) → (N,)."""
    results = []
    for h in hidden.split(_chunk_size(hidden)):
        log_p = F.linear(h, head).float().log_softmax(-1)
        results.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(results)


def sft(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, rate: float = 1.0) -> dict[str, torch.Tensor]:
    """CE(W h, y), summed: hidden (N, d), head (V, d), labels (N,) → loss (rate · CE), nll_loss, accuracy (a count)."""
    def chunk(z, y):
        values = _nll(z.float(), y)
        return values | {"loss": rate * values["nll_loss"]}
    return sums(in_chunks(chunk, [(hidden, head)], labels))


def kd(student_hidden, student_head, teacher_hidden, teacher_head, labels, name, temperature, kd_rate):
    """CE and D(z_s, sg z_t) over a shared vocabulary, summed → loss ((1 − α) CE + α D), nll_loss, accuracy, kd_loss.

    student_hidden (N, d_s), student_head (V_s, d_s), teacher_hidden (N, d_t), teacher_head (V_t, d_t), labels (N,).
    """
    def chunk(z_s, z_t, y):
        z_s, vocabulary = z_s.float(), min(z_s.size(-1), z_t.size(-1))      # one may be padded beyond the tokenizer
        values = _nll(z_s, y) | {"kd_loss": divergence(name, z_s[:, :vocabulary], z_t[:, :vocabulary], temperature)}
        return values | {"loss": (1 - kd_rate) * values["nll_loss"] + kd_rate * values["kd_loss"]}
    return sums(in_chunks(chunk, [(student_hidden, student_head), (teacher_hidden.detach(), teacher_head.detach())], labels))


def student_space(student_hidden, t2s_hidden, head, labels, name, temperature, kd_rate, gate: str, weights, met):
    """What is learned in the student's space, summed: (1 − α) CE(z_s, y) + α (CE(z_t2s, y) + g D(z_s, sg z_t2s)).

    student_hidden, t2s_hidden: (N, d_s); head (V_s, d_s) gets no gradient through z_t2s; labels, weights, met: (N,).
    gate: g is weights times 1 ("always"), 1[argmax z_t2s = y] ("right") or max softmax(z_t2s) ("confidence"). met: 1, or 0
    where nothing of the teacher's corresponds to a position.
    → loss, nll_loss, accuracy, t2s_ce_loss, t2s_kd_loss, t2s_acc, max_t2s_prob
    """
    def chunk(z_s, z_t2s, y, weights, met):
        z_s, z_t2s = z_s.float(), z_t2s.float()
        log_t2s = z_t2s.log_softmax(-1)
        confidence, guess = log_t2s.detach().max(-1)
        confidence, right = confidence.exp(), guess == y
        g = weights * {"always": 1.0, "right": right, "confidence": confidence}[gate]
        values = _nll(z_s, y) | {"t2s_ce_loss": met * -log_t2s.gather(1, y[:, None]).squeeze(1), "t2s_acc": right * met, "max_t2s_prob": confidence * met,
                                 "t2s_kd_loss": met * g * divergence(name, z_s, z_t2s.detach(), temperature)}
        return values | {"loss": (1 - kd_rate) * values["nll_loss"] + kd_rate * (values["t2s_ce_loss"] + values["t2s_kd_loss"])}
    return sums(in_chunks(chunk, [(student_hidden, head), (t2s_hidden, head.detach())], labels, weights, met))


def teacher_space(s2t_hidden, teacher_hidden, head, labels, temperature, kd_rate, weights):
    """α · w · KL(softmax(z_t/T) ‖ softmax(z_s2t/T)), summed over the teacher's valid positions.

    s2t_hidden, teacher_hidden: (N_t, d_t); head (V_t, d_t); labels, weights w: (N_t,) → loss, s2t_kd_loss, s2t_acc
    """
    def chunk(z_s2t, z_t, y, weights):
        kl = weights * divergence("forward_kl", z_s2t, z_t, temperature)
        return {"s2t_kd_loss": kl, "s2t_acc": (z_s2t.argmax(-1) == y) * (weights > 0), "loss": kd_rate * kl}
    return sums(in_chunks(chunk, [(s2t_hidden, head.detach()), (teacher_hidden.detach(), head.detach())], labels, weights))


def _both_spaces(at_student: dict, at_teacher: dict) -> dict[str, torch.Tensor]:
    """The parts of both, with their losses added."""
    parts = at_student | at_teacher | {"loss": at_student["loss"] + at_teacher["loss"]}
    return parts | {"kd_loss": parts["t2s_ce_loss"] + parts["t2s_kd_loss"] + parts["s2t_kd_loss"]}


def dskd(student_hidden, student_head, teacher_hidden, teacher_head, labels, projectors, name, temperature, kd_rate):
    """DSKD over a shared vocabulary, summed: positions correspond one to one, so no attention is needed.

    student_hidden (N, d_s), teacher_hidden (N, d_t), labels (N,) → the parts of student_space and teacher_space, kd_loss.
    """
    ones = torch.ones_like(labels, dtype=torch.float32)
    return _both_spaces(
        student_space(student_hidden, projectors.t2s(teacher_hidden), student_head, labels, name, temperature, kd_rate, "always", ones, ones),
        teacher_space(projectors.s2t(student_hidden), teacher_hidden, teacher_head, labels, temperature, kd_rate, ones))


# ------------------------------------------------------------------------------- cross-model attention, and the probes

class Aligned(NamedTuple):
    """What was found between the two sides of a batch, on their grids of valid positions."""
    teacher_label_embed: torch.Tensor       # (B, T, d_t), E_t(y_t)
    weights: torch.Tensor                   # (B, S, T), how much of each teacher position a student position takes
    back: torch.Tensor                      # (B, T, S), how much of each student position a teacher position takes
    queries: torch.Tensor | None            # (B, S, 2 d_t); None for chunk_mean
    keys: torch.Tensor                      # (B, T, 2 d_t)


def mixing_weights(alignment: str, queries, keys, student_valid: Valid, teacher_valid: Valid, same_chunk=None):
    """How positions are mixed → student from teacher (B, S, T), teacher from student (B, T, S); each row sums to 1.

    attention (CMA): softmax over the rows of A, and of Aᵀ; A = Q Kᵀ / √(2 d_t), −1e5 where either side is not valid.
    chunk_attention (CLA): A is also −1e5 outside same_chunk, M (B, S, T). chunk_mean (CLP): M over its rows' sums.
    A row whose chunk has nothing on the other side (a text that was cut there) is all zeros; it has no part in the losses
    between the two sides.
    """
    both = student_valid.mask[:, :, None] & teacher_valid.mask[:, None, :]
    allowed = both if alignment == "attention" else both & same_chunk
    if alignment == "chunk_mean":
        inside = allowed.float()
        return tuple(m / m.sum(-1, keepdim=True).clamp(min=1) for m in (inside, inside.transpose(1, 2)))
    scores = (queries @ keys.transpose(1, 2) / keys.size(-1) ** 0.5).masked_fill(~allowed, -1e5)
    weights, back = scores.softmax(-1), scores.transpose(1, 2).softmax(-1)
    return (weights, back) if alignment == "attention" else (weights * allowed, back * allowed.transpose(1, 2))


def align(batch, student_valid: Valid, teacher_valid: Valid, student_embed, teacher_embed, projectors, alignment: str) -> Aligned:
    """What each position takes from the other side. Only the embeddings, detached, and P_q are needed for it.

    batch, student_embed, teacher_embed, alignment: as in dskd_cma.
    """
    with torch.no_grad():
        student_pair = torch.cat([student_embed(student_valid.grid(batch["student_ids"])),
                                  student_embed(student_valid.grid(batch["student_labels"]))], -1)
        label_embed = teacher_embed(teacher_valid.grid(batch["teacher_labels"]))
        keys = torch.cat([teacher_embed(teacher_valid.grid(batch["teacher_ids"])), label_embed], -1)
        keys = keys / teacher_valid.deviation(keys)
    queries = same_chunk = None
    if alignment != "chunk_mean":
        queries = projectors.query(student_pair)
    if alignment != "attention":
        same_chunk = student_valid.grid(batch["student_chunks"])[:, :, None] == teacher_valid.grid(batch["teacher_chunks"])[:, None, :]
    return Aligned(label_embed, *mixing_weights(alignment, queries, keys, student_valid, teacher_valid, same_chunk), queries, keys)


def dskd_cma(batch, student_valid: Valid, teacher_valid: Valid, h_s, student_embed, student_head, h_t, teacher_embed, teacher_head,
             projectors, name, temperature, kd_rate, alignment: str = "attention", entropy_weights: bool = False, ramp: float = 1.0):
    """Dual-space distillation across tokenizers, summed → the loss parts, Aligned.

    batch: student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T) and, for the chunk alignments,
    student_chunks and teacher_chunks, the number of each valid position's chunk. h_s (B, S, d_s) and h_t (B, T, d_t) after
    the final norm, on the grids of valid positions, h_t without gradient; embeddings are modules, heads are weights
    (V, d). The embeddings are detached; standard deviations are over valid positions and all features.
    entropy_weights: DWA-KD's gate and weights, the former times `ramp`.
    """
    found = align(batch, student_valid, teacher_valid, student_embed, teacher_embed, projectors, alignment)
    unit = lambda grid: grid / teacher_valid.deviation(grid)
    t2s_hidden = found.weights @ projectors.t2s(unit(h_t) + unit(found.teacher_label_embed))       # (B, S, d_s)
    s2t_hidden = found.back @ projectors.s2t(h_s)                                                  # (B, T, d_t)
    met_s, met_t = (valid.pack(mixture.detach().sum(-1) > 0).float() for valid, mixture in ((student_valid, found.weights), (teacher_valid, found.back)))
    packed_s, packed_t = student_valid.pack(h_s), teacher_valid.pack(h_t)
    if entropy_weights:         # w_s = H(softmax z_s), w_t = 1 − H(softmax z_t) / ln V_t, each with mean 1 in a sequence
        w_s = ramp * student_valid.mean_one(entropies(packed_s, student_head))
        w_t = teacher_valid.mean_one((1 - entropies(packed_t, teacher_head) / math.log(len(teacher_head))).clamp(0, 1))
    else:
        w_s, w_t = torch.ones_like(met_s), torch.ones_like(met_t)
    parts = _both_spaces(
        student_space(packed_s, student_valid.pack(t2s_hidden), student_head, student_valid.labels, name, temperature, kd_rate,
                      "confidence" if entropy_weights else "right", w_s, met_s),
        teacher_space(teacher_valid.pack(s2t_hidden), packed_t, teacher_head, teacher_valid.labels, temperature, kd_rate, w_t * met_t))
    return parts, found
