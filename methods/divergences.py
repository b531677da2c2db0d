"""The divergences D between a target p = softmax(z_target / T) and the student's q = softmax(z_s / T), by name."""
import math

import torch
import torch.nn.functional as F

from methods.fused import fused

DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl")
SKEW = 0.1              # λ of the two skewed divergences (DistiLLM, arXiv 2402.03898)
TAIL_MASS = 0.5         # adaptive_kl's tail: the least likely tokens with that much probability together (2404.02657)

@fused
def divergence(name: str, student_logits: torch.Tensor, target_logits: torch.Tensor, temperature: float):
    """D at each position: (N, V), (N, V) → (N,), in nats, without a factor T². Raises KeyError for an unknown name."""
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
    if name == "adaptive_kl":
        tail_share = adaptive_share(p_log, q_log)
        return (1 - tail_share) * kl(p_log, q_log) + tail_share * kl(q_log, p_log)
    raise KeyError(name)

def kl(a_log, b_log):
    """KL(a ‖ b) over the last dimension."""
    return (a_log.exp() * (a_log - b_log)).sum(-1)

def mixture_log(weight, a_log, b_log):
    """log(weight · a + (1 − weight) · b)"""
    return torch.logaddexp(a_log + math.log(weight), b_log + math.log(1 - weight))

@torch.no_grad()
def adaptive_share(p_log, q_log):
    """The share of Σ |p − q| that lies in p's tail: adaptive_kl's weight of the reverse KL."""
    p, q = p_log.exp(), q_log.exp()
    ascending, order = p.sort(-1)
    in_tail = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ascending.cumsum(-1) <= TAIL_MASS)
    gap = (p - q).abs()
    return (gap * in_tail).sum(-1) / gap.sum(-1).clamp(min=1e-12)
