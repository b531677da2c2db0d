"""Strict one-to-one positions (arXiv 2610.08448): where both sides have read the same bytes and the
same token comes next, the student's likeliest shared tokens are compared.

    KD = Σ over pairs KL(q ‖ p)     q, p: softmax of z_s/T, z_t/T over the TOP shared tokens that
                                    the student finds likeliest, both rescaled to sum to 1
"""

from methods import Method
from methods.blocks import in_blocks, student_side, teacher_side
from methods.divergences import divergence
from methods.sft import label_loss
from methods.shared_tokens import ExactPairs

TOP = 16


def strict(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    at_student, at_teacher = batch["pairs"]
    shared_s, shared_t = batch["shared"]

    def pair_loss(block, z_s, z_t):
        likeliest = z_s.detach().topk(min(TOP, z_s.size(-1))).indices
        q, p = z_s.gather(1, likeliest), z_t.gather(1, likeliest)
        distance = divergence("reverse_kl", q, p, objective.options.temperature)
        return objective(kd=distance.sum()), {"kd_loss": distance}

    ce_total, ce_sums = label_loss(s, objective)
    hidden = [s.hidden[at_student], t.hidden[at_teacher]]
    kd_total, kd_sums = in_blocks(pair_loss, hidden, [s.head[shared_s], t.head[shared_t]])
    return ce_total + kd_total, objective.per_student_token(ce_sums | kd_sums)


METHOD = Method(
    loss=strict,
    batch_extras=ExactPairs,
    defaults=dict(temperature=1.0),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
