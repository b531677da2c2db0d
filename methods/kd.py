"""Knowledge distillation (Hinton et al., arXiv 1503.02531) over one vocabulary.

KD = D(z_s, sg z_t)
"""

from methods import Method
from methods.blocks import cross_entropy, in_blocks, student_side, teacher_side
from methods.divergences import divergence


def kd(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    options = objective.options

    def block_loss(block, z_s, z_t):
        size = min(z_s.size(-1), z_t.size(-1))  # a head may be padded beyond the tokenizer
        terms = cross_entropy(z_s, s.labels[block])
        terms["kd_loss"] = divergence(
            options.divergence, z_s[:, :size], z_t[:, :size], options.temperature
        )
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    total, sums = in_blocks(block_loss, [s.hidden, t.hidden], [s.head, t.head])
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=kd,
    one_vocabulary=True,
    uses=("kd_rate", "temperature", "divergence", "on_policy", "cache_teacher"),
)
