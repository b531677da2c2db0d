"""Universal logit distillation (ULD, arXiv 2402.12030): two vocabularies meet by rank.

KD = Σ_k Σ_r |p_s − p_t|    k: response positions both sides have; r: ranks; p: sorted softmax
"""

import torch
import torch.nn.functional as F

from methods import Method
from methods.blocks import in_blocks, student_side, teacher_side
from methods.sft import label_loss


def by_rank(p_s: torch.Tensor, p_t: torch.Tensor) -> torch.Tensor:
    """Σ_r |p_s − p_t| of sorted probabilities, the smaller padded: (n, K), (n, L) → (n,)."""
    p_s, p_t = p_s.sort(descending=True).values, p_t.sort(descending=True).values
    size = max(p_s.size(-1), p_t.size(-1))
    p_s = F.pad(p_s, (0, size - p_s.size(-1)))
    p_t = F.pad(p_t, (0, size - p_t.size(-1)))
    return (p_s - p_t).abs().sum(-1)


def uld(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)

    def rank_loss(block, z_s, z_t):
        distance = by_rank(z_s.float().softmax(-1), z_t.float().softmax(-1))
        return objective(kd=distance.sum()), {"kd_loss": distance}

    # The first positions of each row, as many as both sides have.
    both = [min(counts) for counts in zip(s.counts, t.counts)]
    h_s = torch.cat([row[:n] for row, n in zip(s.hidden.split(s.counts), both)])
    h_t = torch.cat([row[:n] for row, n in zip(t.hidden.split(t.counts), both)])
    ce_total, ce_sums = label_loss(s, objective)
    kd_total, kd_sums = in_blocks(rank_loss, [h_s, h_t], [s.head, t.head])
    return ce_total + kd_total, objective.per_student_token(ce_sums | kd_sums)


METHOD = Method(loss=uld, uses=("kd_rate", "on_policy", "cache_teacher"))
