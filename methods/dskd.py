"""Dual-space distillation (DSKD, arXiv 2406.17328) over one vocabulary, where positions correspond
one to one.

    z_t2s = sg(W_s) P_t2s(h_t)      z_s2t = W_t P_s2t(h_s)
    KD = CE(z_t2s, y_s) + D(z_s, sg z_t2s) + KL(softmax(z_t/T) ‖ softmax(z_s2t/T))
"""

from functools import partial

from cma import both_spaces, make_modules
from methods import Method
from methods.blocks import student_side, teacher_side


def dskd(batch, student, teacher, modules, objective):
    """→ total, and the terms of cma.both_spaces."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    projectors = modules["projectors"]
    t2s, s2t = projectors.t2s(t.hidden), projectors.s2t(s.hidden)
    return both_spaces(s, t, t2s, s2t, objective, gate="always")


METHOD = Method(
    loss=dskd,
    make_modules=partial(make_modules, query=False),
    one_vocabulary=True,
    uses=("kd_rate", "temperature", "divergence", "projector_lr", "cache_teacher"),
)
