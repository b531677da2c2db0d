"""Two tokenizers, one text: ids with byte spans, the chunks both agree on, padded batches.

    tokenizer = load_tokenizer("gpt2")                      # or a folder in the hub's layout
    ids, spans = tokenizer.encode_with_spans("héllo")       # spans: UTF-8 byte offsets

- Byte-level BPE (GPT-2, Qwen, SmolLM2, Llama 3) runs as a tiktoken Encoding made from the model's
  own files, SentencePiece (Llama 2, TinyLlama, Mistral) through sentencepiece; both give the ids of
  the reference libraries.
- Control tokens in a text are text: "<|endoftext|>" in a row of data ends nothing.
- A chunk is what lies between two byte offsets at which BOTH tokenizations have a boundary.
"""

import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch

from data import Row
from hub.download import model_folder
from hub.tokenizer_files import ALPHABET, ByteLevelConfig, read_byte_level, read_json, token_text
from runtime.config import InputError

Span = tuple[int, int]  # (start, end) in bytes


# --------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """What both kinds share.

    eos_id closes a response, bos_id (or None) opens a prompt, vocab_size is the largest id + 1,
    control holds the ids that no text gives, folder the files."""

    folder: Path
    vocab_size: int
    eos_id: int
    bos_id: int | None
    control: set[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids, and the bytes of the text that each stands for. The spans tile the text. Where
        normalization changed characters, the boundaries inside them are spread over them."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids: control tokens give nothing, broken UTF-8 gives U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text; of a control token its name."""

    def text_ids(self, ids: list[int]) -> list[int]:
        """The ids that are text. A model's head may be larger than the vocabulary (Qwen's are)."""
        return [i for i in ids if i < self.vocab_size and i not in self.control]


class ByteLevelBPE(Tokenizer):
    """Byte pair encoding over UTF-8 bytes, in GPT-2's form, run by tiktoken."""

    def __init__(self, name: str, config: ByteLevelConfig):
        self.name, self.nfc = name, config.nfc
        self.eos_id, self.bos_id = config.eos_id, config.bos_id
        self.control = set(config.control.values())
        self.vocab_size = max(*config.vocabulary.values(), *self.control) + 1
        self.bytes_by_id = [b""] * self.vocab_size
        id_of_bytes = {}
        for token, token_id in config.vocabulary.items():
            if token_id not in self.control:
                self.bytes_by_id[token_id] = self._bytes(token)
                id_of_bytes[self._bytes(token)] = token_id
        for token, token_id in config.control.items():
            self.bytes_by_id[token_id] = token.encode()

        # tiktoken takes ids for merge priorities, so it is given priorities: first the bytes, then
        # the merges in their order.
        if config.merges is None:
            order = sorted(id_of_bytes, key=id_of_bytes.get)
        else:
            order = [bytes([byte]) for byte in range(256)]
            order += [self._bytes(left + right) for left, right in config.merges]
            order = list(dict.fromkeys(order))
        # A byte that the vocabulary lacks gives no token (SmolLM2 lacks some control characters).
        self.id_of_rank = np.array([id_of_bytes.get(token, -1) for token in order])
        self.length_of_rank = np.array([len(token) for token in order])
        if (self.id_of_rank[256:] < 0).any():
            raise InputError(f"{name}: a merge makes a token that the vocabulary lacks")
        # What the pattern leaves out is a word of its own, as in the reference.
        pattern = rf"{config.split}|(?:(?!{config.split})[\s\S])+"
        self.encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            special_tokens={},
            mergeable_ranks={token: rank for rank, token in enumerate(order)},
        )

    def _bytes(self, token: str) -> bytes:
        try:
            return bytes(ALPHABET[character] for character in token)
        except KeyError as error:
            raise InputError(
                f"{self.name}: the token {token!r} is not in GPT-2's byte alphabet, "
                "so this is no byte-level BPE"
            ) from error

    def _ranks(self, text: str) -> np.ndarray:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return np.array(self.encoding.encode_ordinary(text), dtype=int)

    def encode(self, text):
        ids = self.id_of_rank[self._ranks(text)]
        return ids[ids >= 0].tolist()

    def encode_with_spans(self, text):
        ranks = self._ranks(text)
        ids, ends = self.id_of_rank[ranks], np.cumsum(self.length_of_rank[ranks])
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            ends = _nfc_to_original(text)[ends]
        known = ids >= 0
        last = ends[-1:]
        ids, ends = ids[known], ends[known]
        ends[-1:] = last  # bytes without a token belong to the token after them, or the last
        return ids.tolist(), _spans(ends)

    def decode(self, ids):
        text = b"".join(self.bytes_by_id[i] for i in self.text_ids(ids))
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        return self.bytes_by_id[token_id]


class SentencePiece(Tokenizer):
    """A tokenizer.model with byte fallback and no normalization: Llama 2, TinyLlama, Mistral."""

    def __init__(self, path: Path, eos: str | None, add_bos: bool):
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a SentencePiece model ({error})") from error
        self.model, self.vocab_size = model, model.vocab_size()
        self.eos_id = model.eos_id() if eos is None else model.piece_to_id(eos)
        if eos is not None and model.id_to_piece(self.eos_id) != eos:
            raise InputError(f"{path}: the end-of-sequence token {eos!r} is not one of its pieces")
        self.bos_id = model.bos_id() if add_bos and model.bos_id() >= 0 else None
        self.control, self.pieces = set(), []
        for i in range(self.vocab_size):
            piece = model.id_to_piece(i)
            if model.is_control(i) or model.is_unknown(i):
                self.control.add(i)
            # In the model's own form, where a space is "▁"; a byte's piece is named "<0xE4>".
            self.pieces.append(bytes([int(piece[3:5], 16)]) if model.is_byte(i) else piece.encode())
        # A ligature, a combining mark, CJK, an emoji and spaces must come back as they are.
        hostile = "  a ﬁ\u0065\u0301\u4f60\U0001f9ff \n"
        encoded = b"".join(self.pieces[i] for i in model.encode(hostile))
        if encoded != ("▁" + hostile.replace(" ", "▁")).encode():
            raise InputError(
                f"{path}: only SentencePiece models with byte fallback, a leading "
                "space and no normalization are implemented (Llama 2, Mistral)"
            )

    def encode(self, text):
        return self.model.encode(text)

    def encode_with_spans(self, text):
        ids = self.encode(text)
        original = np.frombuffer(text.encode(), np.uint8)
        # Offset in the model's form → offset in the text: a leading "▁" (3 bytes) stands for
        # nothing, and every space became 3 bytes.
        lengths = np.where(original == ord(" "), 3, 1)
        offset = np.repeat(np.arange(len(original)), lengths)
        offset = np.concatenate([[0, 0, 0], offset, [len(original)]])
        ends = np.cumsum([len(self.pieces[i]) for i in ids], dtype=int)
        return ids, _spans(offset[ends])

    def decode(self, ids):
        return self.model.decode(self.text_ids(ids))

    def token_bytes(self, token_id):
        if token_id in self.control:
            return self.pieces[token_id]
        return self.pieces[token_id].replace("▁".encode(), b" ")


def _spans(ends: np.ndarray) -> list[Span]:
    ends = ends.tolist()
    return list(zip([0] + ends[:-1], ends))


def _nfc_to_original(text: str) -> np.ndarray:
    """Byte offset in NFC(text) → byte offset in text.

    The text is cut where composition does not reach over the cut, and each piece that changes is
    stretched onto its original."""

    def nfc(part):
        return unicodedata.normalize("NFC", part)

    pieces, start = [], 0
    for i in range(1, len(text)):
        left, right = text[start:i], text[i]
        if unicodedata.combining(right) == 0 and nfc(left + right) == nfc(left) + nfc(right):
            pieces.append(left)
            start = i
    pieces.append(text[start:])
    offsets, base = [], 0
    for piece in pieces:
        length, new_length = len(piece.encode()), len(nfc(piece).encode())
        offsets.append(base + np.arange(new_length) * length // new_length)
        base += length
    return np.concatenate(offsets + [[base]])


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a model: a short name, a hub id, or a folder with tokenizer.model,
    tokenizer.json, or vocab.json and merges.txt.

    Raises InputError where they are missing, damaged or of a kind that is not implemented."""
    folder = model_folder(name, weights=False)
    settings = read_json(folder / "tokenizer_config.json") or {}
    try:
        if (folder / "tokenizer.model").exists():
            tokenizer = SentencePiece(
                folder / "tokenizer.model",
                token_text(settings, "eos_token"),
                settings.get("add_bos_token", True),
            )
        else:
            tokenizer = ByteLevelBPE(str(folder), read_byte_level(folder, settings))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: the tokenizer's files are damaged or of an unknown make ({error!r})"
        ) from error
    tokenizer.folder = folder
    return tokenizer


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers have the same tokens under the same ids."""
    if (a.vocab_size, a.eos_id) != (b.vocab_size, b.eos_id):
        return False
    return all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))


# ------------------------------------------------------------------------------------------- chunks


def chunk_numbers(spans_a: list[Span], spans_b: list[Span]) -> tuple[list[int], list[int]]:
    """The chunk of every token, counted from 0: how many common cuts lie at or before its start."""
    starts_a, ends_a = np.array(spans_a, np.int64).reshape(-1, 2).T
    starts_b, ends_b = np.array(spans_b, np.int64).reshape(-1, 2).T
    cuts = np.intersect1d(ends_a, ends_b)
    cuts = cuts[cuts > 0]
    return (
        np.searchsorted(cuts, starts_a, side="right").tolist(),
        np.searchsorted(cuts, starts_b, side="right").tolist(),
    )


def chunk_mask(spans_a: list[Span], spans_b: list[Span]) -> torch.Tensor:
    """M: (len_a, len_b) bool, true where two tokens lie in the same chunk."""
    numbers_a, numbers_b = chunk_numbers(spans_a, spans_b)
    return torch.tensor(numbers_a)[:, None] == torch.tensor(numbers_b)[None]


# ---------------------------------------------------------------------- rows → examples → batches


@dataclass
class Sequence:
    """One side of an example: prompt + response + EOS; spans and chunks of the response and EOS."""

    ids: list[int]
    prompt_length: int
    spans: list[Span]
    chunks: list[int]

    @property
    def response_ids(self) -> list[int]:
        """The tokens of the response and EOS: the labels."""
        return self.ids[self.prompt_length :]


@dataclass
class Example:
    row: int  # number in the data file, from 0
    text: str  # the response
    student: Sequence
    teacher: Sequence

    @property
    def num_whole_chunks(self) -> int:
        """How many chunks, from the first, have the same text on both sides, either of which may
        be cut at the length limit."""
        last = min(self.student.chunks[-1], self.teacher.chunks[-1])
        ends = set()
        for side in (self.student, self.teacher):
            ends.add(max(end for (_, end), chunk in zip(side.spans, side.chunks) if chunk <= last))
        return last + 1 if len(ends) == 1 else last


def encode_prompt(prompt: str, tokenizer: Tokenizer, max_length: int) -> tuple[list[int], bool]:
    """BOS where the model has one, then the prompt, cut to a number of tokens → (ids, was cut)."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id] + ids
    return ids[:max_length], len(ids) > max_length


def encode_rows(
    rows: list[Row], student: Tokenizer, teacher: Tokenizer, max_length: int, max_prompt_length: int
) -> tuple[list[Example], int, int]:
    """Tokenize every row twice → (examples, prompts cut, rows dropped without a response token).

    Prompt and response are tokenized apart, as in generation; EOS is appended, then everything is
    cut to max_length tokens. Where both sides have one tokenizer, it runs once."""
    examples, num_cut = [], 0
    for number, row in enumerate(rows):
        end = len(row.outputs[0].encode())
        encoded, any_cut = {}, False
        for tokenizer in (student, teacher):
            if tokenizer not in encoded:
                prompt, cut = encode_prompt(row.prompt, tokenizer, max_prompt_length)
                response, spans = tokenizer.encode_with_spans(row.outputs[0])
                if row.ended:
                    response, spans = response + [tokenizer.eos_id], spans + [(end, end)]
                encoded[tokenizer] = prompt, response, spans
                any_cut = any_cut or cut
        num_cut += any_cut
        numbers = chunk_numbers(encoded[student][2], encoded[teacher][2])
        sides = []
        for tokenizer, chunk_of_token in zip((student, teacher), numbers):
            prompt, response, spans = encoded[tokenizer]
            ids = (prompt + response)[:max_length]
            kept = max(len(ids) - len(prompt), 0)
            sides.append(Sequence(ids, len(ids) - kept, spans[:kept], chunk_of_token[:kept]))
        if all(side.response_ids and side.prompt_length for side in sides):
            examples.append(Example(number, row.outputs[0], *sides))
    return examples, num_cut, len(rows) - len(examples)


def make_batches(examples: list[Example], size: int, seed: int) -> list[list[Example]]:
    """The rows of an epoch's steps: a plain shuffle, `size` at a time. The last, smaller one is
    kept."""
    order = examples[:]
    random.Random(seed).shuffle(order)
    return [order[i : i + size] for i in range(0, len(order), size)]


def collate(examples: list[Example], student_pad: int, teacher_pad: int) -> dict[str, torch.Tensor]:
    """Right-pad to the longest row → student_ids, student_labels (B, S), teacher_ids,
    teacher_labels (B, T).

    ids are the tokens but the last; labels the next token where that is of the response or EOS,
    else −100."""
    student_ids, student_labels = _pad([example.student for example in examples], student_pad)
    teacher_ids, teacher_labels = _pad([example.teacher for example in examples], teacher_pad)
    return dict(
        student_ids=student_ids,
        student_labels=student_labels,
        teacher_ids=teacher_ids,
        teacher_labels=teacher_labels,
    )


def _pad(sequences: list[Sequence], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(sequences), max(len(sequence.ids) for sequence in sequences) - 1
    ids, labels = torch.full(shape, pad), torch.full(shape, -100)
    for i, sequence in enumerate(sequences):
        tokens, first = torch.tensor(sequence.ids), sequence.prompt_length
        ids[i, : len(tokens) - 1] = tokens[:-1]
        labels[i, first - 1 : len(tokens) - 1] = tokens[first:]
    return ids, labels


def left_pad(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation → ids (B, T), and mask (B, T), true on real tokens."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = True
    return ids, mask
