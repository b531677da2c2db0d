"""Universal logit distillation (ULD, arXiv 2402.12030): two vocabularies meet by rank.

    KD = Σ over k, Σ over ranks |p_s − p_t|       p: the k-th response position's softmax, sorted; temperature 1"""
import torch
import torch.nn.functional as F

from methods.heads import Parts, in_chunks
from methods.sides import Side

def common_positions(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The positions k that a row has on both sides, by their numbers in either side's packed list: (2, M). student,
    teacher: (B,), how many valid positions each row has."""
    shorter = torch.minimum(student, teacher)
    rows, k = (torch.arange(int(shorter.max()), device=shorter.device) < shorter[:, None]).nonzero(as_tuple=True)
    return torch.stack([(lengths.cumsum(0) - lengths)[rows] + k for lengths in (student, teacher)])

class CommonPositions:
    """Gives a batch its common positions while it is on the CPU: no step waits for them."""

    def tensors(self, examples) -> dict[str, torch.Tensor]:
        return {"common": common_positions(*(torch.tensor([getattr(example, side).valid for example in examples])
                                             for side in ("student", "teacher")))}

def uld_loss(student: Side, teacher: Side, factors: dict[str, float], common: torch.Tensor | None = None) -> Parts:
    """Summed over the positions k that both responses have; the shorter vocabulary is padded with zeros → kd_loss.
    common: common_positions, where they have been found."""
    def chunk(z_s, z_t):
        p_s, p_t = (z.float().softmax(-1).sort(descending=True).values for z in (z_s, z_t))
        missing = p_t.size(-1) - p_s.size(-1)
        return {"kd_loss": (F.pad(p_s, (0, max(missing, 0))) - F.pad(p_t, (0, max(-missing, 0)))).abs().sum(-1)}
    both = common_positions(student.valid.mask.sum(1), teacher.valid.mask.sum(1)) if common is None else common
    states = [side.packed.index_select(0, at) for side, at in zip((student, teacher), both)]
    return in_chunks(chunk, states, [student.head, teacher.head.detach()], factors)
