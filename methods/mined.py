"""MinED (FuseLLM, arXiv 2401.10491): two tokenizers meet by the edit distance of their tokens' strings.

    KD = Σ over aligned pairs KL(map(p_t) ‖ p_s)    the teacher's likeliest tokens move to the student's nearest strings

Notable here: edit distances are computed for thousands of pairs of strings at a time, bit-parallel (Myers 1999): a
column of the dynamic program is one machine word."""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from methods.heads import Parts, in_chunks
from methods.sides import Side

TOP = 100           # teacher's tokens that are carried over, at every position
LONGEST = 63        # bytes of a token that count: one machine word, one bit kept for the sign

def pairs_of(partners: torch.Tensor) -> torch.Tensor:
    """partners (B, S), each student position's teacher position on the grid, or −1 → (3, P): each pair's row, student's
    position and teacher's position."""
    rows, positions = (partners >= 0).nonzero(as_tuple=True)
    return torch.stack([rows, positions, partners[rows, positions]])

def mined_loss(student: Side, teacher: Side, pairs: torch.Tensor, vocabulary_map, temperature: float,
               factors: dict[str, float]) -> Parts:
    """KL(map(p_t) ‖ p_s) summed over the aligned pairs → kd_loss, and their number, mined_pairs.
    pairs (3, P): of pairs_of. vocabulary_map (V_t,): the student's token for each of the teacher's, or −1. p_t: the
    teacher's TOP likeliest tokens of those, rescaled to sum to 1."""
    size = vocabulary_map.size(0)

    def chunk(z_s, z_t):
        with torch.no_grad():
            p_t = (z_t.float() / temperature).softmax(-1)
            p_t[:, size:] = 0.0                                         # rows of the head beyond the tokenizer
            p_t[:, :size] *= vocabulary_map >= 0
            p_t, tokens = p_t.topk(min(TOP, p_t.size(-1)))
            mapped = vocabulary_map.clamp(min=0)[tokens.clamp(max=size - 1)]
            target = torch.zeros_like(z_s, dtype=p_t.dtype)
            target.scatter_add_(1, mapped, p_t / p_t.sum(-1, keepdim=True))
        q_log = F.log_softmax(z_s.float() / temperature, -1)
        distance = (torch.special.xlogy(target, target) - target * q_log).sum(-1)
        return {"kd_loss": distance, "mined_pairs": torch.ones_like(distance)}
    rows, at_student, at_teacher = pairs
    states = [student.hidden[rows, at_student], teacher.hidden[rows, at_teacher]]
    return in_chunks(chunk, states, [student.head, teacher.head.detach()], factors)

def edit_distances(a: list[bytes], b: list[bytes]) -> np.ndarray:
    """Levenshtein distance of every a to every b in bytes, of which LONGEST count: (len(a), len(b)) int32."""
    a, b = [s[:LONGEST] for s in a], [s[:LONGEST] for s in b]
    length_a, length_b = np.array([len(s) for s in a], np.int32), np.array([len(s) for s in b])
    symbols = np.zeros((len(b), max([1, *length_b])), np.int64)
    for i, s in enumerate(b):
        symbols[i, :len(s)] = list(s)
    occurs = np.zeros((256, len(a)), np.int64)                     # bit k: the symbol stands at a[k]
    for i, s in enumerate(a):
        for k, symbol in enumerate(s):
            occurs[symbol, i] |= 1 << k
    last_bit = (1 << np.maximum(length_a, 1).astype(np.int64) - 1)
    # bit k of plus (minus): D[k+1] − D[k] is +1 (−1) in the current column of the dynamic program; score: its last cell
    plus, minus = np.full((len(b), len(a)), -1, np.int64), np.zeros((len(b), len(a)), np.int64)
    score = np.broadcast_to(length_a, plus.shape).copy()
    for j in range(symbols.shape[1]):
        equal = occurs[symbols[:, j]]
        diagonal = (((equal & plus) + plus) ^ plus) | equal | minus
        right_plus, right_minus = minus | ~(diagonal | plus), plus & diagonal
        going_on = (j < length_b)[:, None]
        score += going_on * ((right_plus & last_bit != 0).astype(np.int32) - (right_minus & last_bit != 0))
        right_plus, right_minus = right_plus << 1 | 1, right_minus << 1
        plus, minus = right_minus | ~(equal | minus | right_plus), right_plus & (equal | minus)
    return np.where(length_a == 0, length_b[:, None], score).T

def token_strings(student, teacher) -> list[list[bytes]]:
    """Every token's bytes on the two sides, by id; EOS equals EOS."""
    both = [[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] for tokenizer in (student, teacher)]
    both[1][teacher.eos_id] = both[0][student.eos_id]
    return both

class MinED:
    """The alignment of responses by their tokens' strings, a leading space removed. strings: token_strings of the two
    tokenizers; vocabulary_map (V_t,): map_vocabulary of these."""

    def __init__(self, strings: list[list[bytes]], vocabulary_map: torch.Tensor):
        self.strings = [[s.removeprefix(b" ") for s in side] for side in strings]
        self.vocabulary_map = vocabulary_map
        self.aligned: dict[int, list[int]] = {}                 # by row

    def tensors(self, examples) -> dict[str, torch.Tensor]:
        """vocabulary_map, and pairs (3, P): which valid student position has which partner.
        A path of least summed edit distance aligns the two responses; a pair on it counts where each is the other's
        only partner and the teacher's token is, or maps to, the student's (elsewhere FuseLLM uses the label itself)."""
        for example in examples:
            if example.row < 0 or example.row not in self.aligned:          # below 0: the student's own, new every time
                responses = [s.ids[s.prompt_length:] for s in (example.student, example.teacher)]
                self.aligned[example.row] = self._align(*responses)
        rows = [torch.tensor(self.aligned[example.row]) for example in examples]
        partners = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return {"pairs": pairs_of(partners), "vocabulary_map": self.vocabulary_map}

    def _align(self, student_ids: list[int], teacher_ids: list[int]) -> list[int]:
        kinds = [sorted(set(ids)) for ids in (student_ids, teacher_ids)]
        distances = edit_distances(*([strings[i] for i in kind] for strings, kind in zip(self.strings, kinds)))
        cost = distances[np.ix_(np.searchsorted(kinds[0], student_ids), np.searchsorted(kinds[1], teacher_ids))]
        path = shortest_path(cost)
        often = [np.bincount(side) for side in zip(*path)]
        partner = [-1] * len(student_ids)
        for i, j in path:
            equal = cost[i, j] == 0 or self.vocabulary_map[teacher_ids[j]] == student_ids[i]
            if equal and often[0][i] == often[1][j] == 1:
                partner[i] = j
        return partner

def shortest_path(cost: np.ndarray) -> list[tuple[int, int]]:
    """Dynamic time warping: the cells of the path of least cost from (0, 0) to the last cell of cost (S, T), integers.
    A row follows from the one before by a running minimum: with C_j = Σ_k≤j c_ik and E_j the better of the cells above
    and diagonal, D_ij = C_j + min_k≤j (E_k − C_k−1)."""
    total = np.cumsum(cost.astype(np.int64), axis=1)
    table = np.full((cost.shape[0] + 1, cost.shape[1] + 1), 1 << 40)
    table[0, 0] = 0
    for i in range(len(cost)):
        enter = np.minimum(table[i, 1:], table[i, :-1])
        table[i + 1, 1:] = total[i] + np.minimum.accumulate(enter - (total[i] - cost[i]))
    (i, j), path = cost.shape, []
    while (i, j) != (0, 0):
        path.append((i - 1, j - 1))
        i, j = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=lambda cell: table[cell])
    return path[::-1]

def map_vocabulary(student: list[bytes], teacher: list[bytes]) -> torch.Tensor:
    """The student's token for each of the teacher's, (V_t,): the same bytes, else the same but for a leading space, or
    the nearest by edit distance (of equals the nearest in length, then the lowest id); −1 for ids without bytes. A
    minute or two for real vocabularies: only strings within the best distance so far in length are compared."""
    exact, stripped = {}, {}
    for i, s in enumerate(student):
        exact.setdefault(s, i)
        stripped.setdefault(s.removeprefix(b" "), i)
    nearest = np.full(len(teacher), -1, np.int64)
    by_length: dict[int, dict[bytes, list[int]]] = {}       # teacher's strings without an equal → their ids
    for i, t in enumerate(teacher):
        if t:
            nearest[i] = exact.get(t, stripped.get(t.removeprefix(b" "), -1))
            if nearest[i] < 0:
                s = t.removeprefix(b" ")
                by_length.setdefault(min(len(s), LONGEST), {}).setdefault(s, []).append(i)
    candidates: dict[int, list[bytes]] = {}
    for s in stripped:
        if s:
            candidates.setdefault(min(len(s), LONGEST), []).append(s)
    with tqdm(total=sum(map(len, by_length.values())), desc="mapping the vocabulary", unit="token",
              dynamic_ncols=True) as bar:
        for length, strings in by_length.items():
            names = list(strings)
            for start in range(0, len(names), 128):
                part = names[start:start + 128]
                for s, found in zip(part, _nearest(part, length, candidates)):
                    nearest[strings[s]] = stripped[found]
                bar.update(len(part))
    return torch.from_numpy(nearest)

def _nearest(part: list[bytes], length: int, candidates: dict[int, list[bytes]]) -> list[bytes]:
    """For each of some strings of one length the nearest candidate, which are sorted by their lengths."""
    best, choice = np.full(len(part), LONGEST + 1), [b""] * len(part)
    for other in sorted(candidates, key=lambda n: (abs(n - length), n)):
        undecided = np.flatnonzero(best > abs(other - length))
        for begin in range(0, len(candidates[other]) if len(undecided) else 0, 1024):
            group = candidates[other][begin:begin + 1024]
            distances = edit_distances([part[k] for k in undecided], group)
            for k, closest, least in zip(undecided, distances.argmin(1), distances.min(1)):
                if least < best[k]:
                    best[k], choice[k] = least, group[closest]
    return choice
