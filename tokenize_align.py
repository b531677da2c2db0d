"""Two tokenizers, one text: ids with byte spans, the chunks both agree on, examples and padded batches.

    tokenizer = load_tokenizer("gpt2")                       # or a folder in the hub's layout
    ids, spans = tokenizer.encode_with_spans("héllo")        # spans are UTF-8 byte offsets that tile the text

Notable here:
- byte-level BPE (GPT-2, Qwen, SmolLM2, Llama 3) runs as a tiktoken Encoding built from the model's own files,
  SentencePiece (Llama 2, TinyLlama, Mistral) through sentencepiece; both give the ids of the reference libraries;
- control tokens in a text are text: "<|endoftext|>" in a row of data never ends anything;
- a chunk is what lies between two byte offsets at which BOTH tokenizations have a boundary."""
import bisect
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch

from files import hub
from files.config import InputError
from files.rows import Row
from files.tokenizer_config import ByteLevelConfig, read_byte_level, read_json, token_text

Span = tuple[int, int]

# ------------------------------------------------------------------------------------------------------- tokenizers
class Tokenizer:
    """What both kinds share. `eos_id` closes a response, `bos_id` (or None) opens a prompt, `vocab_size` is the largest
    id + 1, `folder` holds its files."""

    name: str
    folder: Path
    eos_id: int
    bos_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        raise NotImplementedError

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and, for each, the (start, end) bytes of the text's UTF-8 that it stands for. The spans tile the text:
        the first starts at 0, each starts where the one before ends, the last ends at the end. Where normalization
        changed the text, boundaries inside the changed characters are spread over them."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; control tokens (EOS and its like) give nothing, broken UTF-8 gives U+FFFD."""
        raise NotImplementedError

    def text_ids(self, ids: list[int]) -> list[int]:
        """The ids that are text: not control tokens, nor those that only the model has, whose head may have more."""
        return [i for i in ids if i < self.vocab_size and i not in self.control]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text (of a control token: its name)."""
        raise NotImplementedError

class ByteLevelBPE(Tokenizer):
    """Byte pair encoding over UTF-8 bytes (Sennrich et al.; GPT-2's form), run by tiktoken."""

    def __init__(self, name: str, config: ByteLevelConfig):
        vocabulary, merges, split, control = config.vocabulary, config.merges, config.split, config.control
        self.name, self.nfc, self.eos_id, self.bos_id = name, config.nfc, config.eos_id, config.bos_id
        self.control = set(control.values())
        if not all(type(i) is int and 0 <= i < 10_000_000 for i in (*vocabulary.values(), *self.control)):
            raise InputError(f"{name}: the vocabulary holds ids that are not whole numbers from 0 to 10 million")
        byte_tokens = {_from_alphabet(token): i for token, i in vocabulary.items() if i not in self.control}
        self.vocab_size = max(*vocabulary.values(), *control.values(), 0) + 1
        self.bytes_of = [b""] * self.vocab_size
        for token, i in byte_tokens.items():
            self.bytes_of[i] = token
        for token, i in control.items():
            self.bytes_of[i] = token.encode()
        if merges is None:
            order = sorted(byte_tokens, key=byte_tokens.get)
            if not all(bytes([b]) in byte_tokens for b in range(256)):
                raise InputError(f"{name}: a vocabulary without merges must hold all 256 bytes")
        else:
            # tiktoken takes ids for priorities, so it is given priorities: first the bytes, then the merges in order
            order = dict.fromkeys([*(bytes([b]) for b in range(256)), *(_from_alphabet(a + b) for a, b in merges)])
        # a byte that the vocabulary lacks (SmolLM2 lacks some control characters) gives no token
        self.id_of_rank = np.array([byte_tokens.get(token, -1) for token in order])
        self.length_of_rank = np.array([len(token) for token in order])
        if not (self.id_of_rank[256:] >= 0).all():
            raise InputError(f"{name}: a merge makes a token that the vocabulary lacks")
        # what the pattern leaves out is a piece of its own, as in the reference; most patterns leave nothing out
        self.encoding = tiktoken.Encoding(name, pat_str=rf"{split}|(?:(?!{split})[\s\S])+", special_tokens={},
                                          mergeable_ranks={token: rank for rank, token in enumerate(order)})

    def encode(self, text):
        ids = self.id_of_rank[self._ranks(text)]
        return ids[ids >= 0].tolist()

    def _ranks(self, text: str) -> np.ndarray:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        try:
            return np.array(self.encoding.encode_ordinary(text), dtype=int)
        except BaseException as error:          # tiktoken's Rust code panics on some patterns, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{self.name}: the split pattern does not work ({str(error)[:200]!r})") from error

    def encode_with_spans(self, text):
        ranks = self._ranks(text)
        ids, ends = self.id_of_rank[ranks], np.cumsum(self.length_of_rank[ranks])
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            ends = _nfc_to_original(text)[ends]
        last, ids, ends = ends[-1:], ids[ids >= 0], ends[ids >= 0]
        ends[-1:] = last                        # bytes without a token belong to the token behind them, or to the last
        return ids.tolist(), _spans(ends)

    def decode(self, ids):
        return b"".join(map(self.bytes_of.__getitem__, self.text_ids(ids))).decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        return self.bytes_of[token_id]

class SentencePiece(Tokenizer):
    """A tokenizer.model with byte fallback and without normalization, as Llama 2, TinyLlama and Mistral have it."""

    def __init__(self, name: str, path: Path, eos: str | None, add_bos: bool):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a SentencePiece model ({error})") from error
        self.name, self.vocab_size = name, self.model.vocab_size()
        self.eos_id = self.model.eos_id() if eos is None else self.model.piece_to_id(eos)
        if self.eos_id < 0 or eos is not None and self.model.id_to_piece(self.eos_id) != eos:
            raise InputError(f"{path}: the end-of-sequence token {eos!r} is not a piece; added ones aren't implemented")
        self.bos_id = self.model.bos_id() if add_bos and self.model.bos_id() >= 0 else None
        is_byte = [self.model.is_byte(i) for i in range(self.vocab_size)]
        self.control = {i for i in range(self.vocab_size) if self.model.is_control(i) or self.model.is_unknown(i)}
        # every piece in the model's own form, where a space is "▁"; a byte piece is named "<0xE4>"
        pieces = zip(map(self.model.id_to_piece, range(self.vocab_size)), is_byte)
        self.bytes_of = [bytes([int(piece[3:5], 16)]) if byte else piece.encode() for piece, byte in pieces]
        hostile = "  a ﬁ\u0065\u0301\u4f60\U0001f9ff \n"          # ligature, combining mark, CJK, emoji, spaces
        found = b"".join(self.bytes_of[i] for i in self.model.encode(hostile))
        if sum(is_byte) != 256 or found != ("▁" + hostile.replace(" ", "▁")).encode():
            raise InputError(f"{path}: only SentencePiece models with byte fallback, a leading space and no "
                             "normalization are implemented (Llama 2, TinyLlama, Mistral)")

    def encode(self, text):
        return self.model.encode(text)

    def encode_with_spans(self, text):
        ids = self.encode(text)
        original = np.frombuffer(text.encode(), np.uint8)
        # bytes of the text up to each offset of the model's form: a leading "▁", and "▁" (3 bytes) for every space
        offset = np.repeat(np.arange(len(original)), np.where(original == 32, 3, 1))
        offset = np.concatenate([[0, 0, 0], offset, [len(original)]])
        return ids, _spans(offset[np.cumsum([len(self.bytes_of[i]) for i in ids], dtype=int)])

    def decode(self, ids):
        return self.model.decode(self.text_ids(ids))

    def token_bytes(self, token_id):
        piece = self.bytes_of[token_id]
        return piece if token_id in self.control else piece.replace("▁".encode(), b" ")

def _spans(ends: np.ndarray) -> list[Span]:
    ends = ends.tolist()
    return list(zip([0] + ends[:-1], ends))

def _nfc_to_original(text: str) -> np.ndarray:
    """Byte offset in NFC(text) → byte offset in text. Composition never reaches over a character that it leaves alone
    beside its neighbour, so the text is cut there and each piece that changes is stretched onto its original."""
    def nfc(part):
        return unicodedata.normalize("NFC", part)
    pieces, start = [], 0
    for i in range(1, len(text)):
        left, right = text[start:i], text[i]
        if unicodedata.combining(right) == 0 and nfc(left + right) == nfc(left) + nfc(right):
            pieces.append(left)
            start = i
    offsets, base = [], 0
    for piece in pieces + [text[start:]]:
        length, new_length = len(piece.encode()), len(nfc(piece).encode())
        offsets.append(base + np.arange(new_length) * length // new_length)
        base += length
    return np.concatenate(offsets + [[base]])

def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it is printable, else the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

ALPHABET = _alphabet()

def _from_alphabet(token: str) -> bytes:
    try:
        return bytes(ALPHABET[c] for c in token)
    except KeyError as error:
        raise InputError(f"the token {token!r} is not in GPT-2's byte alphabet: not a byte-level BPE") from error

def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model: a short name, a hub id or a folder with tokenizer.model, tokenizer.json, or vocab.json
    and merges.txt. Raises InputError where they are missing, damaged or of a kind that is not implemented."""
    folder = hub.model_dir(name_or_dir, weights=False)
    settings = read_json(folder / "tokenizer_config.json") or {}
    try:
        if (folder / "tokenizer.model").exists():
            eos, add_bos = token_text(settings, "eos_token"), settings.get("add_bos_token", True)
            tokenizer = SentencePiece(str(name_or_dir), folder / "tokenizer.model", eos, add_bos)
        else:
            tokenizer = ByteLevelBPE(str(name_or_dir), read_byte_level(folder, settings))
        tokenizer.folder = folder
        return tokenizer
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(f"{folder}: the tokenizer's files are damaged or of an unknown make ({error!r})") from error

# ----------------------------------------------------------------------------------------------------------- chunks
def chunk_numbers(spans_a: list[Span], spans_b: list[Span]) -> tuple[list[int], list[int]]:
    """For every token the number of its chunk: how many common cuts lie at or before its start."""
    sides = [np.array(spans, np.int64).reshape(-1, 2) for spans in (spans_a, spans_b)]
    cuts = np.intersect1d(sides[0][:, 1], sides[1][:, 1])
    return tuple(np.searchsorted(cuts[cuts > 0], spans[:, 0], side="right").tolist() for spans in sides)

def chunks(spans_a: list[Span], spans_b: list[Span]) -> list[tuple[range, range]]:
    """Cut one text where both tokenizations have a boundary → (tokens of a, tokens of b) for every chunk.
    EOS, given as the empty span (n, n) at the text's end on both sides, is a chunk of its own. What follows the last
    common boundary is a chunk too, of which one range may be empty."""
    ids_a, ids_b = chunk_numbers(spans_a, spans_b)
    return [(range(bisect.bisect_left(ids_a, k), bisect.bisect_right(ids_a, k)),
             range(bisect.bisect_left(ids_b, k), bisect.bisect_right(ids_b, k))) for k in sorted({*ids_a, *ids_b})]

def chunk_mask(spans_a: list[Span], spans_b: list[Span]) -> torch.Tensor:
    """M of cma.mixing_weights: (len_a, len_b) bool, true where two tokens lie in the same chunk."""
    ids_a, ids_b = chunk_numbers(spans_a, spans_b)
    return torch.tensor(ids_a).view(-1, 1) == torch.tensor(ids_b).view(1, -1)

# --------------------------------------------------------------------------------------- rows → examples → batches
@dataclass
class Sequence:
    """One side of an example: prompt + response + EOS; of the response and EOS the byte spans and chunks' numbers."""
    ids: list[int]
    prompt_length: int
    spans: list[Span]
    chunks: list[int]

    @property
    def valid(self) -> int:
        """Positions whose label is a response token or EOS."""
        return len(self.ids) - self.prompt_length

@dataclass
class Example:
    row: int                    # number in the data file, from 0
    student: Sequence
    teacher: Sequence

    @property
    def whole_chunks(self) -> int:
        """How many chunks, from the first, have the same text on both sides, of which either may be cut."""
        sides = self.student, self.teacher
        last = min(side.chunks[-1] for side in sides)
        ends = {side.spans[bisect.bisect_right(side.chunks, last) - 1][1] for side in sides}
        return last + (len(ends) == 1)

def encode_prompt(prompt: str, tokenizer: Tokenizer, max_prompt_length: int) -> tuple[list[int], bool]:
    """BOS where the model has one, then the prompt, cut to the limit in tokens → (ids, whether it was cut)."""
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    return ids[:max_prompt_length], len(ids) > max_prompt_length

def encode_rows(rows: list[Row], student: Tokenizer, teacher: Tokenizer, max_length: int, max_prompt_length: int):
    """Tokenize every row twice → (examples, number of prompts cut, rows dropped for want of a prompt or valid token).
    Prompt and response are tokenized apart, as at generation time; EOS is appended, then everything cut to max_length
    tokens. Texts that both sides share a tokenizer for are tokenized once."""
    examples, cut = [], 0
    for number, row in enumerate(rows):
        whole, sides, was_cut = [], [], False
        end = len(row.outputs[0].encode())
        for tokenizer in dict.fromkeys([student, teacher]):
            prompt, prompt_cut = encode_prompt(row.prompt, tokenizer, max_prompt_length)
            response, spans = tokenizer.encode_with_spans(row.outputs[0])
            whole.append((prompt, response + [tokenizer.eos_id], [*spans, (end, end)]))
            was_cut |= prompt_cut
        for (prompt, response, spans), numbers in zip(whole, chunk_numbers(whole[0][2], whole[-1][2])):     # uncut
            ids = (prompt + response)[:max_length]
            valid = max(len(ids) - len(prompt), 0)
            sides.append(Sequence(ids, len(ids) - valid, spans[:valid], numbers[:valid]))
        cut += was_cut
        if all(side.valid and side.prompt_length for side in sides):
            examples.append(Example(number, sides[0], sides[-1]))
    return examples, cut, len(rows) - len(examples)

def make_batches(examples: list[Example], batch_size: int, seed: int) -> list[list[Example]]:
    """Shuffle, then sort by length within stretches of 32 batches, so that a batch's rows are about equally long and
    little is padded; the batches themselves come in random order. The last, smaller one is kept."""
    generator = random.Random(seed)
    order = examples[:]
    generator.shuffle(order)
    stretch, batches = 32 * batch_size, []
    for start in range(0, len(order), stretch):
        part = sorted(order[start:start + stretch], key=lambda e: len(e.student.ids) + len(e.teacher.ids))
        batches += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    generator.shuffle(batches)
    return batches

def collate(examples: list[Example], student_pad: int, teacher_pad: int,
            align_on: str | None = None) -> dict[str, torch.Tensor]:
    """Right-pad to the longest of the batch → student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T).
    ids are the tokens but the last, labels the next token where it belongs to the response or is EOS, else −100.
    align_on adds student_chunks (B, S) and teacher_chunks (B, T): the number of a valid position's chunk, "label": of
    its label token, "input": of its input token, where the prompt's last tokens make a chunk of their own; and
    student_starts, teacher_starts: the byte of the response at which a valid position's label begins."""
    batch = {}
    for side, pad in {"student": student_pad, "teacher": teacher_pad}.items():
        sequences = [getattr(example, side) for example in examples]
        shape = len(sequences), max(len(s.ids) for s in sequences) - 1
        ids, labels = torch.full(shape, pad), torch.full(shape, -100)
        chunks, starts = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        for i, s in enumerate(sequences):
            tokens, valid = torch.tensor(s.ids), slice(s.prompt_length - 1, len(s.ids) - 1)
            ids[i, :len(tokens) - 1] = tokens[:-1]
            labels[i, valid] = tokens[s.prompt_length:]
            if align_on:
                chunks[i, valid] = torch.tensor(s.chunks if align_on == "label" else [-1] + s.chunks[:-1])
                starts[i, valid] = torch.tensor([begin for begin, _ in s.spans])
        batch |= {f"{side}_ids": ids, f"{side}_labels": labels}
        batch |= {f"{side}_chunks": chunks, f"{side}_starts": starts} if align_on else {}
    return batch

def left_pad(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation → ids (B, T) and mask (B, T), true on real tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask
