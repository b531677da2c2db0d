"""Soft dynamic time warping (Cuturi & Blondel, arXiv 1703.01541).

    R_ij = c_ij + softmin_γ(R_(i−1)j, R_i(j−1), R_(i−1)(j−1))       SDTW = R_nm
    softmin_γ(x) = −γ log Σ exp(−x/γ)
    divergence(a, b) = SDTW(a, b) − ½ SDTW(a, a) − ½ SDTW(b, b)     cost: cosine distance

Many pairs are computed at once, and a whole anti-diagonal at a time, because no two cells of one
need each other. The backward pass is written out: ∂SDTW/∂c_ij is the alignment matrix, the
probability that a path drawn from the Gibbs distribution exp(−cost/γ) goes through (i, j); it takes
one more sweep, back from the last cell."""

import torch
import torch.nn.functional as F

FAR = 1e10  # stands for infinity where a cell has no predecessor; 0 · FAR is still 0


def _skew(x: torch.Tensor) -> torch.Tensor:
    """(N, S, T) → (S + T − 1, N, S): cell (i, j) moves to [i + j, :, i], so that an anti-diagonal
    is one slice."""
    n, s, t = x.shape
    flat = F.pad(x, (0, s)).reshape(n, s * (t + s))[:, : s * (t + s - 1)]
    return flat.view(n, s, s + t - 1).permute(2, 0, 1).contiguous()


def _unskew(x: torch.Tensor, t: int) -> torch.Tensor:
    """(S + T − 1, N, S) → (N, S, T), the way back."""
    _, n, s = x.shape
    flat = F.pad(x.permute(1, 2, 0).reshape(n, s * (s + t - 1)), (0, s))
    return flat.view(n, s, s + t)[:, :, :t]


def _predecessors(table: torch.Tensor, d: int | slice):
    """The cells above, left of and diagonal to those of anti-diagonal d, (N, S) each; d itself lies
    at table[d + 2]."""
    above = table[1:-1][d, ..., :-1]
    left = table[1:-1][d, ..., 1:]
    diagonal = table[:-2][d, ..., :-1]
    return above, left, diagonal


class _SoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, lengths_a, lengths_b, gamma):
        n, s, t = cost.shape
        cells = _skew(cost) / -gamma
        # −R/γ of cell (i, j) stands at [i + j + 2, :, i + 1]: two empty anti-diagonals and a column
        # come before the first.
        table = cost.new_full((s + t + 1, n, s + 1), -FAR)
        table[0, :, 0] = 0.0
        reach = torch.empty_like(cells)
        for d in range(s + t - 1):
            above, left, diagonal = _predecessors(table, d)
            torch.logaddexp(above, left, out=reach[d])
            torch.logaddexp(reach[d], diagonal, out=reach[d])
            torch.add(reach[d], cells[d], out=table[d + 2, :, 1:])
        pairs = torch.arange(n, device=cost.device)
        ctx.save_for_backward(table, reach, lengths_a, lengths_b, pairs)
        ctx.t = t
        return -gamma * table[lengths_a + lengths_b, pairs, lengths_a]

    @staticmethod
    def backward(ctx, gradient):
        table, reach, lengths_a, lengths_b, pairs = ctx.saved_tensors
        # How much of what flows through a cell came from each predecessor: a softmax over them.
        shares = [(x - reach).exp() for x in _predecessors(table, slice(None))]
        flow = torch.zeros_like(table)  # the alignment matrix, laid out like the table
        flow[lengths_a + lengths_b, pairs, lengths_a] = gradient
        for d in range(len(reach) - 1, -1, -1):
            for predecessor, share in zip(_predecessors(flow, d), shares):
                predecessor.addcmul_(share[d], flow[d + 2, :, 1:])
        return _unskew(flow[2:, :, 1:], ctx.t), None, None, None


def soft_dtw(
    cost: torch.Tensor, lengths_a: torch.Tensor, lengths_b: torch.Tensor, gamma: float
) -> torch.Tensor:
    """SDTW of N pairs of sequences: cost (N, S, T), lengths (N,) from 1 on → (N,).

    γ > 0, in the cost's unit: towards 0 it is the cost of the best path (hard DTW), larger values
    average over paths. The gradient with respect to cost is the alignment matrix."""
    return _SoftDTW.apply(cost, lengths_a, lengths_b, gamma)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 − cos: (N, S, d), (N, T, d) → (N, S, T), in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.to(dtype), dim=-1), F.normalize(b.to(dtype), dim=-1)
        return 1 - a @ b.transpose(1, 2)


def dtw_divergences(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    lengths_a: torch.Tensor,
    lengths_b: torch.Tensor,
    gamma: float,
    cross_penalty: torch.Tensor | float = 0.0,
) -> list[torch.Tensor]:
    """Σ over examples of SDTW(a, b) − ½ SDTW(a, a) − ½ SDTW(b, b) for each pair (a, b), (B, S, d)
    against (B, T, d).

    cross_penalty (B, S, T) is added to the cost between a and b only. All tables run together."""
    costs, lengths_1, lengths_2 = [], [], []
    size = max(max(a.size(1), b.size(1)) for a, b in pairs)
    for a, b in pairs:
        cross = cosine_distance(a, b) + cross_penalty
        for cost in (cross, cosine_distance(a, a), cosine_distance(b, b)):
            costs.append(F.pad(cost, (0, size - cost.size(2), 0, size - cost.size(1))))
        lengths_1 += [lengths_a, lengths_a, lengths_b]
        lengths_2 += [lengths_b, lengths_a, lengths_b]
    values = soft_dtw(torch.cat(costs), torch.cat(lengths_1), torch.cat(lengths_2), gamma)
    values = values.view(len(pairs), 3, -1).sum(-1)
    return [cross - 0.5 * self_a - 0.5 * self_b for cross, self_a, self_b in values]
