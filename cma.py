"""Cross-model attention (CMA): how a teacher's positions reach those of a student who cuts the text into other tokens.

Names as in the papers (DSKD, arXiv 2406.17328; DSKD-CMA-GA, 2603.22056): query, key, value; x: input tokens, y: labels,
E: embeddings, h: final hidden states, W: head; t2s: from the teacher to the student's space, s2t: the other way.

    Q = P_q([E_s(x_s); E_s(y_s)])    K = [E_t(x_t); E_t(y_t)] / σ_K    A = Q Kᵀ / √(2 d_t)
    z_t2s = sg(W_s) softmax_rows(A) P_t2s(h_t/σ_h + E_t(y_t)/σ_y)      z_s2t = W_t softmax_rows(Aᵀ) P_s2t(h_s)
    KD = CE(z_t2s, y_s) + Σ g · D(z_s, sg z_t2s) + Σ w_t · KL(softmax(z_t/T) ‖ softmax(z_s2t/T))
    g = 1[argmax z_t2s = y_s], w_t = 1;   DWA-KD (2602.21669): g = ramp · max softmax(z_t2s) · w_s, entropy weights w

The value holds the label's embedding E_t(y_t), and a later position of the teacher's has read what the student's is
to say: z_t2s is told its answer. What keeps the answer from it: value h_t/σ_h alone (--value hidden), g = 1 (--gate
always), and an alignment in which a position takes only from those that have read no more of the text than itself, i.e.
whose label begins no later: by attention (--alignment causal), or from the last of them (last_read: no query).

Notable here:
- attention lives on (B, S, T) of valid positions only, S and T being the largest numbers of them in a row, so that no
  loss depends on how far a batch is padded;
- the probes CLP and CLA are the same loss with chunks of text in place of attention, or around it (`mixing_weights`);
- the losses once the states have reached the other side are in methods/dual_space.py."""
import math
from typing import NamedTuple

import torch

from methods.dual_space import Projectors, both_spaces, student_space, teacher_space
from methods.heads import Parts, entropies
from methods.sides import Side

ALIGNMENTS = ("attention", "chunk_attention", "chunk_mean", "causal", "last_read")
WITH_QUERIES = ("attention", "chunk_attention", "causal")

class Aligned(NamedTuple):
    """What was found between the two sides of a batch, on their grids of valid positions."""
    teacher_label_embed: torch.Tensor       # (B, T, d_t), E_t(y_t)
    attention: torch.Tensor                 # (B, S, T), how much of each teacher position a student position takes
    back: torch.Tensor                      # (B, T, S), how much of each student position a teacher position takes
    queries: torch.Tensor | None            # (B, S, 2 d_t); None for chunk_mean
    keys: torch.Tensor                      # (B, T, 2 d_t)

def align(student: Side, teacher: Side, projectors: Projectors, alignment: str) -> Aligned:
    """What each position takes from the other side. Only the embeddings, detached, and P_q are needed for it."""
    with torch.no_grad():
        student_pair = torch.cat([student.embed(student.x), student.embed(student.y)], -1)
        label_embed = teacher.embed(teacher.y)
        keys = torch.cat([teacher.embed(teacher.x), label_embed], -1)
        keys = keys / teacher.valid.deviation(keys)
    queries = projectors.query(student_pair) if alignment in WITH_QUERIES else None
    return Aligned(label_embed, *mixing_weights(alignment, queries, keys, student, teacher), queries, keys)

def mixing_weights(alignment: str, queries, keys, student: Side, teacher: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """How positions are mixed → student from teacher (B, S, T), teacher from student (B, T, S); each row sums to 1.
    attention (CMA): softmax over the rows of A, and of Aᵀ; A is −1e5 where either side is not valid.
    chunk_attention (CLA): A is also −1e5 outside M, the pairs in one chunk. chunk_mean (CLP): M over its rows' sums.
    A row whose chunk has nothing on the other side (a text that was cut there) is all zeros; it has no part in the
    losses between the two sides. causal: A is −1e5 where the other's label begins later. last_read: 1 for the last of
    the positions whose label begins no later."""
    there = back = student.valid.mask[:, :, None] & teacher.valid.mask[:, None, :]        # (B, S, T)
    if alignment in ("causal", "last_read"):
        read_s, read_t = student.starts[:, :, None], teacher.starts[:, None, :]
        there, back = there & (read_t <= read_s), back & (read_s <= read_t)
    elif alignment != "attention":
        there = back = there & (student.chunks[:, :, None] == teacher.chunks[:, None, :])
    allowed = there, back.mT
    if alignment == "last_read":
        return tuple(_last(mask) for mask in allowed)
    if alignment == "chunk_mean":
        return tuple(mask / mask.sum(-1, keepdim=True).clamp(min=1) for mask in allowed)
    scores = queries @ keys.mT / keys.size(-1) ** 0.5
    mixed = tuple(x.masked_fill(~mask, -1e5).softmax(-1) for x, mask in zip((scores, scores.mT), allowed))
    return tuple(x * mask for x, mask in zip(mixed, allowed)) if alignment == "chunk_attention" else mixed

def _last(mask: torch.Tensor) -> torch.Tensor:
    """1 at the last true of each row (B, S, T), zeros where there is none."""
    number = torch.arange(1, mask.size(-1) + 1, device=mask.device) * mask
    return ((number == number.amax(-1, keepdim=True)) & mask).float()

def to_student(found: Aligned, teacher: Side, projectors: Projectors, value: str) -> torch.Tensor:
    """The teacher's states in the student's space, at the student's positions: softmax(A) P_t2s(v), (B, S, d_s).
    value: v is h_t/σ_h ("hidden"), or that and E_t(y_t)/σ_y ("label")."""
    def unit(grid):
        return grid / teacher.valid.deviation(grid)
    v = unit(teacher.hidden)
    if value == "label":
        v = v + unit(found.teacher_label_embed)
    return found.attention @ projectors.t2s(v)

def dskd_cma(student: Side, teacher: Side, projectors: Projectors, options, step: int,
             factors: dict[str, float], byte_terms=None) -> tuple[Parts, Aligned]:
    """Dual-space distillation across tokenizers → the loss parts, and the alignment for what else needs it.
    The embeddings are detached, the teacher's states have no gradient; standard deviations σ are over valid positions
    and all features. options: table.Options; step: optimizer steps done so far; byte_terms: methods/byte_kd.py's."""
    found = align(student, teacher, projectors, options.alignment)
    t2s = to_student(found, teacher, projectors, options.value)         # (B, S, d_s)
    s2t = found.back @ projectors.s2t(student.hidden)                   # (B, T, d_t)
    met_s = student.valid.pack(found.attention.detach().sum(-1) > 0).float()
    met_t = teacher.valid.pack(found.back.detach().sum(-1) > 0).float()
    w_s, w_t = torch.ones_like(met_s), torch.ones_like(met_t)
    if options.weights == "entropy":
        w_s, w_t = entropy_weights(student, teacher)
        w_s = w_s * (min(1.0, (step + 1) / options.ramp_steps) if options.ramp_steps else 1.0)
    return both_spaces(
        student_space(student, student.valid.pack(t2s), options, factors, options.gate, w_s, met_s, byte_terms),
        teacher_space(teacher, teacher.valid.pack(s2t), options, factors, w_t * met_t), factors), found

def entropy_weights(student: Side, teacher: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """DWA-KD's w_s = H(softmax z_s), w_t = 1 − H(softmax z_t) / ln V_t: (N_s,), (N_t,), with mean 1 in a sequence."""
    certainty = 1 - entropies(teacher.packed, teacher.head) / math.log(len(teacher.head))
    return (student.valid.mean_one(entropies(student.packed, student.head)),
            teacher.valid.mean_one(certainty.clamp(0, 1)))
