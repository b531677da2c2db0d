"""The KL of next bytes: two vocabularies meet at every byte of the text.

At byte o of a response a model stands at its last token boundary at or before o, with hidden state
h, p = softmax(W h / T), and the prefix b: the bytes from that boundary to o. With m(u) = Σ p(v)
over the tokens v that start with u, and c a byte, or EOS where b is empty:

    p(c | b) = m(b·c) / r(b)        r(b) = Σ_c m(b·c) over all c that both models have a token for
    KD = Σ_o w · KL(p_t(· | b_t) ‖ p_s(· | b_s))
    w = r_s(b_s) / m_s(b_s) · r_t(b_t) / m_t(b_t), detached

w is the share of both models' probability that continues past b in a way the other can follow; it
is 1 where b is empty and each vocabulary has all bytes. The tokens are sorted by their bytes, so
that every prefix is a range of them and m a difference of two cumulative sums in float64. Such a
difference is known to about 1e-16; SMALLEST is added to every m, so that no byte costs more than 28
nats. There is no projector, no attention and no hyper-parameter but α and T.

Other tokenizations of the same bytes are not counted (arXiv 2506.14123 does, by a covering tree).
BLD (2604.07466) teaches next-byte probabilities to an extra byte-level head; here the student's own
tokens are marginalized instead."""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from methods import Method
from methods.blocks import blocks_of, cross_entropy, in_blocks, student_side, teacher_side

SMALLEST = 1e-12
SMALLEST_PREFIX = 1e-8  # a prefix with a smaller m counts for nothing


class PrefixTable:
    """The ranges of one vocabulary: where, for every prefix that was asked for, the tokens lie that
    continue it with each byte. Control tokens are left out."""

    def __init__(self, tokenizer):
        self.eos_id, self.token_bytes = tokenizer.eos_id, tokenizer.token_bytes
        tokens = [
            (tokenizer.token_bytes(i), i)
            for i in range(tokenizer.vocab_size)
            if i not in tokenizer.control and tokenizer.token_bytes(i)
        ]
        tokens.sort()
        self.sorted_bytes = [token for token, _ in tokens]
        self.order = torch.tensor([i for _, i in tokens])  # (V',) ids by their bytes
        self.longest = max(map(len, self.sorted_bytes))
        # (V', longest + 1), −1 behind a token's end
        self.matrix = np.full((len(tokens), self.longest + 1), -1, np.int16)
        for row, token in zip(self.matrix, self.sorted_bytes):
            row[: len(token)] = list(token)
        self.numbers: dict[bytes, int] = {}
        self.bounds: list[np.ndarray] = []
        self.number(b"")

    def number(self, prefix: bytes) -> int:
        """The number of a prefix, 0 for the empty one."""
        if prefix not in self.numbers:
            self.numbers[prefix] = len(self.numbers)
            first = bisect.bisect_left(self.sorted_bytes, prefix)
            last = bisect.bisect_left(self.sorted_bytes, prefix + b"\xff" * (self.longest + 1))
            next_bytes = self.matrix[first:last, len(prefix)]
            starts = first + np.searchsorted(next_bytes, np.arange(257))
            self.bounds.append(np.append(starts, first).astype(np.int32))
        return self.numbers[prefix]

    def along(self, sequence, text: bytes) -> list[tuple[int, int]]:
        """At every byte of the text, and at its end where EOS is due: the response position where
        the model stands, and the number of the prefix, −1 where a token's bytes are not the text's
        (normalization changed it). Ends where the tokens do."""
        path = []
        for position, token in enumerate(sequence.response_ids):
            begin, end = sequence.spans[position]
            if begin > len(path):  # bytes that have no token
                break
            if token == self.eos_id and begin == end == len(text):
                path.append((position, self.number(b"")))
                continue
            token_bytes = self.token_bytes(token)
            ahead = len(token_bytes) - (end - begin)  # SentencePiece's space before the text: 1
            fits = token_bytes[ahead:] == text[begin:end] and 0 <= ahead <= (begin == 0)
            for o in range(begin, end):
                prefix = self.number(token_bytes[: ahead + o - begin]) if fits else -1
                path.append((position, prefix))
        return path

    def tensors(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """order (V',) and bounds (K, 258): of each prefix where the tokens with each next byte
        begin in order, where they end, and where those with this prefix begin."""
        return self.order.to(device), torch.from_numpy(np.stack(self.bounds)).to(device)


@dataclass
class ByteStates:
    """Where one model stands at a batch's M bytes."""

    positions: torch.Tensor  # (M,) response position, counted through the batch
    prefixes: torch.Tensor  # (M,) number of the prefix
    first_byte: list[int]  # (N + 1,) the bytes of position i are first_byte[i:i + 2]
    order: torch.Tensor  # PrefixTable.tensors
    bounds: torch.Tensor
    eos_id: int

    def of_block(self, block: slice) -> slice:
        """The bytes of a block of positions."""
        return slice(self.first_byte[block.start], self.first_byte[block.stop])


class BytePaths:
    """Adds where both models stand at the bytes of every response: student_bytes, teacher_bytes."""

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        self.student = PrefixTable(student_tokenizer)
        self.teacher = PrefixTable(teacher_tokenizer)
        self.paths = {example.row: self.path(example) for example in examples}
        self.num_prefixes = 0

    def path(self, example) -> torch.Tensor:
        """(M, 4): student position and prefix, teacher position and prefix, for every byte that
        both sides reach."""
        text = example.text.encode()
        both = zip(
            self.student.along(example.student, text), self.teacher.along(example.teacher, text)
        )
        path = [(*s, *t) for s, t in both if s[1] >= 0 and t[1] >= 0]
        return torch.tensor(path, dtype=torch.long).view(-1, 4)

    def __call__(self, examples, device) -> dict[str, ByteStates]:
        moved, num_s, num_t = [], 0, 0
        for example in examples:
            path = self.paths.get(example.row)
            if path is None:  # the student's own answer, new in every step
                path = self.path(example)
            moved.append(path + torch.tensor([num_s, 0, num_t, 0]))
            num_s += len(example.student.response_ids)
            num_t += len(example.teacher.response_ids)
        if self.num_prefixes != len(self.student.numbers) + len(self.teacher.numbers):
            self.num_prefixes = len(self.student.numbers) + len(self.teacher.numbers)
            self.student_tensors = self.student.tensors(device)
            self.teacher_tensors = self.teacher.tensors(device)
        path = torch.cat(moved)
        return {
            "student_bytes": self.states(
                path[:, 0], path[:, 1], num_s, self.student_tensors, self.student.eos_id
            ),
            "teacher_bytes": self.states(
                path[:, 2], path[:, 3], num_t, self.teacher_tensors, self.teacher.eos_id
            ),
        }

    def states(self, positions, prefixes, num_positions, tensors, eos_id) -> ByteStates:
        order, bounds = tensors
        positions = positions.contiguous()
        first_byte = torch.searchsorted(positions, torch.arange(num_positions + 1)).tolist()
        return ByteStates(
            positions.to(order.device), prefixes.to(order.device), first_byte, order, bounds, eos_id
        )


class _RangeSums(torch.autograd.Function):
    """Sums of p over ranges of the sorted vocabulary that begin with its first token.

    p (n, V), order (V',), rows and ends (M, K) → (M, K): the sum of p[row, order[:end]], in
    float64, because small masses are differences of sums near 1. A token's gradient is the sum over
    all ranges that hold it: one running sum, from the last token to the first."""

    @staticmethod
    def forward(ctx, p, order, rows, ends):
        ctx.save_for_backward(order, rows, ends)
        ctx.shape = p.shape
        sums = p[:, order].cumsum(-1, dtype=torch.double)
        return sums[rows, (ends - 1).clamp(min=0)] * (ends > 0)

    @staticmethod
    def backward(ctx, gradient):
        order, rows, ends = ctx.saved_tensors
        num_rows, vocab_size = ctx.shape
        last = len(order)
        from_last = gradient.new_zeros(num_rows, last + 1)
        from_last = from_last.index_put((rows, last - ends), gradient, accumulate=True)
        from_last = from_last.cumsum(-1).float()
        from_last[:, last] = 0  # what the control tokens read
        place = torch.full((vocab_size,), last, device=order.device)
        place[order] = torch.arange(last - 1, -1, -1, device=order.device)
        return from_last[:, place], None, None, None


def next_byte_masses(logits: torch.Tensor, states: ByteStates, block: slice, temperature: float):
    """m(b·c) for every byte c, and for EOS where b is empty, (M', 257); and m(b), EOS included,
    (M',): at the bytes of a block of positions with these logits (n, V)."""
    part = states.of_block(block)
    rows, prefixes = states.positions[part] - block.start, states.prefixes[part]
    p = (logits.float() / temperature).softmax(-1)
    ends = states.bounds[prefixes].long()  # (M', 258)
    sums = _RangeSums.apply(p, states.order, rows[:, None].expand_as(ends), ends)
    eos_is_next = prefixes == 0
    eos = p[rows, states.eos_id].double() * eos_is_next
    masses = torch.cat([sums[:, 1:257] - sums[:, :256], eos[:, None]], 1)
    whole = sums[:, 256] - sums[:, 257] + eos
    exists = torch.cat([ends[:, 1:257] > ends[:, :256], eos_is_next[:, None]], 1)
    exists = exists & (whole > SMALLEST_PREFIX)[:, None]
    masses = (masses.clamp(min=0) + SMALLEST) * exists
    return masses.float(), whole.float()


def next_byte_kl(student_masses, student_mass, teacher_masses, teacher_mass) -> torch.Tensor:
    """w · KL(p_t ‖ p_s) at every byte: (M, 257) masses of the next bytes, (M,) of the prefix
    → (M,)."""
    common = (student_masses > 0) & (teacher_masses > 0)
    m_s, m_t = student_masses * common, teacher_masses * common
    r_s = m_s.sum(-1, keepdim=True).clamp(min=1e-30)
    r_t = m_t.sum(-1, keepdim=True).clamp(min=1e-30)
    log_p_t = (m_t.clamp(min=1e-30) / r_t).log()
    log_p_s = (m_s.clamp(min=1e-30) / r_s).log()
    share_s = r_s / student_mass[:, None].maximum(r_s)
    share_t = r_t / teacher_mass[:, None].maximum(r_t)
    w = (share_s * share_t).squeeze(-1).detach()
    return w * (m_t / r_t * (log_p_t - log_p_s) * common).sum(-1)


@torch.no_grad()
def masses_of_teacher(teacher, states: ByteStates, temperature: float):
    """next_byte_masses of the whole batch."""
    masses, whole = [], []
    for block in blocks_of(len(teacher.hidden), teacher.hidden.device):
        logits = F.linear(teacher.hidden[block], teacher.head)
        block_masses, block_whole = next_byte_masses(logits, states, block, temperature)
        masses.append(block_masses)
        whole.append(block_whole)
    return torch.cat(masses), torch.cat(whole)


def byte_kd(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss, which is summed over bytes."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    temperature, states = objective.options.temperature, batch["student_bytes"]
    m_t, whole_t = masses_of_teacher(t, batch["teacher_bytes"], temperature)

    def block_loss(block, z_s):
        terms = cross_entropy(z_s, s.labels[block])
        m_s, whole_s = next_byte_masses(z_s, states, block, temperature)
        part = states.of_block(block)
        terms["kd_loss"] = next_byte_kl(m_s, whole_s, m_t[part], whole_t[part])
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    total, sums = in_blocks(block_loss, [s.hidden], [s.head])
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=byte_kd,
    batch_extras=BytePaths,
    defaults=dict(temperature=1.0, kd_rate=0.75),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
