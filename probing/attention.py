"""A run's attention on some rows: which teacher token does each student token attend to, and is it
the right place? The right place is the token's chunk, the least text that both tokenizers cut out.

Attention depends on embeddings and P_q alone (cma.align), so no model's layers are needed."""

import collections
from dataclasses import dataclass

import torch

from cma import align
from methods.blocks import Side
from tokenize_align import Example, Sequence, collate

BATCH = 32  # rows whose keys are divided by one σ_K, as in training
DIRECTIONS = ("student → teacher", "teacher → student")
MEASURES = {
    "mass": "attention inside the right chunk",
    "hit": "strongest weight inside it",
    "mass_once": "  inside, tokens that occur once",
    "mass_repeated": "  inside, tokens that repeat",
    "entropy_bits": "entropy (bits)",
    "byte_distance": "token to the attention's centre (bytes)",
}


@dataclass
class Response:
    """One response of S student and T teacher tokens, EOS included."""

    row: int
    student: Sequence
    teacher: Sequence
    t2s: torch.Tensor  # (S, T), student from teacher: each row sums to 1
    s2t: torch.Tensor  # (T, S)
    keys: torch.Tensor  # (T, 2 d_t)
    queries: torch.Tensor | None  # (S, 2 d_t)

    @property
    def same_chunk(self) -> torch.Tensor:
        """(S, T)"""
        return torch.tensor(self.student.chunks)[:, None] == torch.tensor(self.teacher.chunks)


@torch.no_grad()
def attend(
    kind: str, examples: list[Example], student, teacher, projectors, pads: tuple[int, int]
) -> list[Response]:
    """kind: of cma.align. student, teacher: models with .embed and .head; pads: what fills up their
    rows."""
    responses = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        batch = collate(part, *pads)
        s, t = Side(batch, "student", student), Side(batch, "teacher", teacher)
        chunks = batch["student_chunks"], batch["teacher_chunks"]
        alignment = align(s, t, projectors, kind, chunks)
        for i, example in enumerate(part):
            num_s, num_t = s.counts[i], t.counts[i]
            queries = None
            if alignment.queries is not None:
                queries = alignment.queries[i, :num_s]
            responses.append(
                Response(
                    example.row,
                    example.student,
                    example.teacher,
                    alignment.t2s_weights[i, :num_s, :num_t].float(),
                    alignment.s2t_weights[i, :num_t, :num_s].float(),
                    alignment.keys[i, :num_t],
                    queries,
                )
            )
    return responses


def middles(sequence: Sequence) -> torch.Tensor:
    """The middle of each token's span, in bytes: (N,)."""
    return torch.tensor(sequence.spans).double().mean(1)


def repeats(sequence: Sequence) -> torch.Tensor:
    """Whether a token occurs more than once in its response: (N,)."""
    counts = collections.Counter(sequence.response_ids)
    return torch.tensor([counts[token] > 1 for token in sequence.response_ids])


def measure(
    weights: torch.Tensor,
    same_chunk: torch.Tensor,
    repeated: torch.Tensor,
    positions: torch.Tensor,
    other_positions: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """One response, one direction → the values of MEASURES, one per token.

    weights (N, M): how much each of N tokens takes from each of M; same_chunk (N, M);
    repeated (N,); positions (N,), other_positions (M,) in bytes. Equal strongest weights share a
    hit. A token whose chunk has nothing on the other side (its text was cut) is left out."""
    kept = same_chunk.any(1)
    weights, same_chunk = weights.double()[kept], same_chunk[kept]
    repeated, positions = repeated[kept], positions[kept]
    strongest = weights == weights.amax(1, keepdim=True)
    mass = (weights * same_chunk).sum(1)
    return {
        "mass": mass,
        "hit": (strongest & same_chunk).sum(1) / strongest.sum(1),
        "mass_once": mass[~repeated],
        "mass_repeated": mass[repeated],
        "entropy_bits": torch.special.entr(weights).sum(1) / torch.log(torch.tensor(2.0)),
        "byte_distance": (weights @ other_positions.double() - positions).abs(),
    }


def measure_all(responses: list[Response], kind: str = "run") -> dict[str, list[dict]]:
    """direction → each response's measure(): of the run's attention, of "uniform" attention, or of
    the "chunk_mean", the best that is possible without positions."""
    values = {direction: [] for direction in DIRECTIONS}
    for response in responses:
        student, teacher, same_chunk = response.student, response.teacher, response.same_chunk
        for direction in DIRECTIONS:
            weights, mask, own, other = response.t2s, same_chunk, student, teacher
            if direction == DIRECTIONS[1]:
                weights, mask, own, other = response.s2t, same_chunk.T, teacher, student
            if kind == "uniform":
                weights = torch.full_like(weights, 1 / weights.size(1))
            elif kind == "chunk_mean":
                weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            values[direction].append(
                measure(weights, mask, repeats(own), middles(own), middles(other))
            )
    return values
