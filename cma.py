"""Cross-model attention (CMA): how a teacher's states reach a student that cuts the text into other
tokens, and what they teach it in both models' output spaces.

    Q = P_q([E_s(x_s); E_s(y_s)])       K = [E_t(x_t); E_t(y_t)] / σ_K      A = Q Kᵀ / √(2 d_t)
    z_t2s = sg(W_s) softmax_rows(A) P_t2s(h_t/σ_h + E_t(y_t)/σ_y)
    z_s2t = W_t softmax_rows(Aᵀ) P_s2t(h_s)
    KD = CE(z_t2s, y_s) + Σ g · D(z_s, sg z_t2s) + Σ w · KL(softmax(z_t/T) ‖ softmax(z_s2t/T))

with g = 1[argmax z_t2s = y_s] and w = 1. Names as in the papers (DSKD, arXiv 2406.17328;
DSKD-CMA-GA, 2603.22056): x: input tokens, y: labels, E: embeddings, h: final hidden states,
W: head; s: student, t: teacher; t2s: from the teacher's to the student's space. σ is the standard
deviation over a batch's response positions and all features. The embeddings are detached.

Label leakage: the value holds the label's embedding E_t(y_t), and later teacher states have read
the label; so z_t2s can see the token it predicts (`leak` in the log)."""

import math
from typing import NamedTuple

import torch
import torch.nn as nn

from discriminator import key_query_loss, make_adversary
from methods.blocks import Side, cross_entropy, entropies, in_blocks, student_side, teacher_side
from methods.divergences import divergence


class Projectors(nn.Module):
    """P_t2s: d_t → d_s, P_s2t: d_s → d_t and, where asked for, P_q: 2 d_s → 2 d_t and DWA-KD's
    P_e: d_t → d_s."""

    def __init__(self, student_size: int, teacher_size: int, query: bool, dtw_embed: bool = False):
        super().__init__()
        self.value_over_σ = True  # what t2s reads is h_t/σ_h + …; in dskdv2 it is h_t
        self.t2s = nn.Linear(teacher_size, student_size)
        self.s2t = nn.Linear(student_size, teacher_size)
        self.query = nn.Linear(2 * student_size, 2 * teacher_size) if query else None
        self.dtw_embed = nn.Linear(teacher_size, student_size) if dtw_embed else None


class Alignment(NamedTuple):
    """What each position takes from the other side; padded rows of the two Sides.

    Weights sum to 1 over what they are taken from, or are 0 where a position has no counterpart."""

    t2s_weights: torch.Tensor  # (B, S, T), student from teacher
    s2t_weights: torch.Tensor  # (B, T, S), teacher from student
    queries: torch.Tensor | None  # (B, S, 2 d_t); None for "chunk_mean"
    keys: torch.Tensor  # (B, T, 2 d_t)


def align(
    student: Side, teacher: Side, projectors: Projectors, kind: str = "attention", chunks=None
) -> Alignment:
    """kind: "attention" (CMA): softmax over the rows of A, and of Aᵀ; A is −1e5 on padding.
    "chunk_attention" (CLA): A is −1e5 outside M too, the pairs of positions in one chunk of text.
    "chunk_mean" (CLP): M over its rows' sums; there are no queries.

    chunks: for the last two each position's chunk in its row, packed, ((N_s,), (N_t,)). A row whose
    chunk has nothing on the other side, because a text was cut there, is all zeros."""
    with torch.no_grad():
        student_pair = torch.cat([student.embed(student.inputs), student.embed(student.labels)], -1)
        keys = torch.cat([teacher.embed(teacher.inputs), teacher.embed(teacher.labels)], -1)
        keys = teacher.pad(keys / keys.float().std())  # (B, T, 2 d_t)
    allowed = student.mask[:, :, None] & teacher.mask[:, None, :]  # (B, S, T)
    if kind != "attention":
        student_chunks, teacher_chunks = student.pad(chunks[0]), teacher.pad(chunks[1])
        allowed = allowed & (student_chunks[:, :, None] == teacher_chunks[:, None, :])
    if kind == "chunk_mean":
        t2s = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        s2t = allowed.mT / allowed.mT.sum(-1, keepdim=True).clamp(min=1)
        return Alignment(t2s, s2t, None, keys)
    queries = student.pad(projectors.query(student_pair))  # (B, S, 2 d_t)
    scores = queries @ keys.mT / keys.size(-1) ** 0.5
    scores = scores.masked_fill(~allowed, -1e5)
    t2s, s2t = scores.softmax(-1), scores.mT.softmax(-1)
    if kind == "chunk_attention":
        t2s, s2t = t2s * allowed, s2t * allowed.mT
    return Alignment(t2s, s2t, queries, keys)


def teacher_in_student_space(alignment: Alignment, teacher: Side, projectors: Projectors):
    """softmax(A) P_t2s(h_t/σ_h + E_t(y_t)/σ_y) at the student's positions, (B, S, d_s)."""
    with torch.no_grad():
        hidden, label_embed = teacher.hidden, teacher.embed(teacher.labels)
        value = hidden / hidden.float().std() + label_embed / label_embed.float().std()
    return alignment.t2s_weights @ teacher.pad(projectors.t2s(value))


def both_spaces(
    student: Side,
    teacher: Side,
    t2s: torch.Tensor,
    s2t: torch.Tensor,
    objective,
    gate: str = "right",
    aligned=None,
    weights=None,
):
    """CE(z_s, y_s) and the terms of KD → total, terms for the log.

    t2s (N_s, d_s): the teacher's states in the student's space; s2t (N_t, d_t): the other way.
    gate: g is 1[argmax z_t2s = y] ("right"), 1 ("always"), or DWA-KD's max softmax(z_t2s)
    ("confidence"). aligned: ((N_s,), (N_t,)), false where a position has no counterpart.
    weights: ((N_s,), (N_t,)), which g and w are multiplied by. Both are 1 by default."""
    options = objective.options
    ones = torch.ones_like(student.labels), torch.ones_like(teacher.labels)
    aligned_s, aligned_t = ones if aligned is None else aligned
    weights_s, weights_t = ones if weights is None else weights

    def student_space(block, z_s, z_t2s):
        y, aligned = student.labels[block], aligned_s[block]
        z_s, log_t2s = z_s.float(), z_t2s.float().log_softmax(-1)
        confidence, guess = log_t2s.detach().max(-1)
        confidence, right = confidence.exp(), guess == y
        g = aligned * weights_s[block]
        if gate == "right":
            g = g * right
        elif gate == "confidence":
            g = g * confidence
        distance = divergence(options.divergence, z_s, z_t2s.detach(), options.temperature)
        terms = cross_entropy(z_s, y)
        terms["t2s_ce_loss"] = aligned * -log_t2s.gather(1, y[:, None]).squeeze(1)
        terms["t2s_kd_loss"] = g * distance
        terms["t2s_acc"] = aligned * right
        terms["max_t2s_prob"] = aligned * confidence
        kd = terms["t2s_ce_loss"].sum() + terms["t2s_kd_loss"].sum()
        return objective(ce=terms["nll_loss"].sum(), kd=kd), terms

    def teacher_space(block, z_s2t, z_t):
        y = teacher.labels[block]
        aligned = aligned_t[block]
        distance = divergence("forward_kl", z_s2t, z_t, options.temperature)
        distance = aligned * weights_t[block] * distance
        terms = {
            "s2t_kd_loss": distance,
            "s2t_acc": aligned * (z_s2t.argmax(-1) == y),
            "teacher_acc": z_t.argmax(-1) == y,
        }
        return objective(kd=distance.sum()), terms

    student_total, student_sums = in_blocks(
        student_space, [student.hidden, t2s], [student.head, student.head.detach()]
    )
    teacher_total, teacher_sums = in_blocks(
        teacher_space, [s2t, teacher.hidden], [teacher.head, teacher.head]
    )
    # Of the teacher's positions, too, the loss is divided by the number of the student's.
    student_sums["s2t_kd_loss"] = teacher_sums.pop("s2t_kd_loss")
    student_sums["kd_loss"] = (
        student_sums["t2s_ce_loss"] + student_sums["t2s_kd_loss"] + student_sums["s2t_kd_loss"]
    )
    terms = objective.per_student_token(student_sums) | objective.per_teacher_token(teacher_sums)
    terms["leak"] = terms["t2s_acc"] - terms["teacher_acc"]
    return student_total + teacher_total, terms


def cross_model_loss(
    student: Side,
    teacher: Side,
    modules,
    objective,
    kind: str = "attention",
    chunks=None,
    gate: str = "right",
    weights=None,
):
    """The whole of dskd_cma and its relatives → total, terms for the log, the Alignment."""
    projectors, adversary = modules["projectors"], objective.options.adversary
    alignment = align(student, teacher, projectors, kind, chunks)
    t2s = student.unpad(teacher_in_student_space(alignment, teacher, projectors))
    s2t = teacher.unpad(alignment.s2t_weights @ student.pad(projectors.s2t(student.hidden)))
    aligned = (
        student.unpad(alignment.t2s_weights.detach().sum(-1) > 0),
        teacher.unpad(alignment.s2t_weights.detach().sum(-1) > 0),
    )
    total, terms = both_spaces(student, teacher, t2s, s2t, objective, gate, aligned, weights)
    if adversary != "none":
        ga_total, ga_terms = key_query_loss(
            adversary,
            modules.get("adversary"),
            alignment.keys,
            alignment.queries,
            student,
            teacher,
            objective,
        )
        total, terms = total + ga_total, terms | ga_terms
    return total, terms, alignment


def entropy_weights(student: Side, teacher: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """DWA-KD (arXiv 2602.21669): w_s = H(softmax z_s), w_t = 1 − H(softmax z_t) / ln V_t, each with
    mean 1 in every row: (N_s,), (N_t,)."""
    uncertainty = entropies(student.hidden, student.head)
    certainty = 1 - entropies(teacher.hidden, teacher.head) / math.log(len(teacher.head))
    return (mean_one(uncertainty, student.counts), mean_one(certainty.clamp(0, 1), teacher.counts))


def mean_one(weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rescale packed weights (N,) so that each row's have the mean 1."""
    return torch.cat([row / row.mean().clamp(min=1e-12) for row in weights.split(counts)])


def dskd_cma(batch, student, teacher, modules, objective, kind: str = "attention"):
    """The loss of methods/dskd_cma.py and its relatives → total, terms. kind: of align."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    chunks = batch.get("student_chunks"), batch.get("teacher_chunks")
    total, terms, _ = cross_model_loss(s, t, modules, objective, kind, chunks)
    return total, terms


def make_modules(
    options, student_config, teacher_config, query: bool = True, dtw_embed: bool = False
):
    """{name: module}: the projectors, and the adversary where it has weights."""
    sizes = student_config.hidden_size, teacher_config.hidden_size
    modules = {"projectors": Projectors(*sizes, query, dtw_embed)}
    adversary = make_adversary(options.adversary, 2 * sizes[1])
    if adversary is not None:
        modules["adversary"] = adversary
    return modules


USES = (  # the options of dskd_cma and its relatives
    "kd_rate",
    "temperature",
    "divergence",
    "adversary",
    "ga_weight",
    "ga_lr",
    "projector_init",
    "projector_lr",
    "cache_teacher",
)
