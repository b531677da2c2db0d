"""A run's attention on some rows: which teacher token takes what from which student token, and what follows from it.

    responses = attend(settings, examples, student, teacher, projectors, pads)

Notable here: attention depends on embeddings and P_q alone (cma.align), so that no model's layers are needed, but for
the leak: whether z_t2s, which may have been told what it predicts, is right more often than the teacher itself."""
import collections
from dataclasses import dataclass

import torch

import discriminator
from cma import align, to_student
from methods.heads import first_guesses
from methods.sides import Side, side_of
from running.measures import measure, tell_apart
from tokenize_align import Example, Sequence, collate

BATCH = 32              # rows whose keys are divided by one σ_K, as in training
DIRECTIONS = ("student → teacher", "teacher → student")

@dataclass
class Response:
    """One response in both tokenizations, and what each token takes of the other side: S and T valid positions."""
    row: int                        # in the data file, from 0
    student: Sequence
    teacher: Sequence
    attention: torch.Tensor         # (S, T), student → teacher: each row sums to 1
    back: torch.Tensor              # (T, S), teacher → student
    keys: torch.Tensor              # (T, 2 d_t)
    queries: torch.Tensor | None    # (S, 2 d_t)
    right: list[torch.Tensor] | None = None     # of z_t2s and of the teacher itself: (C,), who is right about a chunk

    @property
    def same_chunk(self) -> torch.Tensor:
        """(S, T)"""
        return torch.tensor(self.student.chunks)[:, None] == torch.tensor(self.teacher.chunks)

    @property
    def blocks(self) -> list[tuple[range, range]]:
        """The chunks that have tokens on both sides: (student tokens, teacher tokens)."""
        places = [{k: range(chunks.index(k), len(chunks) - chunks[::-1].index(k)) for k in chunks}
                  for chunks in (self.student.chunks, self.teacher.chunks)]
        return [(places[0][k], places[1][k]) for k in places[0] if k in places[1]]

@torch.no_grad()
def attend(options, examples: list[Example], student, teacher, projectors, pads: tuple[int, int],
           leak: bool = False) -> list[Response]:
    """A run's attention on some examples, float32 on the CPU. student, teacher: .embed; options: the run's settings.
    leak: also who is right about which chunk; for it the teacher needs its layers, and the student its head."""
    device, responses = student.embed.weight.device, []
    for start in range(0, len(examples), BATCH):
        part = examples[start:start + BATCH]
        batch = {name: x.to(device) for name, x in collate(part, *pads, options.align_on).items()}
        sides = side_of(batch, "student", student.embed), side_of(batch, "teacher", teacher.embed)
        found = align(*sides, projectors, options.alignment)
        right = [[] for _ in sides]
        if leak:
            sides[1].hidden = sides[1].valid.grid(teacher(batch["teacher_ids"]))
            states = to_student(found, sides[1], projectors, options.value), sides[1].hidden
            heads = student.head.weight, teacher.head.weight
            right = [first_right(*of_side) for of_side in zip(sides, states, heads)]
        for i, example in enumerate(part):
            s, t = example.student.valid, example.teacher.valid
            queries = None if found.queries is None else found.queries[i, :s].float().cpu()
            rest = [x.float().cpu() for x in (found.attention[i, :s, :t], found.back[i, :t, :s], found.keys[i, :t])]
            chunks = [right_chunks(of[i], getattr(example, name).chunks, example.whole_chunks)
                      for of, name in zip(right, ("student", "teacher")) if leak]
            responses.append(Response(example.row, example.student, example.teacher, *rest, queries, chunks or None))
    return responses

def first_right(side: Side, states: torch.Tensor, head: torch.Tensor) -> list[torch.Tensor]:
    """Of each row, whether the first guess of W h is right at its valid positions. states (B, L, d), head (V, d)."""
    right = first_guesses(side.valid.pack(states), head) == side.valid.labels
    return list(right.cpu().split(side.valid.mask.sum(1).tolist()))

def right_chunks(right: torch.Tensor, chunks: list[int], number: int) -> torch.Tensor:
    """Whether all tokens of each of the first chunks are right: (number,) of 0 and 1."""
    return torch.ones(max(chunks) + 1).scatter_reduce(0, torch.tensor(chunks), right.float(), "amin")[:number]

def attention_values(responses: list[Response], kind: str = "attention") -> dict[str, list[dict[str, torch.Tensor]]]:
    """direction → each response's measure(), of its own attention, of "uniform" attention or of the "chunk_mean"."""
    values = {direction: [] for direction in DIRECTIONS}
    for response in responses:
        middles, repeats = [], []
        for side in (response.student, response.teacher):
            labels = side.ids[side.prompt_length:]
            often = collections.Counter(labels)
            repeats.append(torch.tensor([often[i] > 1 for i in labels]))
            middles.append(torch.tensor(side.spans).double().mean(1))
        inside = response.same_chunk
        for direction, weights, mask, a, b in ((DIRECTIONS[0], response.attention, inside, 0, 1),
                                               (DIRECTIONS[1], response.back, inside.T, 1, 0)):
            weights = {"attention": weights, "uniform": torch.full_like(weights, 1 / weights.size(1)),
                       "chunk_mean": mask / mask.sum(1, keepdim=True).clamp(min=1)}[kind]
            values[direction].append(measure(weights, mask, repeats[a], middles[a], middles[b]))
    return values

def matching_values(responses: list[Response]) -> list[list[torch.Tensor]]:
    """Whether a logistic probe, trained on every other response, is right about the keys and the queries of each → two
    lists (keys, queries) of a tensor of 0 and 1 for each response."""
    sides = [s.keys for s in responses], [s.queries for s in responses]
    folds = [torch.cat([torch.full((len(v),), i % 2) for i, v in enumerate(vectors)]) for vectors in sides]
    right = tell_apart(*map(torch.cat, sides), *folds)
    return [list(of_side.split([len(v) for v in vectors])) for of_side, vectors in zip(right, sides)]

@torch.no_grad()
def adversary_numbers(kind: str, adversary, responses: list[Response]) -> dict[str, float]:
    """The adversary's mean losses and accuracies, without dropout, on the responses' keys and queries."""
    was_training, device = adversary.training, next(adversary.parameters()).device
    adversary.eval()
    totals = collections.Counter()
    for s in responses:
        keys, queries = s.keys.to(device), s.queries.to(device)
        if kind == "gan":
            parts = discriminator.gan(adversary, keys, queries)
        else:
            everything = [torch.ones(1, len(x), dtype=torch.bool, device=device) for x in (keys, queries)]
            parts = discriminator.conditional_transport(adversary, keys[None], queries[None], *everything)
        totals.update({name: float(value) for name, value in parts.items()})
    adversary.train(was_training)
    n = {"key": sum(len(s.keys) for s in responses), "query": sum(len(s.queries) for s in responses)}
    return {name.removeprefix("adversary_"): value / n[name.split("_")[1]] for name, value in totals.items()}

def training_numbers(options, responses: list[Response], adversary) -> dict[str, float]:
    """What --probe_interval adds to metrics.jsonl."""
    numbers, directions = {}, attention_values(responses)
    for values, suffix in zip(directions.values(), ("", "_back")):
        numbers |= {f"probe_{name}{suffix}": float(torch.cat([v[name] for v in values]).mean())
                    for name in ("mass", "hit")}
    if responses[0].queries is not None and len(responses) > 1:
        numbers["probe_accuracy"] = sum(float(torch.cat(right).mean()) for right in matching_values(responses)) / 2
    if adversary is not None:
        found = adversary_numbers(options.adversary, adversary, responses)
        numbers |= {f"probe_{name}": value for name, value in found.items()}
    return numbers
