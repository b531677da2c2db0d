"""A tokenizer's files to what a byte-level BPE is made of: tokenizer.json, or vocab.json with
merges.txt."""

import json
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
DIGITS_GPT2_SPLIT = (
    r"\p{N}|" + CONTRACTION + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])" r"|\s+"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class ByteLevelConfig:
    vocabulary: dict[str, int]  # token in GPT-2's printable alphabet → id
    # Pairs, the most important first. None: the ids are in that order (ignore_merges).
    merges: list[tuple[str, str]] | None
    split: str  # the pattern that cuts a text into words
    nfc: bool  # whether the text is NFC-normalized first
    control: dict[str, int]  # tokens that no text gives → id
    eos_id: int  # closes a response
    bos_id: int | None  # opens a prompt, where the files ask for one


def read_json(path: Path) -> dict | None:
    """None where there is no such file. Raises InputError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def token_text(settings: dict, name: str) -> str | None:
    """A control token of tokenizer_config.json: a text, or {"content": text, …}."""
    token = settings.get(name)
    return token["content"] if isinstance(token, dict) else token


def read_byte_level(folder: Path, settings: dict) -> ByteLevelConfig:
    """settings: tokenizer_config.json. Raises InputError for what is missing or not implemented."""
    whole = read_json(folder / "tokenizer.json")
    config = read_json(folder / "config.json") or {}
    control = {}
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        control[token["content"]] = int(token_id)
    control |= read_json(folder / "added_tokens.json") or {}
    if whole is not None:
        vocabulary, merges, split, nfc = _from_tokenizer_json(folder / "tokenizer.json", whole)
        for token in whole.get("added_tokens") or []:
            control[token["content"]] = token["id"]
    else:
        kind = settings.get("tokenizer_class") or config.get("model_type")
        vocabulary, merges, split, nfc = _from_vocabulary_and_merges(folder, kind)

    eos = token_text(settings, "eos_token")
    if eos is not None:
        eos_id = control.get(eos, vocabulary.get(eos))
    else:
        eos_id = config.get("eos_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    names = {token_id: token for token, token_id in (vocabulary | control).items()}
    if eos_id not in names:
        raise InputError(
            f"{folder}: no end-of-sequence token: eos_token of tokenizer_config.json "
            f"is {eos!r}, eos_token_id of config.json {config.get('eos_token_id')}"
        )
    control.setdefault(names[eos_id], eos_id)
    bos_id = _bos_id(whole or {}, settings, control)
    return ByteLevelConfig(vocabulary, merges, split, nfc, control, eos_id, bos_id)


def _from_tokenizer_json(path: Path, whole: dict):
    """vocabulary, merges, split and nfc."""
    model = whole["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError(
            f"{path}: only byte-level BPE is implemented; SentencePiece models are "
            "read from tokenizer.model"
        )
    normalizer = whole.get("normalizer") or {"type": "Sequence", "normalizers": []}
    nfc = normalizer["type"] == "NFC"
    if not nfc and normalizer != {"type": "Sequence", "normalizers": []}:
        raise InputError(
            f"{path}: the normalizer {normalizer['type']} is not implemented (implemented: NFC)"
        )
    merges = None
    if not model.get("ignore_merges"):
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in model["merges"]
        ]
    return model["vocab"], merges, _split_pattern(path, whole.get("pre_tokenizer") or {}), nfc


def _from_vocabulary_and_merges(folder: Path, kind: str | None):
    """The same from vocab.json and merges.txt; the split follows from the tokenizer's class."""
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary is None or not (folder / "merges.txt").exists():
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json "
            "with merges.txt)"
        )
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2"):
        return vocabulary, merges, GPT2_SPLIT, False
    if kind in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "qwen2", "qwen3"):
        return vocabulary, merges, QWEN_SPLIT, True
    raise InputError(f"{folder}: how {kind!r} splits a text is unknown; add its tokenizer.json")


def _bos_id(whole: dict, settings: dict, control: dict[str, int]) -> int | None:
    """Llama 3 asks for BOS in its post-processor, others in tokenizer_config.json."""
    post_processor = whole.get("post_processor") or {}
    for processor in [post_processor, *post_processor.get("processors", [])]:
        if processor.get("type") == "TemplateProcessing":
            first = processor["single"][0]
            if "SpecialToken" in first:
                return control[first["SpecialToken"]["id"]]
    bos = token_text(settings, "bos_token")
    return control[bos] if settings.get("add_bos_token") and bos else None


def _split_pattern(path: Path, pre_tokenizer: dict) -> str:
    """One regular expression for a tokenizer.json's pre-tokenizer."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    prefixed = last.get("add_prefix_space")
    use_regex = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex and not prefixed:
        return GPT2_SPLIT
    if (
        kinds == ["Digits", "ByteLevel"]
        and first["individual_digits"]
        and use_regex
        and not prefixed
    ):
        return DIGITS_GPT2_SPLIT
    if (
        kinds == ["Split", "ByteLevel"]
        and not use_regex
        and not prefixed
        and first["behavior"] == "Isolated"
        and "Regex" in first["pattern"]
    ):
        return first["pattern"]["Regex"]
    raise InputError(
        f"{path}: the pre-tokenizer {kinds} is not implemented (implemented: "
        "ByteLevel; Digits one by one + ByteLevel; Split + ByteLevel)"
    )
