"""A tokenizer's files → what a byte-level BPE is made of: tokenizer.json, or vocab.json with merges.txt."""
import json
from dataclasses import dataclass
from pathlib import Path

from files.config import InputError

CONTRACTION = r"'(?:[sdmt]|ll|ve|re)"
GPT2_SPLIT = CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit alone, then GPT-2's split of what lies between: there a run of spaces ends at a digit as at the end.
DIGITS_GPT2_SPLIT = r"\p{N}|" + CONTRACTION + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")

@dataclass
class ByteLevelConfig:
    vocabulary: dict[str, int]              # token in GPT-2's printable alphabet → id
    merges: list[tuple[str, str]] | None    # pairs, most important first; None: the ids are in that order, and a whole
    #                                         word that is a token is taken as it is
    split: str                              # the pattern that cuts a text into words
    nfc: bool                               # whether the text is NFC-normalized first
    control: dict[str, int]                 # tokens that no text gives → id
    eos_id: int                             # closes a response
    bos_id: int | None                      # opens every text, where the files ask for one

def read_json(path: Path) -> dict | None:
    """None where there is no such file. Raises InputError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error

def token_text(settings: dict, name: str) -> str | None:
    """A control token of tokenizer_config.json, which writes it as text or as {"content": text, …}."""
    token = settings.get(name)
    return token["content"] if isinstance(token, dict) else token

def read_byte_level(folder: Path, settings: dict) -> ByteLevelConfig:
    """settings: tokenizer_config.json. Raises InputError for what is missing or not implemented."""
    whole = read_json(folder / "tokenizer.json")
    config = read_json(folder / "config.json") or {}
    control = {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
    control |= read_json(folder / "added_tokens.json") or {}
    if whole is not None:
        vocabulary, merges, split, nfc = _whole(folder / "tokenizer.json", whole)
        control |= {t["content"]: t["id"] for t in whole.get("added_tokens") or []}
    else:
        kind = settings.get("tokenizer_class") or config.get("model_type")
        vocabulary, merges, split, nfc = _vocabulary_and_merges(folder, kind)
    eos = token_text(settings, "eos_token")
    eos_id = control.get(eos, vocabulary.get(eos)) if eos is not None else config.get("eos_token_id")
    eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    if eos_id is None:
        raise InputError(f"{folder}: no end-of-sequence token (tokenizer_config.json's eos_token or eos_token_id)")
    name_of = {i: token for token, i in vocabulary.items()} | {i: token for token, i in control.items()}
    if eos_id not in name_of:
        raise InputError(f"{folder}: the end-of-sequence token {eos_id} is not in the vocabulary")
    control.setdefault(name_of[eos_id], eos_id)
    return ByteLevelConfig(vocabulary, merges, split, nfc, control, eos_id, _bos_id(whole, settings, control))

def _whole(path: Path, whole: dict):
    """vocabulary, merges, split and nfc of a tokenizer.json."""
    model = whole["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{path}: only byte-level BPE is implemented; pass SentencePiece models as tokenizer.model")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise InputError(f"{path}: the model's {field} {model[field]!r} is not implemented")
    normalizer = whole.get("normalizer")
    nfc = normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}
    if nfc and normalizer["type"] != "NFC":
        raise InputError(f"{path}: the normalizer {normalizer['type']} is not implemented (implemented: NFC)")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    merges = None if model.get("ignore_merges") else merges
    return model["vocab"], merges, _split_pattern(path, whole.get("pre_tokenizer")), nfc

def _vocabulary_and_merges(folder: Path, kind: str | None):
    """The same of vocab.json and merges.txt, whose split goes by the tokenizer's class or the model's type."""
    vocabulary = read_json(folder / "vocab.json")
    if vocabulary is None or not (folder / "merges.txt").exists():
        raise InputError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2"):
        return vocabulary, merges, GPT2_SPLIT, False
    if kind in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "qwen2", "qwen3"):
        return vocabulary, merges, QWEN_SPLIT, True
    raise InputError(f"{folder}: how vocab.json's text is split is unknown for {kind!r}; add tokenizer.json")

def _bos_id(whole: dict | None, settings: dict, control: dict[str, int]) -> int | None:
    """Llama 3 asks for BOS in its post-processor, others in tokenizer_config.json."""
    processors = [(whole or {}).get("post_processor") or {}]
    processors += processors[0].get("processors", [])
    for processor in processors:
        first = (processor.get("single") or [{}])[0] if processor.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return control[first["SpecialToken"]["id"]]
    bos = token_text(settings, "bos_token")
    return control[bos] if settings.get("add_bos_token") and bos else None

def _split_pattern(path: Path, pre_tokenizer: dict | None) -> str:
    """One regular expression for a tokenizer.json's pre-tokenizer."""
    *before, last = steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        use_regex, first = last.get("use_regex", True), before[0] if len(before) == 1 else None
        if not before and use_regex:
            return GPT2_SPLIT
        if first and use_regex and first["type"] == "Digits" and first["individual_digits"]:
            return DIGITS_GPT2_SPLIT
        if first and not use_regex and first["type"] == "Split" and first["behavior"] == "Isolated" \
                and not first.get("invert") and "Regex" in first["pattern"]:
            return first["pattern"]["Regex"]
    raise InputError(f"{path}: the pre-tokenizer {[step.get('type') for step in steps]} is not implemented "
                     "(implemented: ByteLevel; Digits one by one + ByteLevel; Split + ByteLevel)")
