"""The KL of next bytes: two vocabularies meet at every byte of the text.

At byte o of a response a model stands at its last token boundary at or before o, with hidden state
h, p = softmax(W h / T), and the prefix b: the bytes from that boundary to o. Let m(u) = Σ p(v) over
the tokens v that start with u, and c a byte. What the model expects at o is

    inside a token          q(c) = m(b·c) / m(b)
    behind a token y        q(c) = (m'(y·c) + p'(y) p(c)) / m'(y)     p(c) = m(c), or p(EOS)

and p(c) at the response's first byte; m' and p' are those of the boundary before y. The second line
says that the text may also go on inside a longer token than y, and gives the end of y its price.

    KD = Σ_o KL(q_t ‖ q_s)

over the bytes that both models have a token for, and one outcome more, the rest: other bytes, and
that a token ends here, b itself. Where nothing else can follow for the student, there is no rest,
and the teacher's bytes are taken relative to their sum, by which they are weighted.

The tokens are sorted by their bytes, so that every prefix is a range of them and m a difference of
two cumulative sums in float64. Such a difference is known to about 1e-16; SMALLEST is added to
every m, so that no byte costs more than 28 nats. There is no projector, no attention and no
hyper-parameter but α and T.

Other tokenizations of the same bytes are not counted (arXiv 2506.14123 does, by a covering tree).
BLD (2604.07466) teaches next-byte probabilities to an extra byte-level head; here the student's own
tokens are marginalized instead."""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from methods import Method
from methods.blocks import cross_entropy, in_blocks, row_blocks, student_side, teacher_side

SMALLEST = 1e-12
SMALLEST_PREFIX = 1e-8  # a prefix with a smaller m says nothing
EOS, END = 256, 257  # the outcomes of q beside the bytes: the answer ends; a token ends, b itself


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

    def along(self, sequence, text: bytes) -> list[tuple[int, int, int]]:
        """At every byte of the text, and at its end where EOS is due: the response position where
        the model stands; the number of the prefix, −1 where a token's bytes are not the text's
        (normalization changed it); behind a token that token's number, else −1. Ends where the
        tokens do."""
        path, behind = [], -1
        for position, token in enumerate(sequence.response_ids):
            begin, end = sequence.spans[position]
            if begin > len(path):  # bytes that have no token
                break
            if token == self.eos_id and begin == end == len(text):
                path.append((position, self.number(b""), behind))
                continue
            token_bytes, said = self.token_bytes(token), text[begin:end]
            fits = token_bytes == said
            if begin == 0:  # SentencePiece puts a space before the text
                fits = fits or token_bytes == b" " + said
            ahead = len(token_bytes) - len(said)
            for o in range(begin, end):
                prefix = self.number(token_bytes[: ahead + o - begin]) if fits else -1
                path.append((position, prefix, behind if o == begin else -1))
            behind = self.number(token_bytes) if fits else -1
        return path

    def tensors(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """order (V',) and bounds (K, 258): of each prefix where the tokens with each next byte
        begin in order, where they end, and where those with this prefix begin, itself first."""
        return self.order.to(device), torch.from_numpy(np.stack(self.bounds)).to(device)


@dataclass
class ByteStates:
    """Where one model stands at a batch's M bytes."""

    positions: torch.Tensor  # (M,) response position, counted through the batch
    prefixes: torch.Tensor  # (M,) number of the prefix
    behind: torch.Tensor  # (M,) number of the token that ends here, −1 where none does
    first_byte: list[int]  # (N + 1,) number of each position's first byte; M
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
        """(M, 6): PrefixTable.along of the student and of the teacher, for every byte that both
        sides reach."""
        text = example.text.encode()
        both = zip(
            self.student.along(example.student, text), self.teacher.along(example.teacher, text)
        )
        path = [(*s, *t) for s, t in both if s[1] >= 0 and t[1] >= 0]
        return torch.tensor(path, dtype=torch.long).view(-1, 6)

    def __call__(self, examples, device) -> dict[str, ByteStates]:
        moved, num_s, num_t = [], 0, 0
        for example in examples:
            path = self.paths.get(example.row)
            if path is None:  # the student's own answer, new in every step
                path = self.path(example)
            moved.append(path + torch.tensor([num_s, 0, 0, num_t, 0, 0]))
            num_s += len(example.student.response_ids)
            num_t += len(example.teacher.response_ids)
        if self.num_prefixes != len(self.student.numbers) + len(self.teacher.numbers):
            self.num_prefixes = len(self.student.numbers) + len(self.teacher.numbers)
            self.student_tensors = self.student.tensors(device)
            self.teacher_tensors = self.teacher.tensors(device)
        path = torch.cat(moved)
        return {
            "student_bytes": self.states(
                path[:, :3], num_s, self.student_tensors, self.student.eos_id
            ),
            "teacher_bytes": self.states(
                path[:, 3:], num_t, self.teacher_tensors, self.teacher.eos_id
            ),
        }

    def states(self, path, num_positions, tensors, eos_id) -> ByteStates:
        order, bounds = tensors
        path = path.t().contiguous()
        first_byte = torch.searchsorted(path[0], torch.arange(num_positions + 1)).tolist()
        positions, prefixes, behind = path.to(order.device)
        return ByteStates(positions, prefixes, behind, first_byte, order, bounds, eos_id)


class _RangeSums(torch.autograd.Function):
    """Sums of p over ranges of the sorted vocabulary that begin with its first token.

    p (n, V), order (V',), rows and ends (M, K) → (M, K): the sum of p[row, order[:end]], in
    float64, because small masses are differences of sums near 1. A token's gradient is the sum over
    all ranges that hold it: one running sum, from the last token to the first."""

    @staticmethod
    def forward(ctx, p, order, rows, ends):
        ctx.save_for_backward(order, rows, ends)
        ctx.shape = p.shape
        sums = p.index_select(1, order).cumsum(-1, dtype=torch.double)
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
        return from_last.index_select(1, place), None, None, None


def after_prefix(p, states: ByteStates, rows, prefixes) -> torch.Tensor:
    """What follows the prefix b with the probabilities p[row]: m(b·c) / m(b) of every byte c, of
    EOS the same where b is empty, and of END p(b) / m(b). (M,), (M,) → (M, 258), 0 where there is
    no such token; all 0 where m(b) is below SMALLEST_PREFIX."""
    ends = states.bounds[prefixes].long()  # (M, 258)
    sums = _RangeSums.apply(p, states.order, rows[:, None].expand_as(ends), ends)
    bytes_mass = sums[:, 1:257] - sums[:, :256]
    end_mass = sums[:, :1] - sums[:, 257:]
    can_be_eos = (prefixes == 0)[:, None]
    eos_mass = p[rows, states.eos_id].double()[:, None]
    masses = torch.cat([bytes_mass, eos_mass, end_mass], 1)
    exists = torch.cat([ends[:, 1:257] > ends[:, :256], can_be_eos, ends[:, :1] > ends[:, 257:]], 1)
    masses = (masses.clamp(min=0) + SMALLEST) * exists
    whole = masses.sum(1, keepdim=True)
    return masses / whole.clamp(min=SMALLEST_PREFIX) * (whole > SMALLEST_PREFIX)


def expected_bytes(logits, states: ByteStates, block: slice, temperature: float) -> torch.Tensor:
    """q of every byte, of EOS and of END, (M', 258): at the bytes of a block of positions with
    these logits (n, V). The block begins where a row does."""
    part = states.of_block(block)
    rows, prefixes = states.positions[part] - block.start, states.prefixes[part]
    p = (logits.float() / temperature).softmax(-1)
    at_boundary = (states.behind[part] >= 0).nonzero().squeeze(1)  # the bytes behind a token
    tokens = states.behind[part][at_boundary]
    # One call for both lines of the equation: the sums over the vocabulary are what takes time.
    both = after_prefix(
        p, states, torch.cat([rows, rows[at_boundary] - 1]), torch.cat([prefixes, tokens])
    )
    q, before = both.split([len(rows), len(tokens)])  # by the byte's position; by the one before
    longer = F.pad(before[:, :EOS], (0, 2))
    token_ends = before[:, END:]
    is_known = before.sum(1, keepdim=True) > 0
    q_behind = torch.where(is_known, longer + token_ends * q[at_boundary], q[at_boundary])
    return q.index_copy(0, at_boundary, q_behind)


def log_of(x: torch.Tensor) -> torch.Tensor:
    """Of sums that are at least SMALLEST, or 0 where they don't count."""
    return x.clamp(min=SMALLEST).log()


def next_byte_kl(q_s: torch.Tensor, q_t: torch.Tensor) -> torch.Tensor:
    """KL(q_t ‖ q_s) at every byte, the rest being one outcome: (M, 258) twice → (M,)."""
    common = (q_s > 0) & (q_t > 0)
    common[:, END] = False
    log_ratio = q_t.where(common, 1).log() - q_s.where(common, 1).log()
    of_bytes = (q_t * log_ratio).sum(-1)
    shared_s, shared_t = (q_s * common).sum(-1), (q_t * common).sum(-1)
    rest_s, rest_t = (q_s * ~common).sum(-1), (q_t * ~common).sum(-1)
    of_rest = rest_t * (log_of(rest_t) - log_of(rest_s))
    without_rest = shared_t * (log_of(shared_s) - log_of(shared_t))
    return of_bytes + torch.where(rest_s > 0, of_rest, without_rest)


@torch.no_grad()
def teacher_bytes(batch, teacher, temperature: float) -> torch.Tensor:
    """q_t at all M bytes of a batch, (M, 258)."""
    t, states = teacher_side(batch, teacher), batch["teacher_bytes"]
    q_t = []
    for block in row_blocks(t.counts, t.labels.device):
        z_t = F.linear(t.hidden[block], t.head)
        q_t.append(expected_bytes(z_t, states, block, temperature))
    return torch.cat(q_t)


class TeacherBytes:
    """What --cache_teacher keeps for byte_kd: q_t, so that no step computes the teacher's head."""

    name, width = "teacher_expects", END + 1

    def __init__(self, paths: BytePaths, options):
        self.paths, self.temperature = paths.paths, options.temperature

    def depends_on(self, example):
        return self.temperature, example.teacher.ids, example.student.ids

    def count(self, example) -> int:
        return len(self.paths[example.row])

    def __call__(self, batch, teacher) -> torch.Tensor:
        return teacher_bytes(batch, teacher, self.temperature)


def byte_kd(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss, which is summed over bytes."""
    s, states = student_side(batch, student), batch["student_bytes"]
    temperature = objective.options.temperature
    q_t = batch.get("teacher_expects")
    if q_t is None:
        q_t = teacher_bytes(batch, teacher, temperature)

    def block_loss(block, z_s):
        terms = cross_entropy(z_s, s.labels[block])
        q_s = expected_bytes(z_s, states, block, temperature)
        terms["kd_loss"] = next_byte_kl(q_s, q_t[states.of_block(block)]).float()
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    blocks = row_blocks(s.counts, s.labels.device)
    total, sums = in_blocks(block_loss, [s.hidden], [s.head], blocks)
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=byte_kd,
    batch_extras=BytePaths,
    teacher_part=TeacherBytes,
    defaults=dict(temperature=1.0, kd_rate=0.75),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
