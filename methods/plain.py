"""DSKD-CMA-GA (arXiv 2603.22056) as its equations stand: the method in one function. Begin here.

All logits, every position, no chunks, no packing. What train.py runs (from table.py on) gives the same loss and
gradients from valid positions alone, in a fraction of the time and memory: a test and `python -m tools.bench` say so.

x: input tokens, y: labels, E: embeddings, h: final hidden states, W: head, z = W h: logits; s: student, t: teacher;
t2s: from the teacher to the student's space, s2t: the other way. σ: standard deviation over the valid positions."""
import torch
import torch.nn.functional as F

from discriminator import reverse_gradient

def dskd_cma_ga(batch, student, teacher, projectors, adversary, α=0.5, λ_GA=0.1, T=2.0):
    """The total loss of one batch whose tokens are all of the step's.
    batch: student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T); a label is the next token, or −100
    where that belongs to the prompt or is padding. student, teacher: .embed, .head and forward(ids) → h after the final
    norm. projectors: methods.dual_space.Projectors; adversary: discriminator.Discriminator."""
    x_s, y_s, x_t, y_t = (batch[name] for name in ("student_ids", "student_labels", "teacher_ids", "teacher_labels"))
    valid_s, valid_t = y_s != -100, y_t != -100
    y_s, y_t = y_s.clamp(min=0), y_t.clamp(min=0)
    n_s = valid_s.sum()

    def unit(v):                                                                # v / σ
        return v / v[valid_t].float().std()

    h_s = student(x_s)                                                          # (B, S, d_s)
    with torch.no_grad():                                                       # the teacher, and what attention sees
        h_t = teacher(x_t)                                                      # (B, T, d_t)
        e_s = torch.cat([student.embed(x_s), student.embed(y_s)], -1)           # (B, S, 2 d_s)
        K = unit(torch.cat([teacher.embed(x_t), teacher.embed(y_t)], -1))       # (B, T, 2 d_t)
        v_t = unit(h_t) + unit(teacher.embed(y_t))
    Q = projectors.query(e_s)                                                   # (B, S, 2 d_t)
    both = valid_s[:, :, None] & valid_t[:, None, :]
    A = (Q @ K.transpose(1, 2) / K.size(-1) ** 0.5).masked_fill(~both, -1e5)    # (B, S, T)
    t2s = A.softmax(-1) @ projectors.t2s(v_t)                                   # (B, S, d_s)
    s2t = A.transpose(1, 2).softmax(-1) @ projectors.s2t(h_s)                   # (B, T, d_t)

    z_s, z_t = student.head(h_s).float()[valid_s], teacher.head(h_t).float()[valid_t]
    z_t2s = F.linear(t2s, student.head.weight.detach()).float()[valid_s]
    z_s2t = F.linear(s2t, teacher.head.weight.detach()).float()[valid_t]
    y_s = y_s[valid_s]

    def kl(target, z):                                      # KL(softmax(target/T) ‖ softmax(z/T)) at each position
        return F.kl_div((z / T).log_softmax(-1), (target.detach() / T).log_softmax(-1), log_target=True,
                        reduction="none").sum(-1)

    CE = F.cross_entropy(z_s, y_s, reduction="sum") / n_s
    right = z_t2s.argmax(-1) == y_s
    KD = (F.cross_entropy(z_t2s, y_s, reduction="sum") + (right * kl(z_t2s, z_s)).sum() + kl(z_t, z_s2t).sum()) / n_s
    is_key, is_query = adversary(K[valid_t]).float(), adversary(reverse_gradient(Q[valid_s])).float()
    GA = F.softplus(-is_key).mean() + F.softplus(is_query).mean()               # BCE with 1 for keys and 0 for queries
    return (1 - α) * CE + α * KD + λ_GA * GA
