"""The divergences D between a target p = softmax(z_target / T) and the student's
q = softmax(z_s / T), by name."""

import math

import torch
import torch.nn.functional as F

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
)
SKEW = 0.1  # λ of the two skewed divergences (DistiLLM, arXiv 2402.03898)
TAIL_MASS = 0.5  # adaptive_kl's tail: the unlikeliest tokens with this mass (2404.02657)


def divergence(
    name: str, student_logits: torch.Tensor, target_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """D at each position: (n, V), (n, V) → (n,), in nats, without a factor T²."""
    p_log = F.log_softmax(target_logits.float() / temperature, -1)
    q_log = F.log_softmax(student_logits.float() / temperature, -1)
    if name == "forward_kl":
        return kl(p_log, q_log)
    if name == "reverse_kl":
        return kl(q_log, p_log)
    if name == "js_divergence":
        middle_log = mixture_log(0.5, p_log, q_log)
        return 0.5 * kl(p_log, middle_log) + 0.5 * kl(q_log, middle_log)
    if name == "skewed_forward_kl":
        return kl(p_log, mixture_log(SKEW, p_log, q_log))
    if name == "skewed_reverse_kl":
        return kl(q_log, mixture_log(SKEW, q_log, p_log))
    tail = tail_share(p_log, q_log)  # adaptive_kl
    return (1 - tail) * kl(p_log, q_log) + tail * kl(q_log, p_log)


def kl(a_log: torch.Tensor, b_log: torch.Tensor) -> torch.Tensor:
    """KL(a ‖ b) over the last dimension."""
    return (a_log.exp() * (a_log - b_log)).sum(-1)


def mixture_log(weight: float, a_log: torch.Tensor, b_log: torch.Tensor) -> torch.Tensor:
    """log(weight · a + (1 − weight) · b)"""
    return torch.logaddexp(a_log + math.log(weight), b_log + math.log(1 - weight))


@torch.no_grad()
def tail_share(p_log: torch.Tensor, q_log: torch.Tensor) -> torch.Tensor:
    """The share of Σ |p − q| that lies in p's tail: adaptive_kl's weight of the reverse KL."""
    p, q = p_log.exp(), q_log.exp()
    ascending, order = p.sort(-1)
    in_tail = ascending.cumsum(-1) <= TAIL_MASS
    in_tail = torch.zeros_like(in_tail).scatter(-1, order, in_tail)
    gap = (p - q).abs()
    return (gap * in_tail).sum(-1) / gap.sum(-1).clamp(min=1e-12)
