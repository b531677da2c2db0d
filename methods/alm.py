"""Approximate likelihood matching (ALM, arXiv 2503.20083): two tokenizers meet at the stretches of text both cut out.

With L(c) = log p(c), the sum of the label log-probabilities of a chunk's tokens, a = L_t(c) / τ and b = L_s(c) / τ:

    KD = τ Σ over chunks  e^a (a − b) + (1 − e^a) (log(1 − e^a) − log(1 − e^b))

the KL of "this chunk" and "any other", of which the rest of the distribution is not asked. τ = 100 is the release's, 1
is the plain binary KL. The release also merges chunks until a space is likely to follow, which this does not.

A chunk's tokens stand one after the other, so that logits are computed in pieces that end where a chunk does, once."""
from dataclasses import dataclass

import torch

from methods import heads
from methods.heads import Parts, cross_entropy, in_chunks, label_nats
from methods.sides import Side

SMALLEST = 1e-6         # taken off a and b: of a chunk that is certain, log(1 − e^b) would be infinite

@dataclass
class TextChunks:
    """Of a batch's C chunks, numbered on through its rows: the chunk of each packed position (N,) of either side, C
    where the other side has not the same text of it; and the pieces of the student's positions, each with its first
    chunk and the one behind its last."""
    numbers: dict[str, torch.Tensor]
    count: int
    pieces: list[tuple[slice, int, int]]

    def to(self, device, non_blocking: bool = False):
        moved = {side: x.to(device, non_blocking=non_blocking) for side, x in self.numbers.items()}
        return TextChunks(moved, self.count, self.pieces)

    def pin_memory(self):
        return TextChunks({side: x.pin_memory() for side, x in self.numbers.items()}, self.count, self.pieces)

class ChunkNumbers:
    """Gives a batch its text_chunks. kind: of the device that computes, by which the pieces have their size."""

    def __init__(self, kind: str):
        self.size = heads.chunk_size(kind)

    def tensors(self, examples) -> dict[str, TextChunks]:
        numbers, starts, first, position = {"student": [], "teacher": []}, [], 0, 0
        for example in examples:
            both = example.whole_chunks
            for side, chunks in (("student", example.student.chunks), ("teacher", example.teacher.chunks)):
                numbers[side] += [first + k if k < both else -1 for k in chunks]
            starts += [(position + i, first + min(k, both)) for i, k in enumerate(example.student.chunks)
                       if i == 0 or k != example.student.chunks[i - 1]]
            first, position = first + both, position + len(example.student.chunks)
        cuts, pieces = [starts[0]], []
        for start in [*starts[1:], (position, first)]:
            if start[0] - cuts[-1][0] >= self.size or start[0] == position:
                pieces.append((slice(cuts[-1][0], start[0]), cuts[-1][1], start[1]))
                cuts.append(start)
        tensors = {side: torch.tensor([k if k >= 0 else first for k in of]) for side, of in numbers.items()}
        return {"text_chunks": TextChunks(tensors, first, pieces)}

def binary_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum's term of every chunk from its log-likelihoods (C,), times τ."""
    a, b = (x.clamp(max=0) / temperature - SMALLEST for x in (teacher, student))
    rest = (-torch.expm1(a)) * ((-torch.expm1(a)).log() - (-torch.expm1(b)).log())
    return temperature * (a.exp() * (a - b) + rest)

def alm_loss(student: Side, teacher: Side, chunks: TextChunks, temperature: float, factors: dict[str, float]) -> Parts:
    """CE(z_s, y_s), and KD summed over the chunks that both sides have → nll_loss, accuracy, kd_loss."""
    log_p = -label_nats(teacher.packed.detach(), teacher.head.detach(), teacher.valid.labels)
    of_teacher = log_p.new_zeros(chunks.count + 1).index_add(0, chunks.numbers["teacher"], log_p)
    ranges = {here.start: (first, behind) for here, first, behind in chunks.pieces}

    def piece(z_s, y, numbers, here):
        first, behind = ranges[here.start]
        parts = cross_entropy(z_s, y)
        numbers = (numbers - first).clamp(max=behind - first)           # what only the student has is put behind them
        of_student = parts["nll_loss"].new_zeros(behind - first + 1).index_add(0, numbers, -parts["nll_loss"])
        return parts | {"kd_loss": binary_kl(of_teacher[first:behind], of_student[:-1], temperature)}
    return in_chunks(piece, [student.packed], [student.head], factors, student.valid.labels, chunks.numbers["student"],
                     lambda here: here, pieces=[here for here, _, _ in chunks.pieces])
