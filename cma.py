"""Dual-space knowledge distillation: the losses of DSKD (arXiv 2406.17328) and its cross-model attention (CMA).

Names as in the paper: query, key, value; t2s: the teacher's states projected into the student's space, s2t: the other
way; h: final hidden states; W: head; z = W h: logits; "valid" positions have a response token or EOS as their label.

    Q = P_q([E_s(x_s); E_s(y_s)])    K = [E_t(x_t); E_t(y_t)] / σ_K    A = Q Kᵀ / √(2 d_t)
    z_t2s = sg(W_s) softmax_rows(A) P_t2s(h_t/σ_h + E_t(y_t)/σ_y)      z_s2t = W_t softmax_rows(Aᵀ) P_s2t(h_s)

Notable here:
- every loss is returned by name as a SUM over valid positions; the caller divides by n, the number of valid student
  tokens in the whole optimizer step, so that neither padding nor the split into micro-batches changes a token's weight;
- attention lives on (B, S, T) of valid positions only; the heads run on packed valid positions, a chunk at a time,
  recomputed in the backward pass: no tensor of shape (B, T, V) ever exists.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

METHODS = {
    "sft": "cross-entropy on the data, no teacher",
    "kd": "divergence between the two models' outputs (same vocabulary)",
    "dskd": "distillation in both models' spaces (same vocabulary)",
    "dskd_cma": "dskd over cross-model attention (any two vocabularies)",
    "dskd_cma_ga": "dskd_cma with keys and queries matched by an adversary",
}
DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")
CHUNK = 512         # positions whose logits exist at one time


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

    labels: (B, T), −100 where not valid. `mask` (B, L) is true on the grid's real cells; a row's valid positions come
    first, in order, and L is the largest number of them in a row.
    """

    def __init__(self, labels: torch.Tensor):
        is_valid = labels != -100
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


# ------------------------------------------------------------------------------------------------------- projectors

class Projectors(nn.Module):
    """P_t2s: d_t → d_s, P_s2t: d_s → d_t and, with query=True, P_q: 2 d_s → 2 d_t. Linear layers with bias."""

    def __init__(self, student_size: int, teacher_size: int, query: bool):
        super().__init__()
        self.t2s = nn.Linear(teacher_size, student_size)
        self.s2t = nn.Linear(student_size, teacher_size)
        self.query = nn.Linear(2 * student_size, 2 * teacher_size) if query else None


# ----------------------------------------------------------------------------------------------- the heads, chunked

def _in_chunks(function, *tensors) -> dict[str, torch.Tensor]:
    """Sum function(*chunk) over chunks of CHUNK positions, each recomputed in the backward pass."""
    total = {}
    for parts in zip(*(t.split(CHUNK) for t in tensors)):
        # a single chunk is not worth computing twice
        result = function(*parts) if len(tensors[0]) <= CHUNK else checkpoint(function, *parts, use_reentrant=False)
        for name, value in result.items():
            total[name] = total[name] + value if name in total else value
    return total


def _nll(z, labels):
    """Cross-entropy and the number of right first guesses, both summed over the positions."""
    return {"nll_loss": F.cross_entropy(z, labels, reduction="sum"), "accuracy": (z.argmax(-1) == labels).sum()}


def sft(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """CE(W h, y), summed: hidden (N, d), head (V, d), labels (N,) → nll_loss, accuracy (a count)."""
    return _in_chunks(lambda h, y: _nll(F.linear(h, head).float(), y), hidden, labels)


def kd(student_hidden, student_head, teacher_hidden, teacher_head, labels, name, temperature):
    """CE and D(z_s, sg z_t) over a shared vocabulary, summed → nll_loss, accuracy, kd_loss.

    student_hidden (N, d_s), student_head (V, d_s), teacher_hidden (N, d_t), teacher_head (V_t, d_t), labels (N,).
    """
    def chunk(h_s, h_t, y):
        z_s = F.linear(h_s, student_head).float()
        z_t = F.linear(h_t, teacher_head).detach()
        vocabulary = min(z_s.size(-1), z_t.size(-1))        # one may be padded beyond the tokenizer
        kd_loss = divergence(name, z_s[:, :vocabulary], z_t[:, :vocabulary], temperature).sum()
        return _nll(z_s, y) | {"kd_loss": kd_loss}
    return _in_chunks(chunk, student_hidden, teacher_hidden, labels)


def student_space(student_hidden, t2s_hidden, head, labels, name, temperature, gate: bool):
    """What is learned in the student's space, summed: CE of the student, CE of z_t2s, and D(z_s, sg z_t2s).

    student_hidden, t2s_hidden: (N, d_s); head (V_s, d_s) gets no gradient through z_t2s; labels (N,).
    gate: D counts only where z_t2s ranks the label first (METHODS, dskd_cma).
    → nll_loss, accuracy, t2s_ce_loss, t2s_kd_loss, t2s_acc (a count), max_t2s_prob (a sum)
    """
    def chunk(h_s, h_t2s, y):
        z_s = F.linear(h_s, head).float()
        z_t2s = F.linear(h_t2s, head.detach()).float()
        right = z_t2s.argmax(-1) == y
        distance = divergence(name, z_s, z_t2s.detach(), temperature)
        return _nll(z_s, y) | {
            "t2s_ce_loss": F.cross_entropy(z_t2s, y, reduction="sum"),
            "t2s_kd_loss": (distance * right if gate else distance).sum(),
            "t2s_acc": right.sum(),
            "max_t2s_prob": z_t2s.detach().softmax(-1).amax(-1).sum()}
    return _in_chunks(chunk, student_hidden, t2s_hidden, labels)


def teacher_space(s2t_hidden, teacher_hidden, head, labels, temperature):
    """KL(softmax(z_t/T) ‖ softmax(z_s2t/T)), summed over the teacher's valid positions.

    s2t_hidden, teacher_hidden: (N_t, d_t); head (V_t, d_t); labels (N_t,) → s2t_kd_loss, s2t_acc (a count)
    """
    def chunk(h_s2t, h_t, y):
        z_s2t = F.linear(h_s2t, head).float()
        z_t = F.linear(h_t, head).detach()
        return {"s2t_kd_loss": divergence("forward_kl", z_s2t, z_t, temperature).sum(),
                "s2t_acc": (z_s2t.argmax(-1) == y).sum()}
    return _in_chunks(chunk, s2t_hidden, teacher_hidden, labels)


def dskd(student_hidden, student_head, teacher_hidden, teacher_head, labels, projectors, name, temperature):
    """DSKD over a shared vocabulary, summed: positions correspond one to one, so no attention is needed.

    student_hidden (N, d_s), teacher_hidden (N, d_t), labels (N,) → the parts of student_space and teacher_space.
    """
    parts = student_space(student_hidden, projectors.t2s(teacher_hidden), student_head, labels, name, temperature, gate=False)
    return parts | teacher_space(projectors.s2t(student_hidden), teacher_hidden, teacher_head, labels, temperature)


# -------------------------------------------------------------------------------------------- cross-model attention

def keys_and_queries(batch, student_embed, teacher_embed, projectors, student_valid, teacher_valid):
    """K = [E_t(x_t); E_t(y_t)] / σ_K, (B, T, 2 d_t), a constant, and Q = P_q([E_s(x_s); E_s(y_s)]), (B, S, 2 d_t), on the
    grids of valid positions. The embeddings are detached; σ_K is taken over valid positions and all features.
    Also returns E_t(y_t), (B, T, d_t)."""
    with torch.no_grad():
        student_pair = torch.cat([student_embed(student_valid.grid(batch["student_ids"])),
                                  student_embed(student_valid.grid(batch["student_labels"]))], -1)
        label_embed = teacher_embed(teacher_valid.grid(batch["teacher_labels"]))
        keys = torch.cat([teacher_embed(teacher_valid.grid(batch["teacher_ids"])), label_embed], -1)
        keys = keys / teacher_valid.pack(keys).float().std()
    return keys, projectors.query(student_pair), label_embed


def attention_scores(queries: torch.Tensor, keys: torch.Tensor, student_valid: "Valid", teacher_valid: "Valid"):
    """A = Q Kᵀ / √(2 d_t), (B, S, T), −1e5 where either side has no position."""
    scores = queries @ keys.transpose(1, 2) / keys.size(-1) ** 0.5
    both = student_valid.mask[:, :, None] & teacher_valid.mask[:, None, :]
    return scores.masked_fill(~both, -1e5)


def dskd_cma(batch, student_hidden, student_embed, student_head, teacher_hidden, teacher_embed, teacher_head, projectors,
             name, temperature):
    """DSKD with cross-model attention, summed → the loss parts, the packed keys (N_t, 2 d_t) and queries (N_s, 2 d_t).

    batch: student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T). student_hidden (B, S, d_s) and
    teacher_hidden (B, T, d_t) after the final norm, the teacher's without gradient; embeddings are modules, heads are
    weights (V, d).
    """
    student_valid, teacher_valid = Valid(batch["student_labels"]), Valid(batch["teacher_labels"])
    h_s, h_t = student_valid.grid(student_hidden), teacher_valid.grid(teacher_hidden)
    keys, queries, label_embed = keys_and_queries(batch, student_embed, teacher_embed, projectors, student_valid, teacher_valid)
    scores = attention_scores(queries, keys, student_valid, teacher_valid)

    deviation = lambda grid: teacher_valid.pack(grid).float().std()
    values = projectors.t2s(h_t / deviation(h_t) + label_embed / deviation(label_embed))
    t2s_hidden = scores.softmax(-1) @ values                                             # (B, S, d_s)
    s2t_hidden = scores.transpose(1, 2).softmax(-1) @ projectors.s2t(h_s)                # (B, T, d_t)

    parts = student_space(student_valid.pack(h_s), student_valid.pack(t2s_hidden), student_head,
                          batch["student_labels"][batch["student_labels"] != -100], name, temperature, gate=True)
    parts |= teacher_space(teacher_valid.pack(s2t_hidden), teacher_valid.pack(h_t), teacher_head,
                           batch["teacher_labels"][batch["teacher_labels"] != -100], temperature)
    return parts, teacher_valid.pack(keys), student_valid.pack(queries)


# ------------------------------------------------------------------------------------------------------- the method

def distill(method, batch, student, teacher, projectors, name, temperature):
    """Forward both models and compute a method's loss parts → (parts, keys or None, queries or None).

    student and teacher have .embed, .head and forward(ids) → hidden. The parts are sums; nll_loss and, but for sft,
    kd_loss are always among them.
    """
    student_hidden = student(batch["student_ids"])
    valid = batch["student_labels"] != -100
    labels = batch["student_labels"][valid]
    if method == "sft":
        return sft(student_hidden[valid], student.head.weight, labels), None, None
    with torch.no_grad():
        teacher_hidden = teacher(batch["teacher_ids"])
    if method == "kd":
        return kd(student_hidden[valid], student.head.weight, teacher_hidden[valid], teacher.head.weight, labels, name,
                  temperature), None, None
    if method == "dskd":
        parts, keys, queries = dskd(student_hidden[valid], student.head.weight, teacher_hidden[valid], teacher.head.weight,
                                    labels, projectors, name, temperature), None, None
    else:
        parts, keys, queries = dskd_cma(batch, student_hidden, student.embed, student.head.weight, teacher_hidden,
                                        teacher.embed, teacher.head.weight, projectors, name, temperature)
    parts["kd_loss"] = parts["t2s_ce_loss"] + parts["t2s_kd_loss"] + parts["s2t_kd_loss"]
    return parts, keys, queries
