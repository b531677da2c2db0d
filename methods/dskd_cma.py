"""DSKD with cross-model attention (arXiv 2406.17328), for any two tokenizers: see cma.py."""

from cma import cross_model_loss, make_modules
from methods import Method
from methods.blocks import student_side, teacher_side


def dskd_cma(batch, student, teacher, modules, objective):
    """→ total, and the terms of cma.both_spaces."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    total, terms, _ = cross_model_loss(s, t, modules, objective)
    return total, terms


USES = (
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
METHOD = Method(loss=dskd_cma, make_modules=make_modules, uses=USES)
