"""Distillation in both models' output spaces (DSKD, arXiv 2406.17328): the losses once the states are projected.

    in the student's space     CE(z_t2s, y_s) + Σ g · D(z_s, sg z_t2s)                z_t2s = sg(W_s) t2s
    in the teacher's space     Σ w · KL(softmax(z_t/T) ‖ softmax(z_s2t/T))            z_s2t = W_t s2t

t2s: the teacher's states projected into the student's space, at the student's positions; s2t: the other way. Positions
correspond one to one where both models have one vocabulary (dskd, here), else by attention (cma.py)."""
import torch

from methods.divergences import divergence
from methods.heads import Parts, cross_entropy, in_chunks
from methods.sides import Side

class Projectors(torch.nn.Module):
    """P_t2s: d_t → d_s, P_s2t: d_s → d_t and, where asked for, P_q: 2 d_s → 2 d_t and DWA-KD's P_e: d_t → d_s."""

    def __init__(self, student_size: int, teacher_size: int, query: bool, dtw_embed: bool = False):
        super().__init__()
        self.t2s = torch.nn.Linear(teacher_size, student_size)
        self.s2t = torch.nn.Linear(student_size, teacher_size)
        self.query = torch.nn.Linear(2 * student_size, 2 * teacher_size) if query else None
        self.dtw_embed = torch.nn.Linear(teacher_size, student_size) if dtw_embed else None

def student_space(student: Side, t2s: torch.Tensor, options, factors: dict[str, float], gate: str, weights, met,
                  byte_terms=None) -> Parts:
    """CE(z_s, y_s), and the terms in the student's space. t2s: (N, d_s), packed; weights, met: (N,).
    gate: g is weights times 1 ("always"), 1[argmax z_t2s = y] ("right") or max softmax(z_t2s) ("confidence"). met: 1,
    or 0 where nothing of the teacher's corresponds to a position. byte_terms: of byte_kd.py, for --byte_weight. The
    student's head gets no gradient through z_t2s.
    → nll_loss, accuracy, t2s_ce_loss, t2s_kd_loss, t2s_acc, max_t2s_prob, and byte_loss, weighed"""
    def chunk(z_s, z_t2s, y, weights, met, here):
        z_s, z_t2s = z_s.float(), z_t2s.float()
        log_t2s = z_t2s.log_softmax(-1)
        confidence, guess = log_t2s.detach().max(-1)
        confidence, right = confidence.exp(), guess == y
        g = weights * {"always": 1.0, "right": right, "confidence": confidence}[gate]
        next_bytes = {"byte_loss": options.byte_weight * byte_terms(z_s, here)} if byte_terms else {}
        return cross_entropy(z_s, y) | next_bytes | {
            "t2s_ce_loss": met * -log_t2s.gather(1, y[:, None]).squeeze(1),
            "t2s_kd_loss": met * g * divergence(options.divergence, z_s, z_t2s.detach(), options.temperature),
            "t2s_acc": right * met, "max_t2s_prob": confidence * met}
    t2s = t2s if "t2s_ce_loss" in factors else t2s.detach()         # what its labels alone teach
    return in_chunks(chunk, [student.packed, t2s], [student.head], factors, student.valid.labels, weights, met,
                     lambda here: here)

def teacher_space(teacher: Side, s2t: torch.Tensor, options, factors: dict[str, float], weights) -> Parts:
    """The term in the teacher's space. s2t: (N_t, d_t), packed; weights: (N_t,) → s2t_kd_loss, s2t_acc, teacher_acc"""
    def chunk(z_s2t, z_t, y, weights):
        return {"s2t_kd_loss": weights * divergence("forward_kl", z_s2t, z_t, options.temperature),
                "s2t_acc": (z_s2t.argmax(-1) == y) * (weights > 0), "teacher_acc": z_t.argmax(-1) == y}
    return in_chunks(chunk, [s2t, teacher.packed.detach()], [teacher.head.detach()], factors, teacher.valid.labels,
                     weights)

def both_spaces(at_student: Parts, at_teacher: Parts, factors: dict[str, float]) -> Parts:
    """All parts of both, and kd_loss, the sum of those that have a factor, but for the student's own cross-entropy."""
    parts = at_student | at_teacher
    return parts | {"kd_loss": sum(parts[name] for name in factors if name in parts and name != "nll_loss")}

def dskd(student: Side, teacher: Side, projectors: Projectors, options, factors: dict[str, float]) -> Parts:
    """DSKD over one vocabulary, where positions correspond one to one."""
    ones = torch.ones_like(student.valid.labels, dtype=torch.float32)
    t2s, s2t = projectors.t2s(teacher.packed), projectors.s2t(student.packed)
    return both_spaces(student_space(student, t2s, options, factors, "always", ones, ones),
                       teacher_space(teacher, s2t, options, factors, ones), factors)
