"""Two tokenizers, one text: ids with byte spans, the chunks both agree on, padded batches.

    tokenizer = load_tokenizer("gpt2")                      # or a folder in the hub's layout
    ids, spans = tokenizer.encode_with_spans("héllo")       # spans: UTF-8 byte offsets

- Byte-level BPE (GPT-2, Qwen, SmolLM2, Llama 3) runs as a tiktoken Encoding made from the model's
  own files, a tokenizer.model (Llama 2, TinyLlama, Mistral) through sentencepiece, and any other
  tokenizer.json through the tokenizers library; all give the ids of the reference libraries.
- Control tokens in a row's text are text: "<|endoftext|>" ends nothing. A chat template's are
  control tokens.
- A chunk is what lies between two byte offsets at which BOTH tokenizations have a boundary.
"""

import json
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import sentencepiece
import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

from data import Row
from hub.chat_template import ANSWER, ChatTemplate, read_chat_template
from hub.download import model_folder
from hub.tokenizer_files import (
    ALPHABET,
    Added,
    ByteLevelConfig,
    NotPlain,
    bos_token,
    end_ids,
    from_tokenizer_json,
    from_vocabulary_and_merges,
    read_added_tokens,
    read_json,
    read_settings,
)
from prompts import fit_prompt, prompt_text
from runtime.config import InputError
from runtime.distributed import print_first

Span = tuple[int, int]  # (start, end) in bytes


# --------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """What all kinds share.

    eos_id closes a response, eos_ids end one that is generated, bos_id (or None) opens a prompt,
    vocab_size is the largest id + 1, control holds the ids that no text gives, id_of the tokens as
    the files write them, identity is what cuts a text, prompt_format and template say how prompts
    are put (prompts.py), folder is where the files are. first_space: whether SentencePiece's space
    stands before a text, an answer, too.
    """

    folder: Path
    vocab_size: int
    eos_id: int
    eos_ids: list[int]
    bos_id: int | None
    control: set[int]
    id_of: dict[str, int]
    identity: object
    prompt_format: str = "auto"
    template: ChatTemplate | None = None
    first_space: bool = True

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids, and the bytes of the text that each stands for. The spans tile the text. Where
        normalization changed characters, the boundaries inside them are spread over them."""

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are meant: a rendered chat template."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids: control tokens give nothing, broken UTF-8 gives U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text; of a control token its name."""

    def text_ids(self, ids: list[int]) -> list[int]:
        """The ids that are text. A model's head may be larger than the vocabulary (Qwen's are)."""
        return [i for i in ids if i < self.vocab_size and i not in self.control]

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens of a row's prompt, in this model's own words, BOS first where it has one."""
        text = prompt_text(row, self.prompt_format, self.template)
        if self.prompt_format == "chat":
            return self.encode_with_control(text)  # it has its BOS
        bos = [] if self.bos_id is None else [self.bos_id]
        return bos + self.encode(text)


class Splitter:
    """Finds added tokens in a text: (text) → pieces, each with its token's id or None."""

    def __init__(self, added: dict[str, Added]):
        self.ids, patterns = [], []
        for name, token in sorted(added.items(), key=lambda item: -len(item[0])):
            pattern = regex.escape(name)
            if token.single_word:
                pattern = rf"(?<!\w){pattern}(?!\w)"
            before = r"\s*" if token.lstrip else ""
            after = r"\s*" if token.rstrip else ""
            patterns.append(f"({before}{pattern}{after})")
            self.ids.append(token.id)
        self.pattern = regex.compile("|".join(patterns)) if patterns else None

    def __call__(self, text: str) -> list[tuple[str, int | None]]:
        if self.pattern is None:
            return [(text, None)]
        pieces, end = [], 0
        for match in self.pattern.finditer(text):
            pieces.append((text[end : match.start()], None))
            pieces.append((match[0], self.ids[match.lastindex - 1]))
            end = match.end()
        pieces.append((text[end:], None))
        return [piece for piece in pieces if piece[0]]


class ByteLevelBPE(Tokenizer):
    """Byte pair encoding over UTF-8 bytes, in GPT-2's form, run by tiktoken."""

    def __init__(self, name: str, config: ByteLevelConfig, added: dict[str, Added]):
        self.name, self.nfc = name, config.nfc
        self.id_of = config.vocabulary | {token: of.id for token, of in added.items()}
        of_text = {token: of for token, of in added.items() if not of.control}
        self.control = {of.id for of in added.values() if of.control}
        self.identity = config, of_text
        self.split, self.split_all = Splitter(of_text), Splitter(added)
        added_ids = {of.id for of in added.values()}
        self.vocab_size = max(*config.vocabulary.values(), *added_ids) + 1
        self.bytes_by_id = [b""] * self.vocab_size
        id_of_bytes = {}
        for token, token_id in config.vocabulary.items():
            if token_id not in added_ids:
                self.bytes_by_id[token_id] = self._bytes(token)
                id_of_bytes[self._bytes(token)] = token_id
        for token, of in added.items():
            self.bytes_by_id[of.id] = token.encode()

        # tiktoken takes ids for merge priorities, so it is given priorities: first the bytes, then
        # the merges in their order.
        order = [bytes([byte]) for byte in range(256)]
        order += [self._bytes(left + right) for left, right in config.merges]
        order = list(dict.fromkeys(order))
        # A byte that the vocabulary lacks gives no token (SmolLM2 lacks some control characters).
        self.id_of_rank = np.array([id_of_bytes.get(token, -1) for token in order])
        self.length_of_rank = np.array([len(token) for token in order])
        if (self.id_of_rank[256:] < 0).any():
            raise NotPlain("a merge makes a token that is no word of the vocabulary")
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

    def _ids_and_ends(self, text: str, split: Splitter) -> tuple[np.ndarray, np.ndarray]:
        """Ids, −1 for a byte without a token, and where each ends in the NFC of the text."""
        ids, lengths = [], []
        for piece, added_id in split(unicodedata.normalize("NFC", text) if self.nfc else text):
            if added_id is not None:
                ids.append([added_id])
                lengths.append([len(piece.encode())])
                continue
            ranks = np.array(self.encoding.encode_ordinary(piece), dtype=int)
            ids.append(self.id_of_rank[ranks])
            lengths.append(self.length_of_rank[ranks])
        if not ids:
            return np.zeros(0, int), np.zeros(0, int)
        return np.concatenate(ids), np.cumsum(np.concatenate(lengths))

    def encode_with_spans(self, text):
        ids, ends = self._ids_and_ends(text, self.split)
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            ends = _nfc_to_original(text)[ends]
        known = ids >= 0
        last = ends[-1:]
        ids, ends = ids[known], ends[known]
        ends[-1:] = last  # bytes without a token belong to the token after them, or the last
        return ids.tolist(), _spans(ends)

    def encode_with_control(self, text):
        ids, _ = self._ids_and_ends(text, self.split_all)
        return ids[ids >= 0].tolist()

    def decode(self, ids):
        text = b"".join(self.bytes_by_id[i] for i in self.text_ids(ids))
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        return self.bytes_by_id[token_id]


class SentencePiece(Tokenizer):
    """A tokenizer.model with byte fallback and no normalization: Llama 2, TinyLlama, Mistral."""

    def __init__(self, path: Path, settings: dict, added: dict[str, Added]):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.model, self.vocab_size = model, model.vocab_size()
        add_bos = settings.get("add_bos_token", True)
        self.bos_id = model.bos_id() if add_bos and model.bos_id() >= 0 else None
        self.prefix_always = settings.get("legacy", True) is not False
        self.control, self.pieces, control = set(), [], {}
        for i in range(self.vocab_size):
            piece = model.id_to_piece(i)
            if model.is_control(i) or model.is_unknown(i):
                self.control.add(i)
                control[piece] = Added(i)
            elif piece in added and added[piece].control:
                raise NotPlain(f"its control token {piece} is found in texts")
            # In the model's own form, where a space is "▁"; a byte's piece is named "<0xE4>".
            self.pieces.append(bytes([int(piece[3:5], 16)]) if model.is_byte(i) else piece.encode())
        self.id_of = {model.id_to_piece(i): i for i in range(self.vocab_size)}
        self.split_all = Splitter(control)
        self.identity = model.serialized_model_proto()
        # A ligature, a combining mark, CJK, an emoji and spaces must come back as they are.
        hostile = "  a ﬁ\u0065\u0301\u4f60\U0001f9ff \n"
        encoded = b"".join(self.pieces[i] for i in model.encode(hostile))
        if encoded != ("▁" + hostile.replace(" ", "▁")).encode():
            raise NotPlain("it has no byte fallback, no leading space or a normalization")
        if settings.get("add_prefix_space", True) is False:
            raise NotPlain("add_prefix_space is false")

    def encode_with_spans(self, text):
        ids = self.model.encode(text) if self.first_space else self._encode_behind(text)
        original = np.frombuffer(text.encode(), np.uint8)
        # Offset in the model's form → offset in the text: a leading "▁" (3 bytes) stands for
        # nothing, and every space became 3 bytes.
        lengths = np.where(original == ord(" "), 3, 1)
        offset = np.repeat(np.arange(len(original)), lengths)
        offset = np.concatenate([[0] * (3 * self.first_space), offset, [len(original)]])
        ends = np.cumsum([len(self.pieces[i]) for i in ids], dtype=int)
        return ids, _spans(offset[ends])

    def _encode_behind(self, text: str) -> list[int]:
        """As the text would stand behind other text: without the leading "▁"."""
        return self.model.encode("\x00" + text)[len(self.model.encode("\x00")) :]

    def encode_with_control(self, text):
        ids = []
        for number, (piece, control_id) in enumerate(self.split_all(text)):
            if control_id is not None:
                ids.append(control_id)
            elif number == 0 or self.prefix_always:
                ids += self.model.encode(piece)
            else:
                ids += self._encode_behind(piece)
        return ids

    def decode(self, ids):
        return self.model.decode(self.text_ids(ids))

    def token_bytes(self, token_id):
        if token_id in self.control:
            return self.pieces[token_id]
        return self.pieces[token_id].replace("▁".encode(), b" ")


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer.json, run by the tokenizers library: SentencePiece without a
    tokenizer.model (Gemma, Phi-3, what transformers 5 saves of a Llama 2) and unusual BPEs."""

    def __init__(self, path: Path, whole: dict, added: dict[str, Added], reason: str):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise InputError(
                f"{path}: needs a library, because {reason}:  pip install tokenizers"
            ) from error
        text = json.dumps({**whole, "truncation": None, "padding": None})
        self.identity = [whole.get(part) for part in ("normalizer", "pre_tokenizer", "model")]
        self.identity.append({token: of for token, of in added.items() if not of.control})
        try:
            self.plain, self.with_control = (Library.from_str(text) for _ in range(2))
        except Exception as error:  # the library's own
            raise InputError(f"{path}: the tokenizers library refuses it ({error})") from error
        self.plain.encode_special_tokens = True  # control tokens in a text are text
        left_out = {token["content"] for token in whole.get("added_tokens", [])} - added.keys()
        self.id_of = self.plain.get_vocab(with_added_tokens=True)
        self.id_of = {token: i for token, i in self.id_of.items() if token not in left_out}
        self.vocab_size = max(self.id_of.values()) + 1
        self.control = {of.id for of in added.values() if of.control}
        parts = json.dumps([whole.get("pre_tokenizer"), whole.get("decoder")])
        kinds = set(re.findall(r'"type": "(\w+)"', parts))
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise InputError(f"{path}: is neither byte-level nor SentencePiece, but {kinds}")
        self.bytes_by_id = [b""] * self.vocab_size
        for token, i in self.id_of.items():
            if i in self.control or token in added and "ByteLevel" in kinds:
                self.bytes_by_id[i] = token.encode()
            elif "ByteLevel" in kinds:
                self.bytes_by_id[i] = bytes(ALPHABET[character] for character in token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                self.bytes_by_id[i] = bytes([int(token[3:5], 16)])
            else:
                self.bytes_by_id[i] = token.replace("▁", " ").encode()

    def encode_with_spans(self, text):
        before = "" if self.first_space else "\x00"  # behind a text there is no space
        encoding = self.plain.encode(before + text, add_special_tokens=False)
        skipped = len(self.plain.encode(before, add_special_tokens=False).ids)
        ids, original = encoding.ids[skipped:], text.encode()
        ends = np.cumsum([len(self.bytes_by_id[i]) for i in ids], dtype=int)
        made = b"".join(self.bytes_by_id[i] for i in ids)
        if made == b" " + original:
            ends = ends - 1  # the leading space stands for nothing
        elif made != original:
            # The library's offsets, in characters. Tokens of one character share it evenly.
            offsets = np.array(encoding.offsets, int).reshape(-1, 2)[skipped:] - len(before)
            byte_of = np.cumsum([0, *(len(character.encode()) for character in text)])
            starts, stops = offsets.T
            ends = byte_of[stops]
            for start in np.unique(starts):
                same = np.flatnonzero(starts == start)
                begin, size = byte_of[start], ends[same[-1]] - byte_of[start]
                ends[same] = begin + size * (np.arange(len(same)) + 1) // len(same)
            ends[-1:] = len(original)
        return ids, _spans(np.maximum.accumulate(ends))

    def encode_with_control(self, text):
        return self.with_control.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.plain.decode(self.text_ids(ids))

    def token_bytes(self, token_id):
        return self.bytes_by_id[token_id]


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


def load_tokenizer(name: str | Path, prompt_format: str = "auto") -> Tokenizer:
    """The tokenizer of a model: a short name, a hub id, or a folder with tokenizer.model,
    tokenizer.json, or vocab.json and merges.txt.

    prompt_format: how the model's prompts are put. auto: as in the training by train.py that made
    it, else by the chat template where it has one. Where that is "chat", EOS is the token that ends
    the assistant's turn. Raises InputError where files are missing, damaged or not implemented."""
    folder = model_folder(name, weights=False)
    settings, whole = read_settings(folder), read_json(folder / "tokenizer.json")
    try:
        added = read_added_tokens(folder, settings, whole or {})
        tokenizer = _read_tokenizer(folder, settings, whole, added)
        tokenizer.folder = folder
        tokenizer.eos_ids = end_ids(folder, settings, tokenizer.id_of)
        if not isinstance(tokenizer, SentencePiece):
            bos = bos_token(whole or {}, settings)
            tokenizer.bos_id = None if bos is None else tokenizer.id_of[bos]
        tokenizer.template = read_chat_template(folder, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: the tokenizer's files are damaged or of an unknown make ({error!r})"
        ) from error
    if prompt_format == "auto":
        trained = read_json(folder / "training.json") or {}
        prompt_format = trained.get("prompt_format", "chat" if tokenizer.template else "auto")
    tokenizer.prompt_format = prompt_format
    if prompt_format == "chat":
        if tokenizer.template is None:
            raise InputError(f"{folder}: has no chat template (chat_template.jinja), so no 'chat'")
        after = tokenizer.encode_with_control(tokenizer.template.after_answer())
        ends = [i for i in after if i in tokenizer.control]
        tokenizer.eos_ids = list(dict.fromkeys([*ends[:1], *tokenizer.eos_ids]))
        _answer_as_in_template(tokenizer)
    tokenizer.eos_id = tokenizer.eos_ids[0]
    return tokenizer


def _answer_as_in_template(tokenizer: Tokenizer) -> None:
    """Leave out the space before an answer where the template's conversations, encoded whole, have
    none: behind a line's end, say, in place of a control token."""
    prompt, conversation = tokenizer.template.prompt_and_conversation()
    if not conversation.startswith(prompt):
        print_first(
            f"note: {tokenizer.folder}: its chat template's conversations lack what its prompts "
            f"end with, {prompt[-20:]!r} (models that think first have it); answers are put behind "
            "that all the same"
        )
        return
    whole, prompt_ids = map(tokenizer.encode_with_control, (conversation, prompt))

    def is_there() -> bool:
        ids = prompt_ids + tokenizer.encode(ANSWER)
        return whole[: len(ids)] == ids

    if not is_there():
        tokenizer.first_space = False
        tokenizer.first_space = not is_there()


def _read_tokenizer(folder: Path, settings: dict, whole: dict | None, added: dict) -> Tokenizer:
    """tokenizer.model, or else tokenizer.json or vocab.json and merges.txt."""
    path, reason = folder / "tokenizer.model", None
    if path.exists():
        try:
            tokenizer = SentencePiece(path, settings, added)
            new = [token for token, of in added.items() if of.id >= tokenizer.vocab_size]
            if not new:
                return tokenizer
            raise NotPlain(f"it lacks the added tokens {', '.join(new)}")
        except (RuntimeError, OSError) as error:  # Llama 3's is a list of tokens
            reason = f"not a SentencePiece model ({error})"
        except NotPlain as error:
            reason = str(error)
        if whole is None:
            raise InputError(f"{path}: {reason}, which is read from a tokenizer.json only")
    try:
        if whole is None:
            config = from_vocabulary_and_merges(folder, settings)
        else:
            config = from_tokenizer_json(whole)
        id_of = config.vocabulary | {token: of.id for token, of in added.items()}
        ends = end_ids(folder, settings, id_of)
        of_text = set(ALPHABET).union(left + right for left, right in config.merges)
        for token, token_id in id_of.items():
            if token_id in ends and token not in of_text:
                added[token] = Added(token_id)  # no text ends an answer
        return ByteLevelBPE(str(folder), config, added)
    except NotPlain as error:
        if whole is None:
            raise InputError(f"{folder}: {error}; add tokenizer.json") from error
        return LibraryTokenizer(folder / "tokenizer.json", whole, added, str(error))


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers cut every text into the same tokens with the same ids, whatever opens
    a prompt and ends an answer."""
    return type(a) is type(b) and a.identity == b.identity


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
    row: int  # place among the rows given to encode_rows; −1: nothing of it is kept
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


def encode_prompts(
    row: Row, tokenizers: list[Tokenizer], max_length: int
) -> tuple[list[list[int]], bool]:
    """A row's prompt by each tokenizer → (ids of each, was it cut). What has more than max_length
    tokens on any side is cut in its text, for all alike (prompts.fit_prompt)."""

    def fits(row):
        return all(len(tokenizer.prompt_ids(row)) <= max_length for tokenizer in tokenizers)

    try:
        prompts = [tokenizer.prompt_ids(row) for tokenizer in tokenizers]
    except InputError as error:  # a chat template's
        raise InputError(f"{error}; the row is {row.prompt!r:.60}") from error
    if max(map(len, prompts)) <= max_length:
        return prompts, False
    fitted = fit_prompt(row, fits)
    prompts = [tokenizer.prompt_ids(fitted)[-max_length:] for tokenizer in tokenizers]
    return prompts, fitted != row


def encode_prompt(row: Row, tokenizer: Tokenizer, max_length: int) -> tuple[list[int], bool]:
    """encode_prompts for one model."""
    (ids,), cut = encode_prompts(row, [tokenizer], max_length)
    return ids, cut


def encode_rows(
    rows: list[Row], student: Tokenizer, teacher: Tokenizer, max_length: int, max_prompt_length: int
) -> tuple[list[Example], int, int]:
    """Tokenize every row twice → (examples, prompts cut, rows dropped without a response token).

    Prompt and response are tokenized apart, as in generation; EOS is appended, then the response is
    cut to what max_length leaves beside the longer prompt. A prompt that is too long for one side
    is cut in its text, for both. Where both sides have one tokenizer, it runs once."""
    tokenizers = list(dict.fromkeys((student, teacher)))
    examples, num_cut = [], 0
    for number, row in enumerate(rows):
        prompts, cut = encode_prompts(row, tokenizers, max_prompt_length)
        num_cut += cut
        end = len(row.outputs[0].encode())
        encoded = {}
        for tokenizer, prompt in zip(tokenizers, prompts):
            response, spans = tokenizer.encode_with_spans(row.outputs[0])
            if row.ended:
                response, spans = response + [tokenizer.eos_id], spans + [(end, end)]
            encoded[tokenizer] = prompt, response, spans
        numbers = chunk_numbers(encoded[student][2], encoded[teacher][2])
        room = max(max_length - max(map(len, prompts)), 0)  # alike, so that kd's positions meet
        sides = []
        for tokenizer, chunk_of_token in zip((student, teacher), numbers):
            prompt, response, spans = encoded[tokenizer]
            ids = prompt + response[:room]
            sides.append(Sequence(ids, len(prompt), spans[:room], chunk_of_token[:room]))
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
    """Right-pad to the longest row → student_ids, student_mask, student_labels (B, S) and
    student_chunks (N,), and the teacher's.

    ids are the tokens but the last; the mask is true on them; labels are the next token where that
    is of the response or EOS, else −100. Chunks are those of the N labels, of all rows one after
    the other, each row's counted from 0."""
    batch = {}
    for side, pad in (("student", student_pad), ("teacher", teacher_pad)):
        padded = _pad([getattr(example, side) for example in examples], pad)
        for name, tensor in padded.items():
            batch[f"{side}_{name}"] = tensor
    return batch


def _pad(sequences: list[Sequence], pad: int) -> dict[str, torch.Tensor]:
    shape = len(sequences), max(len(sequence.ids) for sequence in sequences) - 1
    ids, labels = torch.full(shape, pad), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        tokens, first = torch.tensor(sequence.ids), sequence.prompt_length
        ids[i, : len(tokens) - 1] = tokens[:-1]
        mask[i, : len(tokens) - 1] = True
        labels[i, first - 1 : len(tokens) - 1] = tokens[first:]
    chunks = torch.tensor([chunk for sequence in sequences for chunk in sequence.chunks])
    return dict(ids=ids, mask=mask, labels=labels, chunks=chunks)


def left_pad(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation → ids (B, T), and mask (B, T), true on real tokens."""
    tokens = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(tokens, batch_first=True, padding_value=pad, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(ids.size(1)) >= ids.size(1) - lengths[:, None]
