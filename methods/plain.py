"""DSKD-CMA-GA (arXiv 2603.22056) as its equations stand: the method in one function. Begin here.

All logits, every position, no blocks. dskd_cma_ga.py gives the same loss and gradients from the
response positions alone, in a fraction of the time and memory: a test and `python -m tools.bench`
show both.

x: input tokens, y: labels, E: embeddings, h: final hidden states, W: head, z = W h: logits;
s: student, t: teacher; t2s: from the teacher's to the student's space, s2t: the other way.
σ: standard deviation over the response positions."""

import torch
import torch.nn.functional as F

from discriminator import reverse_gradient


def dskd_cma_ga(batch, student, teacher, projectors, adversary, α=0.5, λ_GA=0.1, temperature=2.0):
    """The total of one batch that is a whole optimizer step.

    batch: student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T); a label is the
    next token, or −100 on the prompt and on padding. student, teacher: .embed, .head and
    forward(ids) → h. projectors: cma.Projectors; adversary: discriminator.Discriminator."""
    x_s, y_s = batch["student_ids"], batch["student_labels"]
    x_t, y_t = batch["teacher_ids"], batch["teacher_labels"]
    mask_s, mask_t = y_s != -100, y_t != -100
    y_s, y_t = y_s.clamp(min=0), y_t.clamp(min=0)
    n_s = mask_s.sum()

    h_s = student(x_s)  # (B, S, d_s)
    with torch.no_grad():
        h_t = teacher(x_t)  # (B, T, d_t)
        e_s = torch.cat([student.embed(x_s), student.embed(y_s)], -1)  # (B, S, 2 d_s)
        e_t = torch.cat([teacher.embed(x_t), teacher.embed(y_t)], -1)  # (B, T, 2 d_t)
        y_embed = teacher.embed(y_t)
        K = e_t / e_t[mask_t].std()
        v_t = h_t / h_t[mask_t].std() + y_embed / y_embed[mask_t].std()

    Q = projectors.query(e_s)  # (B, S, 2 d_t)
    A = Q @ K.mT / K.size(-1) ** 0.5  # (B, S, T)
    A = A.masked_fill(~(mask_s[:, :, None] & mask_t[:, None, :]), -1e5)
    t2s = A.softmax(-1) @ projectors.t2s(v_t)  # (B, S, d_s)
    s2t = A.mT.softmax(-1) @ projectors.s2t(h_s)  # (B, T, d_t)

    z_s = student.head(h_s)[mask_s]
    z_t = teacher.head(h_t)[mask_t]
    z_t2s = F.linear(t2s, student.head.weight.detach())[mask_s]
    z_s2t = F.linear(s2t, teacher.head.weight.detach())[mask_t]
    y_s = y_s[mask_s]

    def kl(target, z):  # KL(softmax(target/T) ‖ softmax(z/T)) at each position
        p_log = (target.detach() / temperature).log_softmax(-1)
        q_log = (z / temperature).log_softmax(-1)
        return (p_log.exp() * (p_log - q_log)).sum(-1)

    CE = F.cross_entropy(z_s, y_s, reduction="sum") / n_s
    right = z_t2s.argmax(-1) == y_s
    KD = F.cross_entropy(z_t2s, y_s, reduction="sum")
    KD = KD + (right * kl(z_t2s, z_s)).sum() + kl(z_t, z_s2t).sum()
    KD = KD / n_s
    key_logits = adversary(K[mask_t])
    query_logits = adversary(reverse_gradient(Q[mask_s]))
    GA = F.softplus(-key_logits).mean() + F.softplus(query_logits).mean()  # BCE: keys 1, queries 0
    return (1 - α) * CE + α * KD + λ_GA * GA
