"""Supervised fine-tuning: cross-entropy on the data. The baseline, and how a teacher is prepared.

    total = CE(z_s, y_s)
"""
from methods import Method
from methods.blocks import cross_entropy, in_blocks, student_side


def sft(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss and accuracy."""
    side = student_side(batch, student)

    def block_loss(block, z_s):
        terms = cross_entropy(z_s, side.labels[block])
        return objective(ce=terms["nll_loss"].sum()), terms

    total, sums = in_blocks(block_loss, [side.hidden], [side.head])
    return total, objective.per_student_token(sums)


METHOD = Method(loss=sft, defaults=dict(kd_rate=0.0), needs_teacher=False)
