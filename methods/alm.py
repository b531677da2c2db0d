"""Approximate likelihood matching (ALM, arXiv 2503.20083): two tokenizers meet at the chunks of
text that both cut out.

With log p(c), the sum of the label log-probabilities of a chunk's tokens, a = log p_t(c) / τ and
b = log p_s(c) / τ:

    KD = τ Σ_c  e^a (a − b) + (1 − e^a) (log(1 − e^a) − log(1 − e^b))

τ = 100 is the release's, 1 is the plain binary KL of "this chunk" and "any other". The release also
merges chunks until a space is likely to follow, which this does not."""

import torch

from methods import Method
from methods.blocks import cross_entropy, in_whole_rows, student_side, teacher_side, token_nll
from methods.shared_tokens import ChunksOfBatch

SMALLEST = 1e-6  # taken off a and b: of a certain chunk, log(1 − e^b) would be infinite


def binary_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """The term of each chunk, from its two log-likelihoods: (C,), (C,) → (C,)."""
    a = teacher.clamp(max=0) / temperature - SMALLEST
    b = student.clamp(max=0) / temperature - SMALLEST
    rest_a, rest_b = -torch.expm1(a), -torch.expm1(b)  # 1 − e^a, 1 − e^b
    return temperature * (a.exp() * (a - b) + rest_a * (rest_a.log() - rest_b.log()))


def alm(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    chunks, num_chunks = batch["student_batch_chunks"], batch["num_chunks"]
    nll_t = token_nll(t.hidden, t.head, t.labels)
    log_p_t = nll_t.new_zeros(num_chunks + 1)  # of each chunk
    log_p_t = log_p_t.index_add(0, batch["teacher_batch_chunks"], -nll_t)

    def block_loss(block, of_teacher, z_s):
        terms = cross_entropy(z_s, s.labels[block])
        nll_s = terms["nll_loss"]
        here, inverse = chunks[block].unique(return_inverse=True)
        log_p_s = nll_s.new_zeros(len(here)).index_add(0, inverse, -nll_s)
        shared = here < num_chunks
        terms["kd_loss"] = binary_kl(log_p_t[here], log_p_s, objective.options.temperature) * shared
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    total, sums = in_whole_rows(block_loss, s, t)
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=alm,
    batch_extras=ChunksOfBatch,
    defaults=dict(temperature=100.0),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
