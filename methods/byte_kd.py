"""The KL of next bytes: two vocabularies meet at every byte of the text (--method byte_kd).

At byte o of a response a model stands at its last token boundary at or before o, with p = softmax(W h / T) and b, the
bytes from there to o. With m(u) = Σ p(v) over the tokens v that start with u, and c a byte, or EOS where b is empty:

    p(c | b) = m(b·c) / r(b)        r(b) = Σ m(b·c) over all c that both models have a token for
    KD = Σ over o of w · KL(p_t(· | b_t) ‖ p_s(· | b_s))        w = r_s(b_s) / m_s(b_s) · r_t(b_t) / m_t(b_t), detached

w is the share of both models' probability that goes on past b in a way that the other can follow; where b is empty it
is 1, if each vocabulary has all bytes. The tokens are sorted by their bytes, so that every prefix is a range and m a
difference of two cumulative sums. No projector, no attention, no hyper-parameter but α and T.

Other tokenizations of the same bytes are not counted (arXiv 2506.14123 does, by a covering tree). BLD (2604.07466)
teaches the teacher's next-byte probabilities to an extra byte-level head; here the student's own tokens are
marginalized instead."""
import bisect
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from methods.fused import fused
from methods.heads import Parts, cross_entropy, in_chunks, slices
from methods.sides import Side

class Prefixes:
    """The ranges of one vocabulary: of every prefix that was asked for, where the tokens lie that go on with each byte.

    order (V',): the tokens by their bytes; control tokens are left out. Of prefix number k: bounds[k] (257,), where the
    tokens with each next byte begin, and their end; start[k], where all tokens with this prefix begin."""

    def __init__(self, tokenizer):
        self.eos, self.token_bytes = tokenizer.eos_id, tokenizer.token_bytes
        tokens = [(tokenizer.token_bytes(i), i) for i in range(tokenizer.vocab_size) if i not in tokenizer.control]
        tokens = sorted(token for token in tokens if token[0])
        self.sorted = [text for text, _ in tokens]
        self.order = torch.tensor([i for _, i in tokens])
        width = max(map(len, self.sorted)) + 1
        self.letters = np.full((len(tokens), width), -1, np.int16)          # −1 behind a token's end: before all bytes
        for row, text in zip(self.letters, self.sorted):
            row[:len(text)] = list(text)
        self.numbers: dict[bytes, int] = {}
        self.bounds, self.start = [], []
        self.number(b"")

    def number(self, prefix: bytes) -> int:
        """The number of a prefix, 0 for the empty one; every token's bytes have at least one token."""
        if prefix not in self.numbers:
            self.numbers[prefix] = len(self.numbers)
            low = bisect.bisect_left(self.sorted, prefix)
            high = bisect.bisect_left(self.sorted, prefix + b"\xff" * self.letters.shape[1])
            next_letters = self.letters[low:high, len(prefix)]
            self.bounds.append((low + np.searchsorted(next_letters, np.arange(257))).astype(np.int32))
            self.start.append(low)
        return self.numbers[prefix]

    def tables(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """order, bounds (K, 257) and start (K,) of all prefixes so far, on a device, and EOS."""
        return (self.order.to(device), torch.from_numpy(np.stack(self.bounds)).to(device),
                torch.tensor(self.start, device=device), self.eos)

    def of_response(self, sequence, text: bytes) -> list[tuple[int, int]]:
        """At every byte of the text, and at its end where EOS is due: the number of the valid position and that of the
        prefix, −1 where a token's bytes are not the text's (normalization changed it). Ends where the tokens do."""
        places, ids = {}, sequence.ids[sequence.prompt_length:]
        for k, ((begin, end), token) in enumerate(zip(sequence.spans, ids)):
            if token == self.eos and begin == end == len(text):
                places[begin] = k, self.number(b"")
                continue
            own = self.token_bytes(token)
            ahead = len(own) - (end - begin)                # SentencePiece puts a space before the text: ahead = 1
            fits = own[ahead:] == text[begin:end] and 0 <= ahead <= (begin == 0)
            for o in range(begin, end):
                places[o] = k, self.number(own[:ahead + o - begin]) if fits else -1
        return [places[o] for o in range(len(places))]

@dataclass
class NextBytes:
    """At each of a batch's M bytes: which packed position (M,) and which prefix (M,) of either side stands there.
    before: how many bytes lie before each position, on the CPU. tables: of either side's vocabulary."""
    positions: dict[str, torch.Tensor]
    prefixes: dict[str, torch.Tensor]
    before: dict[str, list[int]]
    tables: dict[str, tuple]

    def to(self, device, non_blocking: bool = False):
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function):
        moved = ({side: function(x) for side, x in both.items()} for both in (self.positions, self.prefixes))
        return NextBytes(*moved, self.before, self.tables)

    def masses(self, side: str, logits: torch.Tensor, here: slice, temperature: float):
        """next_byte_masses at the bytes of some positions, whose logits these are, and which bytes they are."""
        before = self.before[side]
        part = slice(before[here.start], before[min(here.stop, len(before) - 1)])
        positions, prefixes = self.positions[side][part] - here.start, self.prefixes[side][part]
        return next_byte_masses(logits, self.tables[side], positions, prefixes, temperature), part

class BytePaths:
    """Where both models stand at the bytes of every response; computed once a row. texts: row → the response."""

    def __init__(self, student, teacher, examples, texts: dict[int, str], device):
        self.sides, self.device = {"student": Prefixes(student), "teacher": Prefixes(teacher)}, device
        self.paths, self.tables, self.known = {}, {}, 0
        self.add(examples, texts)

    def add(self, examples, texts: dict[int, str]) -> None:
        """More rows, or others under the same numbers."""
        for example in examples:
            text = texts[example.row].encode()
            both = zip(*(found.of_response(getattr(example, side), text) for side, found in self.sides.items()))
            both = [(*s, *t) for s, t in both if min(s[1], t[1]) >= 0]          # up to where one side is cut
            self.paths[example.row] = torch.tensor(both, dtype=torch.long).view(-1, 4)
        known = sum(len(prefixes.numbers) for prefixes in self.sides.values())
        if known > self.known:
            self.known = known
            self.tables = {side: prefixes.tables(self.device) for side, prefixes in self.sides.items()}

    def tensors(self, examples) -> dict[str, NextBytes]:
        """next_bytes of a batch."""
        moved, n_s, n_t = [], 0, 0
        for example in examples:
            path = self.paths[example.row]
            moved.append(path + torch.tensor([n_s, 0, n_t, 0]))
            n_s, n_t = n_s + example.student.valid, n_t + example.teacher.valid
        k_s, b_s, k_t, b_t = (x.contiguous() for x in torch.cat(moved).unbind(1))
        before = {side: torch.searchsorted(k, torch.arange(n + 1)).tolist()
                  for side, k, n in (("student", k_s, n_s), ("teacher", k_t, n_t))}
        return {"next_bytes": NextBytes({"student": k_s, "teacher": k_t}, {"student": b_s, "teacher": b_t}, before,
                                        self.tables)}

class _RangeSums(torch.autograd.Function):
    """Sums of p over ranges of the sorted vocabulary that begin with its first token: p (n, V), order (V',), rows and
    ends (M, K) → (M, K), the sums of p[row, order[:end]]. In float64: small masses are differences of sums near 1. A
    token's gradient is the sum over all ranges that hold it: one running sum, from the last token to the first."""

    @staticmethod
    def forward(ctx, p, order, rows, ends):
        ctx.save_for_backward(order, rows, ends)
        ctx.shape = p.shape
        sums = p[:, order].cumsum(-1, dtype=torch.double)
        return sums[rows, (ends - 1).clamp(min=0)] * (ends > 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        order, rows, ends = ctx.saved_tensors
        (n, size), last = ctx.shape, len(order)
        from_last = gradient.new_zeros(n, last + 1).index_put((rows, last - ends), gradient, accumulate=True)
        from_last = from_last.cumsum(-1).float()
        from_last[:, last] = 0                                              # what the control tokens read
        place = torch.full((size,), last, device=order.device)
        place[order] = torch.arange(last - 1, -1, -1, device=order.device)
        return from_last[:, place], None, None, None

@fused
def next_byte_masses(logits: torch.Tensor, tables, positions: torch.Tensor, prefixes: torch.Tensor, temperature: float):
    """m(b·c) for every byte c, and of EOS where b is empty, (M, 257), and m(b) with EOS in it, (M,). logits (n, V);
    positions (M,): whose; prefixes (M,): b."""
    order, bounds, start, eos = tables
    p = (logits.float() / temperature).softmax(-1)
    ends = torch.cat([bounds[prefixes].long(), start[prefixes][:, None]], 1)                    # (M, 258)
    at = _RangeSums.apply(p, order, positions[:, None].expand_as(ends), ends)
    of_eos = p[positions, eos].double() * (prefixes == 0)
    masses = torch.cat([at[:, 1:257] - at[:, :256], of_eos[:, None]], 1)
    return masses.float(), (at[:, 256] - at[:, 257] + of_eos).float()

@fused
def next_byte_kl(student, teacher) -> torch.Tensor:
    """w · KL(p_t ‖ p_s) at every byte, (M,); each side's (masses, whole) of next_byte_masses."""
    (m_s, whole_s), (m_t, whole_t) = student, teacher
    common = (m_s > 0) & (m_t > 0)
    m_s, m_t = m_s * common, m_t * common
    r_s, r_t = m_s.sum(-1, keepdim=True).clamp(min=1e-30), m_t.sum(-1, keepdim=True).clamp(min=1e-30)
    log_ratio = (m_t.clamp(min=1e-30) / r_t).log() - (m_s.clamp(min=1e-30) / r_s).log()
    w = r_s / whole_s[:, None].maximum(r_s) * r_t / whole_t[:, None].maximum(r_t)      # of no mass at all: KL is 0
    return w.squeeze(-1).detach() * (m_t / r_t * log_ratio * common).sum(-1)

def byte_terms(teacher: Side, next_bytes: NextBytes, temperature: float):
    """The teacher's next bytes → a function of the student's logits (n, V) and of their positions, a slice, that gives
    w · KL at these positions' bytes, (M',)."""
    with torch.no_grad():
        states, of_teacher = teacher.packed, []
        for here in slices(states):
            logits = F.linear(states[here], teacher.head)
            of_teacher.append(next_bytes.masses("teacher", logits, here, temperature)[0])
        m_t, whole_t = map(torch.cat, zip(*of_teacher))                                 # (M, 257), (M,)

    def terms(z_s, here):
        of_student, part = next_bytes.masses("student", z_s, here, temperature)
        return next_byte_kl(of_student, (m_t[part], whole_t[part]))
    return terms

def byte_loss(student: Side, teacher: Side, next_bytes: NextBytes, temperature: float,
              factors: dict[str, float]) -> Parts:
    """CE(z_s, y_s) and the KL of next bytes, summed over the bytes → nll_loss, accuracy, kd_loss."""
    terms = byte_terms(teacher, next_bytes, temperature)

    def chunk(z_s, y, here):
        z_s = z_s.float()
        return cross_entropy(z_s, y) | {"kd_loss": terms(z_s, here)}
    return in_chunks(chunk, [student.packed], [student.head], factors, student.valid.labels, lambda here: here)
