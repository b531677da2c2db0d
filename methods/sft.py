"""Supervised fine-tuning: cross-entropy on the data. The baseline, and how a teacher is prepared.

total = CE(z_s, y_s)
"""

from methods import Method
from methods.blocks import Side, cross_entropy, in_blocks, student_side


def label_loss(side: Side, objective):
    """CE of the student's side → its part of the total, sums of nll_loss and accuracy."""

    def block_loss(block, z_s):
        terms = cross_entropy(z_s, side.labels[block])
        return objective(ce=terms["nll_loss"].sum()), terms

    return in_blocks(block_loss, [side.hidden], [side.head])


def sft(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss and accuracy."""
    total, sums = label_loss(student_side(batch, student), objective)
    return total, objective.per_student_token(sums)


METHOD = Method(loss=sft, defaults=dict(kd_rate=0.0), needs_teacher=False)
