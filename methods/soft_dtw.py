"""Soft dynamic time warping (Cuturi & Blondel, arXiv 1703.01541) and the alignment terms of DWA-KD (arXiv 2602.21669).

    R_ij = c_ij + softmin_γ(R_(i−1)j, R_i(j−1), R_(i−1)(j−1))       softmin_γ(x) = −γ log Σ exp(−x/γ)       SDTW = R_nm
    divergence(a, b) = SDTW(a, b) − ½ SDTW(a, a) − ½ SDTW(b, b)      cost: cosine distance

Notable here: many pairs are computed at once and a whole anti-diagonal at a time, because no two cells of one need each
other. The backward pass is written out: ∂SDTW/∂c_ij is the alignment matrix, the probability that a path drawn from the
Gibbs distribution exp(−cost/γ) goes through (i, j); it takes one more sweep, back from the last cell."""
import torch
import torch.nn.functional as F

FAR = 1e10          # stands for infinity where there is no predecessor; finite, so that nothing becomes 0 · inf

def _skew(x: torch.Tensor) -> torch.Tensor:
    """(N, S, T) → (S + T − 1, N, S): cell (i, j) moves to [i + j, :, i], so that an anti-diagonal is one slice."""
    n, s, t = x.shape
    flat = F.pad(x, (0, s)).reshape(n, s * (t + s))[:, :s * (t + s - 1)]
    return flat.view(n, s, s + t - 1).permute(2, 0, 1).contiguous()

def _unskew(x: torch.Tensor, t: int) -> torch.Tensor:
    """(S + T − 1, N, S) → (N, S, T), the way back."""
    _, n, s = x.shape
    flat = F.pad(x.permute(1, 2, 0).reshape(n, s * (s + t - 1)), (0, s))
    return flat.view(n, s, s + t)[:, :, :t]

def _predecessors(table: torch.Tensor, d: int | slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, S) each: the cells above, left of and diagonal to those of anti-diagonal d, which lies at table[d + 2]."""
    return table[1:-1][d, ..., :-1], table[1:-1][d, ..., 1:], table[:-2][d, ..., :-1]

class _SoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, lengths_a, lengths_b, gamma):
        n, s, t = cost.shape
        cells = _skew(cost) / -gamma
        # −R/γ of cell (i, j) stands at [i + j + 2, :, i + 1]: two empty anti-diagonals and a column before the first
        table, reach = cost.new_full((s + t + 1, n, s + 1), -FAR), torch.empty_like(cells)
        table[0, :, 0] = 0.0
        for d in range(s + t - 1):                      # three operations each, into tables that are there
            above, left, diagonal = _predecessors(table, d)
            torch.logaddexp(above, left, out=reach[d])
            torch.logaddexp(reach[d], diagonal, out=reach[d])
            torch.add(reach[d], cells[d], out=table[d + 2, :, 1:])
        last = (lengths_a + lengths_b, torch.arange(n, device=cost.device), lengths_a)
        ctx.save_for_backward(table, reach, *last)
        ctx.t = t
        return -gamma * table[last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        table, reach, *last = ctx.saved_tensors
        # how much of what flows through a cell came from each of the three: a softmax over them
        shares = [(x - reach).exp() for x in _predecessors(table, slice(None))]
        flow = torch.zeros_like(table)                  # the alignment matrix, laid out like the table
        flow[tuple(last)] = gradient
        for d in range(len(reach) - 1, -1, -1):
            for into, share in zip(_predecessors(flow, d), shares):
                into.addcmul_(share[d], flow[d + 2, :, 1:])
        return _unskew(flow[2:, :, 1:], ctx.t), None, None, None

def sdtw(cost: torch.Tensor, lengths_a: torch.Tensor, lengths_b: torch.Tensor, gamma: float) -> torch.Tensor:
    """SDTW of N pairs of sequences: cost (N, S, T), lengths (N,) from 1 on (the rest of cost is not looked at) → (N,).
    γ > 0, in the cost's unit: towards 0 it is the cost of the best path (hard DTW), larger values average over paths.
    The gradient with respect to cost is the alignment matrix."""
    return _SoftDTW.apply(cost, lengths_a, lengths_b, gamma)

# ------------------------------------------------------------------------------------------- the DTW terms of DWA-KD
def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 − cos: (N, S, d), (N, T, d) → (N, S, T), in float32 at least."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (a, b))
        return 1 - a @ b.transpose(1, 2)

def band_penalty(attention: torch.Tensor, lengths_s: torch.Tensor, lengths_t: torch.Tensor, width: float,
                 entropy: float, penalty: float, blend: float) -> torch.Tensor:
    """What the cross cost is raised by outside a soft band around the attention: (B, S, T), 0 or `penalty`.
    A row a_i of attention (B, S, T) has the entropy H_i (nats) and the centre
    c_i = blend · Σ_j j·a_ij + (1 − blend) · i·len_t/len_s; outside is where |j − c_i| > width + entropy · H_i."""
    rows = attention.detach().float()
    i, j = (torch.arange(size, device=rows.device, dtype=torch.float32) for size in rows.shape[1:])
    straight = i * (lengths_t / lengths_s)[:, None]                                         # (B, S)
    # a row of zeros has no centre of its own; written without @, which autocast would run in bfloat16
    centre = blend * (rows * j).sum(-1) + (1 - blend * rows.sum(-1)) * straight
    reach = width + entropy * torch.special.entr(rows).sum(-1)
    return penalty * ((j - centre[..., None]).abs() > reach[..., None]).float()

def gamma_at(options, step: int) -> float:
    """γ after `step` optimizer steps: linear, then constant."""
    progress = min(1.0, step / options.dtw_gamma_steps) if options.dtw_gamma_steps else 1.0
    return options.dtw_gamma_start + progress * (options.dtw_gamma_end - options.dtw_gamma_start)

def dtw_losses(student, teacher, projectors, aligned, options, step: int) -> dict[str, torch.Tensor]:
    """DWA-KD's two terms, label embeddings and final hidden states, both in the student's space, summed over examples.
    student, teacher: sides.Side; aligned: cma.Aligned; options: dtw_… of table.Options."""
    lengths = student.valid.mask.sum(1), teacher.valid.mask.sum(1)
    outside = band_penalty(aligned.attention, *lengths, options.dtw_band, options.dtw_entropy, options.dtw_penalty,
                           options.dtw_blend)
    pairs = [(student.embed(student.y), projectors.dtw_embed(aligned.teacher_label_embed)),
             (student.hidden, projectors.t2s(teacher.hidden))]
    embed, hidden = dtw_divergences(pairs, *lengths, gamma_at(options, step), outside)
    return {"dtw_embed_loss": embed, "dtw_hidden_loss": hidden}

def dtw_divergences(pairs: list[tuple[torch.Tensor, torch.Tensor]], lengths_s: torch.Tensor, lengths_t: torch.Tensor,
                    gamma: float, cross_penalty: torch.Tensor | float = 0.0) -> list[torch.Tensor]:
    """Σ over examples of SDTW(a, b) − ½ SDTW(a, a) − ½ SDTW(b, b) for each (a, b): (B, S, d) against (B, T, d).
    cross_penalty (B, S, T) is added to the cost between a and b only. All 3 · len(pairs) · B tables run together."""
    costs, lengths_a, lengths_b = [], [], []
    size = max(max(a.size(1), b.size(1)) for a, b in pairs)
    for a, b in pairs:
        for cost in (cosine_distance(a, b) + cross_penalty, cosine_distance(a, a), cosine_distance(b, b)):
            costs.append(F.pad(cost, (0, size - cost.size(2), 0, size - cost.size(1))))
        lengths_a += [lengths_s, lengths_s, lengths_t]
        lengths_b += [lengths_t, lengths_s, lengths_t]
    values = sdtw(torch.cat(costs), torch.cat(lengths_a), torch.cat(lengths_b), gamma)
    cross, self_a, self_b = values.view(len(pairs), 3, -1).sum(-1).unbind(1)
    return list((cross - 0.5 * self_a - 0.5 * self_b).unbind(0))
