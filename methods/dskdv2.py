"""DSKDv2 with exact token alignment (arXiv 2504.11426): the authors' own successor of dskd_cma. No
attention, and no label in the value; the projector learns the teacher's first guesses.

Pairs (i, j): both sides have read the same bytes and read the same next token. g_j = argmax z_t[j],
as a student's token of the same bytes; pairs without one are left out, m are left.

    z_t2s = sg(W_s) P_t2s(h_t[j])           z_s2t = W_t P_s2t(h_s[i])
    KD = (1/m) Σ CE(z_t2s, g_j)
       + the mean of D(z_s[i], sg z_t2s) over the pairs with argmax z_t2s = g_j
       + (1/m) Σ D(z_s2t, z_t[j])

KD is a mean over a batch's pairs; it counts as many tokens as the batch has. P_t2s and P_s2t start
from the shared tokens (methods/projector_init.py); in the release P_s2t follows the student's head,
here it learns."""

import torch
import torch.nn.functional as F

from cma import make_modules
from methods import Method
from methods.blocks import blocks_of, in_blocks, student_side, teacher_side
from methods.divergences import divergence
from methods.sft import label_loss
from methods.shared_tokens import ExactPairs


def make_projectors(options, student_config, teacher_config) -> dict:
    modules = make_modules(options, student_config, teacher_config, query=False)
    modules["projectors"].value_over_σ = False
    return modules


@torch.no_grad()
def teacher_guesses(hidden: torch.Tensor, head: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """g at each position, (N,): the likeliest token as the student's, −1 where it has none."""
    student_token = torch.full((len(head),), -1, device=hidden.device)
    student_token[shared[1]] = shared[0]
    guesses = [
        F.linear(hidden[block], head).argmax(-1) for block in blocks_of(len(hidden), hidden.device)
    ]
    return student_token[torch.cat(guesses)]


def dskdv2(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy, t2s_ce_loss, t2s_kd_loss, s2t_kd_loss, kd_loss, and
    agreement, the share of pairs with argmax z_t2s = g."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    options, projectors = objective.options, modules["projectors"]
    guesses = teacher_guesses(t.hidden[batch["pairs"][1]], t.head, batch["shared"])
    at_student, at_teacher = batch["pairs"][:, guesses >= 0]
    guesses = guesses[guesses >= 0]
    h_s, h_t = s.hidden[at_student], t.hidden[at_teacher]
    t2s, s2t = projectors.t2s(h_t), projectors.s2t(h_s)
    head_s = s.head.detach()
    with torch.no_grad():
        blocks = blocks_of(len(t2s), t2s.device)
        right = [F.linear(t2s[b], head_s).argmax(-1) == guesses[b] for b in blocks]
        right = torch.cat(right).float()
    per_pair = len(s.labels) / max(len(guesses), 1)
    per_right_pair = len(s.labels) / right.sum().clamp(min=1)

    def student_space(block, z_s, z_t2s):
        distance = divergence(options.divergence, z_s, z_t2s.detach(), options.temperature)
        terms = {
            "t2s_ce_loss": per_pair
            * F.cross_entropy(z_t2s.float(), guesses[block], reduction="none"),
            "t2s_kd_loss": per_right_pair * right[block] * distance,
            "agreement": per_pair * right[block],
        }
        return objective(kd=terms["t2s_ce_loss"].sum() + terms["t2s_kd_loss"].sum()), terms

    def teacher_space(block, z_s2t, z_t):
        distance = divergence(options.divergence, z_s2t, z_t, options.temperature)
        terms = {"s2t_kd_loss": per_pair * distance}
        return objective(kd=terms["s2t_kd_loss"].sum()), terms

    ce_total, sums = label_loss(s, objective)
    student_total, student_sums = in_blocks(student_space, [h_s, t2s], [s.head, head_s])
    teacher_total, teacher_sums = in_blocks(teacher_space, [s2t, h_t], [t.head, t.head])
    sums = sums | student_sums | teacher_sums
    sums["kd_loss"] = sums["t2s_ce_loss"] + sums["t2s_kd_loss"] + sums["s2t_kd_loss"]
    return ce_total + student_total + teacher_total, objective.per_student_token(sums)


METHOD = Method(
    loss=dskdv2,
    make_modules=make_projectors,
    batch_extras=ExactPairs,
    defaults=dict(projector_init="shared", projector_lr=5e-4),
    uses=(
        "kd_rate",
        "temperature",
        "divergence",
        "projector_init",
        "projector_lr",
        "on_policy",
        "cache_teacher",
    ),
)
