"""MinED (FuseLLM, arXiv 2401.10491): two tokenizers meet by the edit distance of their tokens.

    KD = Σ over aligned positions KL(map(p_t) ‖ p_s) − Σ over the others log p_s(y)

with p = softmax(z/T). The teacher's likeliest tokens are mapped to the student's nearest strings.
As in the release, positions are aligned by the tokens that they have read last, and the others are
taught the label.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from methods import Method
from methods.blocks import cross_entropy, in_blocks, student_side, teacher_side
from methods.shared_tokens import byte_doubles

TOP = 100  # the teacher's tokens that are mapped, at every position


def edit_distances(a: list[str], b: list[str]) -> np.ndarray:
    """Levenshtein distance of every a to every b: (len(a), len(b))."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return cdist(a, b, scorer=Levenshtein.distance, workers=-1)


def token_strings(tokenizer) -> list[str]:
    """Every token's bytes, by id, as a string of as many characters."""
    return [tokenizer.token_bytes(i).decode("latin-1") for i in range(tokenizer.vocab_size)]


def map_vocabulary(student: list[str], teacher: list[str]) -> np.ndarray:
    """The student's token for each of the teacher's, (V_t,); −1 for ids without a string.

    It has the same string; else the same but for a leading space; else it is the nearest by edit
    distance, of several the nearest in length, then the one with the lowest id."""
    exact, stripped = {}, {}
    for i, string in enumerate(student):
        exact.setdefault(string, i)
        stripped.setdefault(string.removeprefix(" "), i)
    nearest = np.full(len(teacher), -1, np.int64)
    others: dict[int, dict[str, list[int]]] = {}  # length → string → the teacher's ids
    for i, string in enumerate(teacher):
        bare = string.removeprefix(" ")
        if string in exact:
            nearest[i] = exact[string]
        elif bare in stripped:
            nearest[i] = stripped[bare]
        else:
            others.setdefault(len(bare), {}).setdefault(bare, []).append(i)
    nearest[[i for i, string in enumerate(teacher) if not string]] = -1

    total = sum(map(len, others.values()))
    bar = tqdm(total=total, desc="mapping the vocabulary", unit="token", disable=None)
    for length, ids_of in others.items():
        candidates = sorted(filter(None, stripped), key=lambda s: (abs(len(s) - length), len(s)))
        strings = list(ids_of)
        for start in range(0, len(strings), 512):
            part = strings[start : start + 512]
            for string, row in zip(part, edit_distances(part, candidates)):
                nearest[ids_of[string]] = stripped[candidates[row.argmin()]]
            bar.update(len(part))
    bar.close()
    return nearest


def shortest_path(cost: np.ndarray) -> list[tuple[int, int]]:
    """Dynamic time warping: the cells of the cheapest path through cost (S, T)."""
    rows, columns = cost.shape
    table = np.full((rows + 1, columns + 1), 1 << 40)
    table[0, 0] = 0
    for i in range(rows):
        # A row is a running minimum: with C_j = Σ_k≤j c_ik and E_j the better of the cells above
        # and diagonal, D_ij = C_j + min_k≤j (E_k − C_k−1).
        total = np.cumsum(cost[i].astype(np.int64))
        enter = np.minimum(table[i, 1:], table[i, :-1])
        table[i + 1, 1:] = total + np.minimum.accumulate(enter - (total - cost[i]))
    i, j, path = rows, columns, []
    while (i, j) != (0, 0):
        path.append((i - 1, j - 1))
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(before, key=lambda cell: table[cell])
    return path[::-1]


class AlignedPairs:
    """Adds pairs (2, P), student and teacher positions counted through the batch, and
    vocabulary_map (V_t,).

    The cheapest path by edit distance aligns the tokens that the positions have read last. A pair
    on it counts where each is the other's only partner and the teacher's token is, or maps to, the
    student's string."""

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        student, teacher = token_strings(student_tokenizer), token_strings(teacher_tokenizer)
        teacher[teacher_tokenizer.eos_id] = student[student_tokenizer.eos_id]
        doubles = byte_doubles(student_tokenizer)  # no text gives these
        targets = ["" if i in doubles else string for i, string in enumerate(student)]
        self.vocabulary_map = map_vocabulary(targets, teacher)
        self.student = [string.removeprefix(" ") for string in student]
        self.teacher = [string.removeprefix(" ") for string in teacher]
        self.pairs = {example.row: self.align(example) for example in examples}

    def align(self, example) -> list[tuple[int, int]]:
        student_ids, teacher_ids = (
            side.ids[side.prompt_length - 1 : -1] for side in (example.student, example.teacher)
        )
        cost = edit_distances(
            [self.student[i] for i in student_ids], [self.teacher[j] for j in teacher_ids]
        )
        path = shortest_path(cost)
        student_uses = np.bincount([i for i, _ in path])
        teacher_uses = np.bincount([j for _, j in path])
        pairs = []
        for i, j in path:
            equal = cost[i, j] == 0 or self.vocabulary_map[teacher_ids[j]] == student_ids[i]
            if equal and student_uses[i] == teacher_uses[j] == 1:
                pairs.append((i, j))
        return pairs

    def __call__(self, examples, device) -> dict[str, torch.Tensor]:
        pairs, num_s, num_t = [], 0, 0
        for example in examples:
            aligned = self.pairs.get(example.row)
            if aligned is None:  # the student's own answer, new in every step
                aligned = self.align(example)
            pairs += [(num_s + i, num_t + j) for i, j in aligned]
            num_s += len(example.student.response_ids)
            num_t += len(example.teacher.response_ids)
        pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2).t().contiguous()
        return {
            "pairs": pairs.to(device),
            "vocabulary_map": torch.from_numpy(self.vocabulary_map).to(device),
        }


@torch.no_grad()
def mapped_probabilities(
    z_t: torch.Tensor, vocabulary_map: torch.Tensor, student_size: int, temperature: float
) -> torch.Tensor:
    """map(p_t), (n, V_s): the teacher's TOP likeliest tokens that have a counterpart, rescaled to
    sum to 1."""
    size = len(vocabulary_map)
    p_t = (z_t.float() / temperature).softmax(-1)[:, :size]  # a head may have more rows
    p_t = p_t * (vocabulary_map >= 0)
    p_t, tokens = p_t.topk(min(TOP, size))
    mapped = vocabulary_map.clamp(min=0)[tokens]
    target = p_t.new_zeros(len(p_t), student_size)
    return target.scatter_add(1, mapped, p_t / p_t.sum(-1, keepdim=True))


def mined(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy, kd_loss and mined_pairs, the pairs per student token."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    at_student, at_teacher = batch["pairs"]
    temperature = objective.options.temperature

    def pair_loss(block, z_s, z_t):
        target = mapped_probabilities(z_t, batch["vocabulary_map"], z_s.size(-1), temperature)
        q_log = F.log_softmax(z_s.float() / temperature, -1)
        distance = (torch.special.xlogy(target, target) - target * q_log).sum(-1)
        terms = {"kd_loss": distance, "mined_pairs": torch.ones_like(distance)}
        return objective(kd=distance.sum()), terms

    not_aligned = torch.ones_like(s.labels)
    not_aligned[at_student] = 0

    def label_loss(block, z_s):
        y = s.labels[block]
        terms = cross_entropy(z_s, y)
        q_log = F.log_softmax(z_s.float() / temperature, -1)
        taught = not_aligned[block] * objective.has_labels
        terms["kd_loss"] = -taught * q_log.gather(1, y[:, None]).squeeze(1)
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    label_total, label_sums = in_blocks(label_loss, [s.hidden], [s.head])
    pair_total, sums = in_blocks(
        pair_loss, [s.hidden[at_student], t.hidden[at_teacher]], [s.head, t.head]
    )
    sums["kd_loss"] = sums["kd_loss"] + label_sums["kd_loss"]
    return label_total + pair_total, objective.per_student_token(label_sums | sums)


METHOD = Method(
    loss=mined,
    batch_extras=AlignedPairs,
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
