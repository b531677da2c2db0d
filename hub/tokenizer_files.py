"""A tokenizer's files to what a byte-level BPE is made of: tokenizer.json, or vocab.json with
merges.txt."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from runtime.config import InputError

# GPT-2's printable stand-in for every byte: itself where it is printable, else U+0100 and after.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(byte): byte for byte in PRINTABLE}
ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(UNPRINTABLE)}

CONTRACTION = r"'(?:[sdmt]|ll|ve|re)"
GPT2_SPLIT = CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's split of what lies between them: there a run of spaces ends at a
# digit as it does at the text's end.
DIGITS_GPT2_SPLIT = r"\p{N}|" + CONTRACTION + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class NotPlain(Exception):
    """This tokenizer.json is no byte-level BPE in GPT-2's form; the reason is the message."""


@dataclass
class Added:
    """A token that is split off a text before anything else. A control token, only in prompts."""

    id: int
    control: bool = True
    lstrip: bool = False  # takes the spaces before it
    rstrip: bool = False  # and those after it
    single_word: bool = False


@dataclass
class ByteLevelConfig:
    vocabulary: dict[str, int]  # token in GPT-2's printable alphabet → id
    merges: list[tuple[str, str]]  # the most important first
    split: str  # the pattern that cuts a text into words
    nfc: bool  # whether the text is NFC-normalized first


def read_json(path: Path) -> dict | None:
    """None where there is no such file. Raises InputError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, and special_tokens_map.json for what it does not say."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    for name, token in (read_json(folder / "special_tokens_map.json") or {}).items():
        if settings.get(name) is None:
            settings[name] = token
    return settings


def token_text(settings: dict, name: str) -> str | None:
    """A control token of tokenizer_config.json: a text, or {"content": text, …}."""
    token = settings.get(name)
    return token["content"] if isinstance(token, dict) else token


def read_added_tokens(folder: Path, settings: dict, whole: dict) -> dict[str, Added]:
    """Added tokens of all files. whole: tokenizer.json. Control tokens that the model of this
    folder has no embedding for, as a pad token may be, are left out."""
    added = {}
    for name, token_id in (read_json(folder / "added_tokens.json") or {}).items():
        added[name] = Added(token_id)
    tokens = [
        dict(token, id=int(i)) for i, token in settings.get("added_tokens_decoder", {}).items()
    ]
    for token in [*tokens, *(whole.get("added_tokens") or [])]:
        added[token["content"]] = Added(
            token["id"],
            control=token.get("special", True),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            single_word=token.get("single_word", False),
        )
    size = (read_json(folder / "config.json") or {}).get("vocab_size", math.inf)
    return {name: token for name, token in added.items() if token.id < size or not token.control}


def end_ids(folder: Path, settings: dict, id_of: dict[str, int]) -> list[int]:
    """The tokens that end an answer, the tokenizer's own first. id_of: a token's id.

    Raises InputError where no file names one."""
    config = read_json(folder / "config.json") or {}
    eos = token_text(settings, "eos_token")
    ids = [] if eos is None else [id_of.get(eos)]
    for values in (config, read_json(folder / "generation_config.json") or {}):
        value = values.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    known = set(id_of.values())
    ids = list(dict.fromkeys(i for i in ids if i in known))
    if not ids or eos is not None and eos not in id_of:
        raise InputError(
            f"{folder}: no end-of-sequence token: eos_token of tokenizer_config.json "
            f"is {eos!r}, eos_token_id of config.json {config.get('eos_token_id')}"
        )
    return ids


def from_tokenizer_json(whole: dict) -> ByteLevelConfig:
    """Raises NotPlain for another kind of tokenizer."""
    model, added = whole["model"], whole.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise NotPlain(f"its model is {model.get('type')}")
    for name in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise NotPlain(f"its model has {name}")
    if model.get("unk_token") and not set(ALPHABET) <= model["vocab"].keys():
        raise NotPlain("it has a token for unknown bytes")
    normalizer = whole.get("normalizer") or {"type": "Sequence", "normalizers": []}
    nfc = normalizer["type"] == "NFC"
    if not nfc and normalizer != {"type": "Sequence", "normalizers": []}:
        raise NotPlain(f"its normalizer is {normalizer['type']}")
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    split = _split_pattern(whole.get("pre_tokenizer") or {})
    merged = set(ALPHABET) | {left + right for left, right in merges}
    merged |= {token["content"] for token in added}
    if model.get("ignore_merges") and not merged.issuperset(model["vocab"]):
        raise NotPlain("it has tokens that no merge makes")
    if not in_rank_order(tuple(merges)):
        raise NotPlain("its merges are not in the order of their tokens")
    return ByteLevelConfig(model["vocab"], merges, split, nfc)


@functools.lru_cache(maxsize=8)
def in_rank_order(merges: tuple[tuple[str, str], ...]) -> bool:
    """Whether BPE by pairs and tiktoken's BPE, which merges any two neighbours that together are a
    token, cut alike: every token's own bytes must come to a pair that one of its merges names, and
    a token's merges must stand together (Llama 3 has several of each).

    (Merges a+b, b+c, a+bc do not: of "abc" the pairs make [ab, c], tiktoken makes [abc].)"""
    pairs_of = {}
    last = None
    for left, right in merges:
        token = left + right
        if token in pairs_of and token != last:
            return False
        pairs_of.setdefault(token, []).append([left, right])
        last = token
    rank_of = {token: rank for rank, token in enumerate(pairs_of)}
    for rank, (token, pairs) in enumerate(pairs_of.items()):
        parts = list(token)
        while len(parts) > 2:
            lowest, place = rank, None
            for i in range(len(parts) - 1):
                found = rank_of.get(parts[i] + parts[i + 1], rank)
                if found < lowest:
                    lowest, place = found, i
            if place is None:
                return False
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if parts not in pairs:
            return False
    return True


def from_vocabulary_and_merges(folder: Path, settings: dict) -> ByteLevelConfig:
    """From vocab.json and merges.txt; the split follows from the tokenizer's class. settings:
    read_settings. Raises InputError for what is missing."""
    config = read_json(folder / "config.json") or {}
    kind = settings.get("tokenizer_class") or config.get("model_type")
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary is None or not (folder / "merges.txt").exists():
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json "
            "with merges.txt)"
        )
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2"):
        split, nfc = GPT2_SPLIT, False
    elif kind in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "qwen2", "qwen3"):
        split, nfc = QWEN_SPLIT, True
    else:
        raise InputError(f"{folder}: how {kind!r} splits a text is unknown; add its tokenizer.json")
    if not in_rank_order(tuple(merges)):
        raise InputError(
            f"{folder}: the merges are not in the order of their tokens; add tokenizer.json, which "
            "the tokenizers library then runs"
        )
    return ByteLevelConfig(vocabulary, merges, split, nfc)


def bos_token(whole: dict, settings: dict) -> str | None:
    """What opens a prompt, where the files ask for it: Llama 3 in its post-processor, others in
    tokenizer_config.json."""
    post_processor = whole.get("post_processor") or {}
    for processor in [post_processor, *post_processor.get("processors", [])]:
        if processor.get("type") == "TemplateProcessing":
            first = processor["single"][0]
            if "SpecialToken" in first:
                return first["SpecialToken"]["id"]
    return token_text(settings, "bos_token") if settings.get("add_bos_token") else None


def _split_pattern(pre_tokenizer: dict) -> str:
    """One regular expression for a tokenizer.json's pre-tokenizer."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space"):
        raise NotPlain("its pre-tokenizer puts a space before a text")
    use_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] and use_regex:
        return DIGITS_GPT2_SPLIT
    if (
        kinds == ["Split", "ByteLevel"]
        and not use_regex
        and first["behavior"] == "Isolated"
        and "Regex" in first["pattern"]
    ):
        return first["pattern"]["Regex"]
    raise NotPlain(f"its pre-tokenizer is {kinds}")
