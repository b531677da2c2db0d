"""Universal logit distillation (ULD, arXiv 2402.12030): two vocabularies meet by rank.

    KD = Σ over k, Σ over ranks |p_s − p_t|       p: the k-th response position's softmax, sorted; temperature 1"""
import torch.nn.functional as F

from methods.heads import Parts, in_chunks
from methods.sides import Side

def uld_loss(student: Side, teacher: Side, factors: dict[str, float]) -> Parts:
    """Summed over the positions k that both responses have; the shorter vocabulary is padded with zeros → kd_loss."""
    def chunk(z_s, z_t):
        p_s, p_t = (z.float().softmax(-1).sort(descending=True).values for z in (z_s, z_t))
        missing = p_t.size(-1) - p_s.size(-1)
        return {"kd_loss": (F.pad(p_s, (0, max(missing, 0))) - F.pad(p_t, (0, max(-missing, 0)))).abs().sum(-1)}
    length = min(student.valid.mask.size(1), teacher.valid.mask.size(1))
    both = student.valid.mask[:, :length] & teacher.valid.mask[:, :length]
    states = [side.hidden[:, :length][both] for side in (student, teacher)]
    return in_chunks(chunk, states, [student.head, teacher.head.detach()], factors)
