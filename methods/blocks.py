"""Losses over the vocabulary, a block of positions at a time: no (B, T, V) tensor ever exists.

A batch is looked at from two Sides, each at its response positions only: those whose label is a
response token or EOS. in_blocks() computes logits z = W h for BLOCK of them, the loss, and its
gradient at once while the logits are there, as fused linear cross-entropy does."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

BLOCK = 128  # positions whose logits exist at one time; 8 times as many on a GPU


class Side:
    """One model's part of a batch, at its N response positions.

    Tensors are packed, (N, …): the positions of all rows, one after the other. pad() makes rows of
    them, (B, L, …), for attention, L being the largest number of them in a row."""

    def __init__(self, batch: dict[str, torch.Tensor], name: str, model):
        ids, labels = batch[f"{name}_ids"], batch[f"{name}_labels"]
        response_mask = labels != -100  # (B, T)
        self.positions = response_mask.flatten().nonzero().squeeze(1)
        self.counts = response_mask.sum(1).tolist()  # per row
        self.inputs = self.pack(ids)  # (N,): the tokens x
        self.labels = self.pack(labels)  # (N,): the next tokens y
        self.embed = model.embed  # E: ids → (…, d)
        self.head = model.head.weight  # W: (V, d)
        self.hidden = None  # h: (N, d)

    @property
    def mask(self) -> torch.Tensor:
        """(B, L), true where pad() has a position (the batch's masks are true on prompts, too)."""
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(max(self.counts), device=counts.device) < counts[:, None]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (N, …)"""
        return x.flatten(0, 1).index_select(0, self.positions)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(N, …) → (B, L, …), zeros behind the shorter rows."""
        return pad_sequence(packed.split(self.counts), batch_first=True)

    def unpad(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, L, …) → (N, …)"""
        return torch.cat([row[:count] for row, count in zip(rows, self.counts)])


def student_side(batch: dict[str, torch.Tensor], student) -> Side:
    side = Side(batch, "student", student)
    side.hidden = side.pack(student(batch["student_ids"], batch.get("student_mask")))
    return side


@torch.no_grad()
def teacher_side(batch: dict[str, torch.Tensor], teacher) -> Side:
    """The teacher is frozen. Its states may be in the batch already (runtime/teacher_states.py)."""
    side = Side(batch, "teacher", teacher)
    side.hidden = batch.get("teacher_hidden")
    if side.hidden is None:
        side.hidden = side.pack(teacher(batch["teacher_ids"], batch.get("teacher_mask")))
    side.head = side.head.detach()
    return side


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients with respect to some tensors are known already."""

    @staticmethod
    def forward(ctx, loss, gradients, *tensors):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(upstream) for gradient in gradients)


def block_size(device: torch.device) -> int:
    return BLOCK if device.type == "cpu" else 8 * BLOCK


def blocks_of(num_positions: int, device: torch.device) -> list[slice]:
    """0 … N − 1 in blocks; no position at all is one empty block."""
    size = block_size(device)
    return [
        slice(start, min(start + size, num_positions))
        for start in range(0, max(num_positions, 1), size)
    ]


def row_blocks(counts: list[int], device: torch.device) -> list[slice]:
    """The same for positions of whole rows, counts of them each, so that no row is cut."""
    blocks, start, stop = [], 0, 0
    for count in counts:
        stop += count
        if stop - start >= block_size(device) or stop == sum(counts):
            blocks.append(slice(start, stop))
            start = stop
    return blocks


def in_blocks(
    block_loss,
    hidden: list[torch.Tensor],
    heads: list[torch.Tensor],
    blocks: list[slice] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of N positions, and the sums of its terms: (total, {name: sum}).

    block_loss(block, *logits) → (total, {name: (n,) values}) is called for every block, a slice of
    the positions, with the logits (n, V) that each of hidden, (N, d) each, has by the head (V, d)
    in the same place, and must use them all. blocks: disjoint and covering. Gradients reach those
    of hidden and heads that require one, and nothing else; backward() can run once."""
    device = hidden[0].device
    dtype = hidden[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    weights = [head.detach().to(dtype) for head in heads]
    hidden_gradients = [torch.zeros_like(h) if h.requires_grad else None for h in hidden]
    head_gradients = [torch.zeros_like(W) if W.requires_grad else None for W in heads]

    total, sums = 0.0, {}
    for block in blocks or blocks_of(len(hidden[0]), device):
        states = [h.detach()[block].to(dtype) for h in hidden]
        logits, learning = [], []
        for i, (h, W) in enumerate(zip(states, weights)):
            logits.append(h @ W.t())
            if hidden_gradients[i] is not None or head_gradients[i] is not None:
                logits[i].requires_grad_()
                learning.append(i)
        with torch.enable_grad():
            loss, terms = block_loss(block, *logits)
        total = total + loss.detach()
        for name, values in terms.items():
            sums[name] = sums.get(name, 0) + values.detach().sum()
        if not learning:
            continue
        logit_gradients = torch.autograd.grad(loss, [logits[i] for i in learning])
        for i, gradient in zip(learning, logit_gradients):
            if hidden_gradients[i] is not None:
                hidden_gradients[i][block] = gradient @ weights[i]
            if head_gradients[i] is not None:
                _add_product(head_gradients[i], gradient, states[i])

    tensors, gradients = [], []
    for tensor, gradient in zip(hidden + heads, hidden_gradients + head_gradients):
        if gradient is not None:
            tensors.append(tensor)
            gradients.append(gradient)
    if tensors:
        total = _WithGradient.apply(total, gradients, *tensors)
    return total, sums


def in_whole_rows(block_loss, student: Side, teacher: Side):
    """in_blocks over the student's positions, in row_blocks, so that none cuts a chunk.
    block_loss(block, of_teacher, z_s): of_teacher are the same rows' positions of the teacher."""
    blocks = row_blocks(student.counts, student.labels.device)
    of_teacher = dict(zip(accumulate(student.counts), accumulate(teacher.counts)))  # rows' ends
    of_teacher[0] = 0

    def with_teacher(block, z_s):
        return block_loss(block, slice(of_teacher[block.start], of_teacher[block.stop]), z_s)

    return in_blocks(with_teacher, [student.hidden], [student.head], blocks)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor) -> None:
    """total (V, d) += gradientᵀ (V, n) · states (n, d), where the types are the same in place."""
    if total.dtype == states.dtype:
        torch.addmm(total, gradient.t(), states, out=total)
        return
    # Mixed types on a CPU: 1,024 rows at a time are added while the cache holds them.
    rows = 1024 if total.device.type == "cpu" else len(total)
    for part, gradient_part in zip(total.split(rows), gradient.t().split(rows)):
        part += gradient_part @ states


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """−log p(y), and whether the likeliest token is right: (n, V), (n,) → two terms (n,)."""
    logits = logits.float()
    return {
        "nll_loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": logits.argmax(-1) == labels,
    }


@torch.no_grad()
def token_nll(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p(y) in nats at each position, without a gradient: (N, d), (V, d), (N,) → (N,)."""
    result = []
    for block in blocks_of(len(hidden), hidden.device):
        logits = F.linear(hidden[block], head).float()
        result.append(F.cross_entropy(logits, labels[block], reduction="none"))
    return torch.cat(result)


@torch.no_grad()
def entropies(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """H(softmax W h) in nats at each position: (N, d), (V, d) → (N,)."""
    result = []
    for block in blocks_of(len(hidden), hidden.device):
        log_p = F.linear(hidden[block], head).float().log_softmax(-1)
        result.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(result)
