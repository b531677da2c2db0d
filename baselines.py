"""What others do with two tokenizers: ULD (arXiv 2402.12030) and MinED (FuseLLM, arXiv 2401.10491).

    ULD:    Σ over k, Σ over ranks |p_s − p_t|       p: the k-th response position's softmax, sorted; ranks, not tokens, meet
    MinED:  Σ over aligned pairs KL(map(p_t) ‖ p_s)  positions meet by the edit distance of their tokens' strings, and the
                                                     teacher's likeliest tokens move to the nearest strings of the student

Notable here: edit distances are computed for thousands of pairs of strings at a time, bit-parallel (Myers 1999): a column
of the dynamic program is one machine word.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import hub
from cma import in_chunks, sums

TOP = 100           # teacher's tokens that MinED carries over, at every position
LONGEST = 63        # bytes of a token that count: one machine word, one bit kept for the sign


# --------------------------------------------------------------------------------------------------------------- ULD

def uld(student_hidden, student_head, teacher_hidden, teacher_head, student_mask, teacher_mask, kd_rate) -> dict[str, torch.Tensor]:
    """Universal logit distillation, summed over the positions k that both responses have → loss (α · kd_loss), kd_loss.

    student_hidden (B, S, d_s) and teacher_hidden (B, T, d_t) on the grids of valid positions, masks (B, S) and (B, T) true
    where there is one; heads (V_s, d_s), (V_t, d_t).
    The shorter vocabulary is padded with zeros; temperature 1.
    """
    def chunk(z_s, z_t):
        p_s, p_t = (z.float().softmax(-1).sort(descending=True).values for z in (z_s, z_t))
        missing = p_t.size(-1) - p_s.size(-1)
        distance = (F.pad(p_s, (0, max(missing, 0))) - F.pad(p_t, (0, max(-missing, 0)))).abs().sum(-1)
        return {"kd_loss": distance, "loss": kd_rate * distance}
    length = min(student_mask.size(1), teacher_mask.size(1))
    both = student_mask[:, :length] & teacher_mask[:, :length]
    return sums(in_chunks(chunk, [(student_hidden[:, :length][both], student_head), (teacher_hidden[:, :length][both], teacher_head.detach())]))


# ------------------------------------------------------------------------------------------------------------- MinED

def mined(student_hidden, student_head, teacher_hidden, teacher_head, partners, vocabulary_map, temperature, kd_rate) -> dict[str, torch.Tensor]:
    """KL(map(p_t) ‖ p_s) summed over the aligned pairs → loss (α · kd_loss), kd_loss, and their number, mined_pairs.

    student_hidden (B, S, d_s) and teacher_hidden (B, T, d_t) on the grids of valid positions. partners (B, S): for each
    student position its teacher position or −1. vocabulary_map (V_t,): the student's token for each of the teacher's, or
    −1. p_t are the teacher's TOP likeliest tokens that have a counterpart, rescaled to sum to 1.
    """
    def chunk(z_s, z_t):
        with torch.no_grad():
            p_t = (z_t.float() / temperature).softmax(-1)
            p_t[:, vocabulary_map.size(0):] = 0.0                       # rows of the head beyond the tokenizer
            p_t[:, :vocabulary_map.size(0)] *= vocabulary_map >= 0
            p_t, tokens = p_t.topk(min(TOP, p_t.size(-1)))
            target = torch.zeros_like(z_s, dtype=p_t.dtype)
            target.scatter_add_(1, vocabulary_map.clamp(min=0)[tokens.clamp(max=vocabulary_map.size(0) - 1)], p_t / p_t.sum(-1, keepdim=True))
        q_log = F.log_softmax(z_s.float() / temperature, -1)
        distance = (torch.special.xlogy(target, target) - target * q_log).sum(-1)
        return {"kd_loss": distance, "mined_pairs": torch.ones_like(distance), "loss": kd_rate * distance}
    rows, positions = (partners >= 0).nonzero(as_tuple=True)
    return sums(in_chunks(chunk, [(student_hidden[rows, positions], student_head), (teacher_hidden[rows, partners[rows, positions]], teacher_head.detach())]))


def edit_distances(a: list[bytes], b: list[bytes]) -> np.ndarray:
    """Levenshtein distance of every a to every b, over bytes: (len(a), len(b)) int32. Strings are cut at LONGEST bytes."""
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


class MinED:
    """The alignment of two tokenizers by strings. token_bytes of each, a leading space removed; EOS equals EOS.

    `vocabulary_map` (V_t,) is the student's token for each of the teacher's: the same bytes, else the same but for a leading
    space, else the nearest by edit distance (of equals the one nearest in length, then the lowest id); −1 for ids without
    bytes. It is computed once (a minute or two for real vocabularies) and kept in `folder`, named by a hash of both.
    """

    def __init__(self, student, teacher, folder: Path):
        whole = [[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] for tokenizer in (student, teacher)]
        whole[1][teacher.eos_id] = whole[0][student.eos_id]
        self.strings = [[s.removeprefix(b" ") for s in side] for side in whole]
        key = hashlib.sha256(repr(whole).encode()).hexdigest()[:16]
        path = folder / f"vocabulary-map-{key}.safetensors"
        try:
            self.vocabulary_map = load_file(path)["vocabulary_map"]
        except (OSError, SafetensorError, KeyError):            # not there, or damaged
            self.vocabulary_map = _vocabulary_map(*whole)
            folder.mkdir(parents=True, exist_ok=True)
            with hub.whole_file(path) as temporary:
                save_file({"vocabulary_map": self.vocabulary_map}, temporary)
        self.aligned: dict[int, list[int]] = {}                 # by row

    def tensors(self, examples) -> dict[str, torch.Tensor]:
        """vocabulary_map, and partners (B, S): for the k-th valid student position the number of its partner among the
        teacher's, −1 without one.

        A path of least summed edit distance aligns the two responses; a pair on it counts where each is the other's only
        partner and the teacher's token is, or maps to, the student's (elsewhere FuseLLM uses the label itself, which
        cross-entropy already does).
        """
        for example in examples:
            if example.row not in self.aligned:
                self.aligned[example.row] = self._align(*(s.ids[s.prompt_length:] for s in (example.student, example.teacher)))
        rows = [torch.tensor(self.aligned[example.row]) for example in examples]
        partners = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return {"partners": partners, "vocabulary_map": self.vocabulary_map}

    def _align(self, student_ids: list[int], teacher_ids: list[int]) -> list[int]:
        kinds = [sorted(set(ids)) for ids in (student_ids, teacher_ids)]
        distances = edit_distances(*([strings[i] for i in kind] for strings, kind in zip(self.strings, kinds)))
        cost = distances[np.ix_(*(np.searchsorted(kind, ids) for kind, ids in zip(kinds, (student_ids, teacher_ids))))]
        path = shortest_path(cost)
        often = [np.bincount(side) for side in zip(*path)]
        partner = [-1] * len(student_ids)
        for i, j in path:
            equal = cost[i, j] == 0 or self.vocabulary_map[teacher_ids[j]] == student_ids[i]
            if equal and often[0][i] == often[1][j] == 1:
                partner[i] = j
        return partner


def shortest_path(cost: np.ndarray) -> list[tuple[int, int]]:
    """Dynamic time warping: the path of least cost from (0, 0) to the last cell of cost (S, T), whole numbers; → its cells.

    A row follows from the one before by a running minimum: with C_j = Σ_k≤j c_ik and E_j the better of the cells above and
    diagonal, D_ij = C_j + min_k≤j (E_k − C_k−1).
    """
    total = np.cumsum(cost.astype(np.int64), axis=1)
    table = np.full((cost.shape[0] + 1, cost.shape[1] + 1), 1 << 40)
    table[0, 0] = 0
    for i in range(len(cost)):
        enter = np.minimum(table[i, 1:], table[i, :-1])
        table[i + 1, 1:] = total[i] + np.minimum.accumulate(enter - (total[i] - cost[i]))
    i, j = cost.shape[0], cost.shape[1]
    path = []
    while (i, j) != (0, 0):
        path.append((i - 1, j - 1))
        _, i, j = min((table[i - 1, j - 1], i - 1, j - 1), (table[i - 1, j], i - 1, j), (table[i, j - 1], i, j - 1), key=lambda cell: cell[0])
    return path[::-1]


def _vocabulary_map(student: list[bytes], teacher: list[bytes]) -> torch.Tensor:
    """See MinED. Only strings within the best distance so far in length are compared, nearest lengths first."""
    exact, stripped = {}, {}
    for i, s in enumerate(student):
        exact.setdefault(s, i)
        stripped.setdefault(s.removeprefix(b" "), i)
    nearest = np.full(len(teacher), -1, np.int64)
    by_length: dict[int, dict[bytes, list[int]]] = {}          # teacher's strings without an equal: length → string → ids
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
    with tqdm(total=sum(map(len, by_length.values())), desc="mapping the vocabulary", unit="token", dynamic_ncols=True) as bar:
        for length, strings in by_length.items():
            names = list(strings)
            for start in range(0, len(names), 128):
                part = names[start:start + 128]
                best = np.full(len(part), LONGEST + 1)
                choice = np.zeros(len(part), np.int64)
                for other in sorted(candidates, key=lambda n: (abs(n - length), n)):
                    open_ = np.flatnonzero(best > abs(other - length))
                    for begin in range(0, len(candidates[other]) if len(open_) else 0, 1024):
                        group = candidates[other][begin:begin + 1024]
                        distances = edit_distances([part[k] for k in open_], group)
                        closest, least = distances.argmin(1), distances.min(1)
                        better = least < best[open_]
                        best[open_[better]] = least[better]
                        choice[open_[better]] = [stripped[group[k]] for k in closest[better]]
                for k, s in enumerate(part):
                    nearest[strings[s]] = choice[k]
                bar.update(len(part))
    return torch.from_numpy(nearest)
