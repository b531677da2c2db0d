"""Two tokenizers, one text: ids with byte spans, the chunks both agree on, examples and padded batches.

    tokenizer = load_tokenizer("gpt2")                       # or a folder in the hub's layout
    ids, spans = tokenizer.encode_with_spans("héllo")        # spans are UTF-8 byte offsets that tile the text

Notable here:
- byte-level BPE (GPT-2, Qwen, SmolLM2, Llama 3) runs as a tiktoken Encoding built from the model's own files,
  SentencePiece (Llama 2, TinyLlama, Mistral) through sentencepiece; both give the ids of the reference libraries;
- control tokens in a text are text: "<|endoftext|>" in a row of data never ends anything;
- a chunk is what lies between two byte offsets at which BOTH tokenizations have a boundary.
"""
import bisect
import json
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch

import hub
from hub import InputError

Span = tuple[int, int]

# ------------------------------------------------------------------------------------------------------- tokenizers

CONTRACTION = r"'(?:[sdmt]|ll|ve|re)"
GPT2_SPLIT = CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's split of what lies between digits: there a run of spaces ends at a digit as at the end.
DIGITS_GPT2_SPLIT = r"\p{N}|" + CONTRACTION + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


class Tokenizer:
    """What the two kinds share. `eos_id` closes a response; `bos_id` (or None) opens a prompt; `vocab_size` = largest id + 1;
    `folder` holds its files."""

    name: str
    folder: Path
    eos_id: int
    bos_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        raise NotImplementedError

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and, for each, the (start, end) bytes of the text's UTF-8 that it stands for. The spans tile the text: the
        first starts at 0, each starts where the one before ends, the last ends at the end. Where normalization changed
        the text, boundaries inside the changed characters are spread over them."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; control tokens (EOS and its like) give nothing, broken UTF-8 gives U+FFFD."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id adds to a text (of a control token: its name)."""
        raise NotImplementedError


class ByteLevelBPE(Tokenizer):
    """Byte pair encoding over UTF-8 bytes (Sennrich et al.; GPT-2's form), run by tiktoken."""

    def __init__(self, name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]] | None, split: str, nfc: bool,
                 control: dict[str, int], eos_id: int, bos_id: int | None):
        """vocabulary: token in GPT-2's printable alphabet → id. merges: pairs, most important first; None: the ids are
        in that order, and a whole word that is a token is taken as it is. nfc: text is NFC-normalized first."""
        self.name, self.nfc, self.eos_id, self.bos_id = name, nfc, eos_id, bos_id
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
            order = dict.fromkeys(bytes([b]) for b in range(256)) | dict.fromkeys(
                _from_alphabet(a + b) for a, b in merges)
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
            raise InputError(f"{self.name}: the tokenizer's split pattern does not work ({str(error)[:200]!r})") from error

    def encode_with_spans(self, text):
        ranks = self._ranks(text)
        ids, ends = self.id_of_rank[ranks], np.cumsum(self.length_of_rank[ranks])
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            ends = _nfc_to_original(text)[ends]
        last, ids, ends = ends[-1:], ids[ids >= 0], ends[ids >= 0]
        ends[-1:] = last                        # bytes without a token belong to the token behind them, or to the last
        return ids.tolist(), _spans(ends)

    def decode(self, ids):
        return b"".join(self.bytes_of[i] for i in ids if i not in self.control).decode("utf-8", errors="replace")

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
            raise InputError(f"{path}: the end-of-sequence token {eos!r} is not one of its pieces; tokens added beside a "
                             "SentencePiece model are not implemented")
        self.bos_id = self.model.bos_id() if add_bos and self.model.bos_id() >= 0 else None
        is_byte = [self.model.is_byte(i) for i in range(self.vocab_size)]
        self.control = {i for i in range(self.vocab_size) if self.model.is_control(i) or self.model.is_unknown(i)}
        # every piece in the model's own form, where a space is "▁"; a byte piece is named "<0xE4>"
        self.bytes_of = [bytes([int(piece[3:5], 16)]) if byte else piece.encode() for piece, byte in
                         zip((self.model.id_to_piece(i) for i in range(self.vocab_size)), is_byte)]
        probe = "  a ﬁ\u0065\u0301\u4f60\U0001f9ff \n"          # ligature, combining mark, CJK, emoji, spaces
        if sum(is_byte) != 256 or b"".join(map(self.bytes_of.__getitem__, self.model.encode(probe))) != \
                ("▁" + probe.replace(" ", "▁")).encode():
            raise InputError(f"{path}: only SentencePiece models with byte fallback, a leading space and no normalization "
                             "are implemented (Llama 2, TinyLlama, Mistral)")

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
        return self.model.decode([i for i in ids if i not in self.control])

    def token_bytes(self, token_id):
        piece = self.bytes_of[token_id]
        return piece if token_id in self.control else piece.replace("▁".encode(), b" ")


def _spans(ends: np.ndarray) -> list[Span]:
    ends = ends.tolist()
    return list(zip([0] + ends[:-1], ends))


def _nfc_to_original(text: str) -> np.ndarray:
    """Byte offset in NFC(text) → byte offset in text. Composition never reaches over a character that it leaves alone
    beside its neighbour, so the text is cut there and each piece that changes is stretched onto its original."""
    pieces, start = [], 0
    for i in range(1, len(text)):
        if unicodedata.combining(text[i]) == 0:
            left, right = text[start:i], text[i]
            if unicodedata.normalize("NFC", left + right) == unicodedata.normalize("NFC", left) + unicodedata.normalize("NFC", right):
                pieces.append(left)
                start = i
    offsets, base = [], 0
    for piece in pieces + [text[start:]]:
        length, new_length = len(piece.encode()), len(unicodedata.normalize("NFC", piece).encode())
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
        raise InputError(f"the token {token!r} is not written in GPT-2's byte alphabet: not a byte-level BPE") from error


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model: a short name, a hub id or a folder with tokenizer.model, tokenizer.json, or vocab.json
    and merges.txt. Raises InputError where they are missing, damaged or of a kind that is not implemented."""
    folder = hub.model_dir(name_or_dir, weights=False)
    settings = _read_json(folder / "tokenizer_config.json") or {}
    try:
        if (folder / "tokenizer.model").exists():
            tokenizer = SentencePiece(str(name_or_dir), folder / "tokenizer.model", _token_text(settings, "eos_token"),
                                      settings.get("add_bos_token", True))
        else:
            tokenizer = _byte_level(str(name_or_dir), folder, settings)
        tokenizer.folder = folder
        return tokenizer
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(f"{folder}: the tokenizer's files are damaged or of an unknown make ({error!r})") from error


def _token_text(settings: dict, name: str) -> str | None:
    """A control token of tokenizer_config.json, which writes it as text or as {"content": text, …}."""
    token = settings.get(name)
    return token["content"] if isinstance(token, dict) else token


def _byte_level(name: str, folder: Path, settings: dict) -> ByteLevelBPE:
    whole = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "config.json") or {}
    control = {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
    control |= _read_json(folder / "added_tokens.json") or {}
    if whole is not None:
        model = whole["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise InputError(f"{folder}/tokenizer.json: only byte-level BPE is implemented; pass SentencePiece models as tokenizer.model")
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise InputError(f"{folder}/tokenizer.json: the model's {field} {model[field]!r} is not implemented")
        vocabulary = model["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        control |= {t["content"]: t["id"] for t in whole.get("added_tokens") or []}
        split, nfc = _split_pattern(folder / "tokenizer.json", whole.get("pre_tokenizer")), _is_nfc(folder, whole.get("normalizer"))
        merges = None if model.get("ignore_merges") else merges
    else:
        vocabulary = _read_json(folder / "vocab.json")
        if vocabulary is None or not (folder / "merges.txt").exists():
            raise InputError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        kind = settings.get("tokenizer_class") or config.get("model_type")
        if kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2"):
            split, nfc = GPT2_SPLIT, False
        elif kind in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "qwen2", "qwen3"):
            split, nfc = QWEN_SPLIT, True
        else:
            raise InputError(f"{folder}: vocab.json does not say how text is split, and the tokenizer class {kind!r} is unknown; add tokenizer.json")
    eos = _token_text(settings, "eos_token")
    eos_id = control.get(eos, vocabulary.get(eos)) if eos is not None else config.get("eos_token_id")
    eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    if eos_id is None:
        raise InputError(f"{folder}: no end-of-sequence token (eos_token in tokenizer_config.json, or eos_token_id in config.json)")
    name_of = {i: token for token, i in vocabulary.items()} | {i: token for token, i in control.items()}
    if eos_id not in name_of:
        raise InputError(f"{folder}: the end-of-sequence token {eos_id} is not in the vocabulary")
    control.setdefault(name_of[eos_id], eos_id)
    return ByteLevelBPE(name, vocabulary, merges, split, nfc, control, eos_id, _bos_id(whole, settings, control))


def _bos_id(whole: dict | None, settings: dict, control: dict[str, int]) -> int | None:
    """The token that opens every text, where the files ask for one: Llama 3 does so in its post-processor."""
    processors = [(whole or {}).get("post_processor") or {}]
    processors += processors[0].get("processors", [])
    for processor in processors:
        first = (processor.get("single") or [{}])[0] if processor.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return control[first["SpecialToken"]["id"]]
    bos = _token_text(settings, "bos_token")
    return control[bos] if settings.get("add_bos_token") and bos else None


def _split_pattern(path: Path, pre_tokenizer: dict | None) -> str:
    """One regular expression for a tokenizer.json's pre-tokenizer."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *before, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        use_regex = last.get("use_regex", True)
        if not before and use_regex:
            return GPT2_SPLIT
        if len(before) == 1 and use_regex and before[0]["type"] == "Digits" and before[0]["individual_digits"]:
            return DIGITS_GPT2_SPLIT
        if len(before) == 1 and not use_regex and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated" \
                and not before[0].get("invert") and "Regex" in before[0]["pattern"]:
            return before[0]["pattern"]["Regex"]
    raise InputError(f"{path}: the pre-tokenizer {[step.get('type') for step in steps]} is not implemented "
                     "(implemented: ByteLevel; Digits one by one + ByteLevel; Split + ByteLevel)")


def _is_nfc(folder: Path, normalizer: dict | None) -> bool:
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return False
    if normalizer["type"] != "NFC":
        raise InputError(f"{folder}/tokenizer.json: the normalizer {normalizer['type']} is not implemented (implemented: NFC)")
    return True


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


# ----------------------------------------------------------------------------------------------------------- chunks

def chunk_numbers(spans_a: list[Span], spans_b: list[Span]) -> tuple[list[int], list[int]]:
    """For every token the number of its chunk: how many common cuts lie at or before its start."""
    sides = [np.array(spans, np.int64).reshape(-1, 2) for spans in (spans_a, spans_b)]
    cuts = np.intersect1d(sides[0][:, 1], sides[1][:, 1])
    return tuple(np.searchsorted(cuts[cuts > 0], spans[:, 0], side="right").tolist() for spans in sides)


def chunks(spans_a: list[Span], spans_b: list[Span]) -> list[tuple[range, range]]:
    """Cut one text at every byte offset where both tokenizations have a boundary → (tokens of a, tokens of b) per chunk.

    EOS, given as the empty span (n, n) at the text's end on both sides, is a chunk of its own. What follows the last common
    boundary is a chunk too, of which one range may be empty.
    """
    ids_a, ids_b = chunk_numbers(spans_a, spans_b)
    return [(range(bisect.bisect_left(ids_a, k), bisect.bisect_right(ids_a, k)),
             range(bisect.bisect_left(ids_b, k), bisect.bisect_right(ids_b, k))) for k in sorted({*ids_a, *ids_b})]


def chunk_mask(spans_a: list[Span], spans_b: list[Span]) -> torch.Tensor:
    """M of METHODS: (len_a, len_b) bool, true where two tokens lie in the same chunk."""
    ids_a, ids_b = chunk_numbers(spans_a, spans_b)
    return torch.tensor(ids_a).view(-1, 1) == torch.tensor(ids_b).view(1, -1)


# --------------------------------------------------------------------------------------- rows → examples → batches

ALPACA_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                     "Write a response that appropriately completes the request.\n\n"
                     "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:\n")


def make_prompt(instruction: str, input: str = "") -> str:
    """Put an instruction, and an input where there is one, into Alpaca's template."""
    return (ALPACA_WITH_INPUT if input else ALPACA).format(instruction=instruction, input=input)


LONGEST_LINE = 10_000_000       # characters of a data file


@dataclass
class Row:
    """One line of a data file: a prompt and its answers. The first is trained on, all are references for scoring."""
    prompt: str
    outputs: list[str]


def read_rows(path: Path) -> list[Row]:
    """Read JSON lines with `prompt` and `output` (a string, or a list of strings), or with `instruction`, `input` and
    `output`, which go through Alpaca's template. Empty strings in a list of outputs are left out.
    Raises InputError that names file, line and what was found."""
    rows = []
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"{path}:{number}: {len(line):,} characters in one line, of at most {LONGEST_LINE:,}; a line holds one row")
        if line.strip():
            rows.append(_read_row(f"{path}:{number}", line))
    if not rows:
        raise InputError(f"{path}: no rows in this file")
    return rows


def _read_row(place: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{place}: must be a JSON object with prompt and output, found {type(fields).__name__}")
    found = f"(found: {', '.join(fields) or 'nothing'})"
    prompt, output = fields.get("prompt"), fields.get("output")
    if prompt is None and isinstance(fields.get("instruction"), str) and fields["instruction"].strip():
        if not isinstance(fields.get("input") or "", str):
            raise InputError(f'{place}: "input" must be a string')
        prompt = make_prompt(fields["instruction"], fields.get("input") or "")
    if prompt is None:
        raise InputError(f'{place}: no "prompt" field, nor an "instruction" {found}')
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{place}: "prompt" must be a string that is not empty, found {prompt!r:.60}')
    if output is None:
        raise InputError(f'{place}: no "output" field {found}')
    outputs = [output] if isinstance(output, str) else output
    if not isinstance(outputs, list) or not all(isinstance(o, str) for o in outputs):
        raise InputError(f'{place}: "output" must be a string or a list of strings, found {output!r:.60}')
    outputs = [o for o in outputs if o.strip()]
    if not outputs:
        raise InputError(f'{place}: "output" is empty')
    try:
        "".join([prompt, *outputs]).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair, which is no character ({error.reason})") from error
    return Row(prompt, outputs)


@dataclass
class Sequence:
    """One side's view of an example: prompt + response + EOS; of the response's tokens (and of EOS) the byte spans, and the
    numbers of the chunks that they are in."""
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


def encode_prompt(prompt: str, tokenizer: Tokenizer, max_prompt_length: int) -> tuple[list[int], bool]:
    """BOS where the model has one, then the prompt, cut to the limit in tokens → (ids, whether it was cut)."""
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    return ids[:max_prompt_length], len(ids) > max_prompt_length


def encode_rows(rows: list[Row], student: Tokenizer, teacher: Tokenizer, max_length: int, max_prompt_length: int):
    """Tokenize every row twice → (examples, rows whose prompt was cut, rows dropped for want of a prompt or valid token).

    Prompt and response are tokenized apart, as at generation time; EOS is appended, then everything cut to max_length
    tokens. Texts that both sides share a tokenizer for are tokenized once.
    """
    examples, cut, dropped = [], 0, 0
    for number, row in enumerate(rows):
        whole, sides, was_cut = [], [], False
        end = len(row.outputs[0].encode())
        for tokenizer in dict.fromkeys([student, teacher]):
            prompt, prompt_cut = encode_prompt(row.prompt, tokenizer, max_prompt_length)
            response, spans = tokenizer.encode_with_spans(row.outputs[0])
            whole.append((prompt, response + [tokenizer.eos_id], [*spans, (end, end)]))
            was_cut |= prompt_cut
        for (prompt, response, spans), chunks_of_side in zip(whole, chunk_numbers(whole[0][2], whole[-1][2])):      # before the text is cut
            ids = (prompt + response)[:max_length]
            valid = max(len(ids) - len(prompt), 0)
            sides.append(Sequence(ids, len(ids) - valid, spans[:valid], chunks_of_side[:valid]))
        example = Example(number, sides[0], sides[-1])
        cut += was_cut
        if all(side.valid and side.prompt_length for side in (example.student, example.teacher)):
            examples.append(example)
        else:
            dropped += 1
    return examples, cut, dropped


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


def collate(examples: list[Example], student_pad: int, teacher_pad: int, align_on: str | None = None) -> dict[str, torch.Tensor]:
    """Right-pad to the longest of the batch → student_ids, student_labels (B, S), teacher_ids, teacher_labels (B, T).

    ids are the tokens but the last, labels the next token where it belongs to the response or is EOS, else −100.
    align_on adds student_chunks (B, S) and teacher_chunks (B, T): the number of a valid position's chunk, "label": of its
    label token, "input": of its input token, where the prompt's last tokens make a chunk of their own.
    """
    batch = {}
    for side, pad in (("student", student_pad), ("teacher", teacher_pad)):
        sequences = [getattr(example, side) for example in examples]
        length = max(len(s.ids) for s in sequences) - 1
        ids = torch.full((len(sequences), length), pad)
        labels = torch.full((len(sequences), length), -100)
        for i, s in enumerate(sequences):
            tokens = torch.tensor(s.ids)
            ids[i, :len(tokens) - 1] = tokens[:-1]
            labels[i, s.prompt_length - 1:len(tokens) - 1] = tokens[s.prompt_length:]
        batch[f"{side}_ids"], batch[f"{side}_labels"] = ids, labels
    if align_on:
        batch |= {f"{side}_chunks": torch.zeros_like(batch[f"{side}_ids"]) for side in ("student", "teacher")}
        for i, example in enumerate(examples):
            for side in ("student", "teacher"):
                sequence = getattr(example, side)
                numbers = sequence.chunks if align_on == "label" else [-1] + sequence.chunks[:-1]
                batch[f"{side}_chunks"][i, sequence.prompt_length - 1:len(sequence.ids) - 1] = torch.tensor(numbers)
    return batch


def left_pad(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation → ids (B, T) and mask (B, T), true on real tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask
