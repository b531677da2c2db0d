"""GOLD (General Online Logit Distillation, TRL): whole chunks are compared, token by token where
both vocabularies have the token, else by rank.

P(v) of a chunk, at the position of its first token and given its true other tokens y_2 … y_k:

    P(v) = p(v) · p(y_2) · … · p(y_k)       p = softmax(z/T)
    L = w Σ over shared tokens JSD(P_t, P_s) + (1 − w) Σ over ranks |P_t − P_s| of the others
    KD = Σ over rows  (student tokens of the row) · mean of L over its chunks

with w the shared tokens' share of the teacher's vocabulary; ranks are those of sorted P. EOS is
left to the cross-entropy. TRL takes the mean over rows; its default reads p a position later."""

import torch
import torch.nn.functional as F

from methods import Method
from methods.blocks import cross_entropy, in_whole_rows, student_side, teacher_side
from methods.shared_tokens import SharedTextChunks
from methods.uld import by_rank

SMALLEST = 1e-8


def chunk_probabilities(
    logits: torch.Tensor, labels: torch.Tensor, chunks: torch.Tensor, temperature: float
) -> torch.Tensor:
    """P of every chunk, (C, V), from logits (n, V) and labels at positions whose chunks (n,) stand
    one behind the other."""
    p = (logits.float() / temperature).softmax(-1)
    of_label = p.gather(1, labels[:, None]).squeeze(1).clamp(min=SMALLEST).log()
    first = torch.ones_like(chunks, dtype=torch.bool)
    first[1:] = chunks[1:] != chunks[:-1]
    number = first.long().cumsum(0) - 1
    others = of_label.new_zeros(int(first.sum())).index_add(0, number, of_label * ~first)
    return p[first] * others.exp()[:, None]


def js(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """½ Σ p log(p/m) + ½ Σ q log(q/m), m = (p + q) / 2: (C, K), (C, K) → (C,)."""
    p, q = p.clamp(min=SMALLEST), q.clamp(min=SMALLEST)
    log_m = ((p + q) / 2).log()
    return 0.5 * (p * (p.log() - log_m) + q * (q.log() - log_m)).sum(-1)


def gold(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    temperature, num_chunks = objective.options.temperature, batch["num_chunks"]
    shared_s, shared_t = batch["shared"]
    others_s = torch.ones(len(s.head), dtype=torch.bool, device=s.head.device)
    others_t = torch.ones(len(t.head), dtype=torch.bool, device=t.head.device)
    others_s[shared_s], others_t[shared_t] = False, False
    w = len(shared_t) / len(t.head)

    def block_loss(block, of_teacher, z_s):
        terms = cross_entropy(z_s, s.labels[block])
        with torch.no_grad():
            z_t = F.linear(t.hidden[of_teacher], t.head)
        chunks_s = batch["student_batch_chunks"][block]
        chunks_t = batch["teacher_batch_chunks"][of_teacher]
        in_s, in_t = chunks_s < num_chunks, chunks_t < num_chunks
        labels_s, labels_t = s.labels[block][in_s], t.labels[of_teacher][in_t]
        P_s = chunk_probabilities(z_s[in_s], labels_s, chunks_s[in_s], temperature)
        P_t = chunk_probabilities(z_t[in_t], labels_t, chunks_t[in_t], temperature)
        loss = w * js(P_t[:, shared_t], P_s[:, shared_s])
        loss = loss + (1 - w) * by_rank(P_s[:, others_s], P_t[:, others_t])
        terms["kd_loss"] = batch["chunk_weights"][chunks_s[in_s].unique()] * loss
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    total, sums = in_whole_rows(block_loss, s, t)
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=gold,
    batch_extras=SharedTextChunks,
    defaults=dict(temperature=1.0),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
