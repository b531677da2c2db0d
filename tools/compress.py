"""Cut a model you have down to some of its layers, on a tokenizer you like: a student for the model
itself to teach.

    python -m tools.compress smollm2 --layers 0-7,18-29 --tokenizer gpt2 --out_dir out/student
    python train.py --teacher smollm2 --student out/student --data DIR          # repairs it

The layers that are named stay, in their order. A new token's rows of the embedding and of the head
are the means of the rows of the old tokens that its bytes fall into, the longest first; a token
that both vocabularies have keeps its own. The result is a damaged model in the hub's layout, of
which training makes a useful one."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hub.tokenizer_files import read_json
from model import Decoder, load
from runtime.config import InputError, flag, parse, run_script
from tokenize_align import Tokenizer, load_tokenizer

# Of a tokenizer whose files don't name their class.
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
}


@dataclass
class Config:
    model: str = flag("", "The model: a name, hub id or folder.")
    layers: str = flag("", "Which of its layers stay, from 0, such as 0-7,18-29. Without it: all.")
    tokenizer: str = flag("", "A model with the new tokenizer. Without it: the model's own.")
    out_dir: str = flag("", "A new folder for the result.")


def chosen_layers(text: str, number: int) -> list[int]:
    """ "0-2,5" → [0, 1, 2, 5]; "" → all. Raises InputError for what does not rise within 0 …
    number − 1."""
    layers = []
    try:
        for part in (text or f"0-{number - 1}").split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers or sorted(set(layers)) != layers or layers[-1] >= number:
        raise InputError(
            f"--layers {text}: must be rising numbers and ranges within "
            f"0-{number - 1}, such as 0-3,6"
        )
    return layers


def pieces(text: bytes, ids: dict[bytes, int], longest: int) -> list[int]:
    """The old tokens that a new token's bytes fall into, the longest at each place. A byte that no
    token begins with is skipped."""
    found, start = [], 0
    while start < len(text):
        for end in range(min(len(text), start + longest), start, -1):
            if text[start:end] in ids:
                found.append(ids[text[start:end]])
                start = end
                break
        else:
            start += 1
    return found


def new_rows(old: torch.Tensor, before: Tokenizer, after: Tokenizer) -> torch.Tensor:
    """(V_old, d) → (V_new, d). EOS keeps its row; what has no piece, control tokens too, gets the
    mean of all rows."""
    # Where SentencePiece has a letter twice, the last is a piece, the first a byte no text gives.
    ids = {before.token_bytes(i): i for i in range(before.vocab_size) if i not in before.control}
    ids.pop(b"", None)
    longest = max(map(len, ids))
    rows = old.mean(0).repeat(after.vocab_size, 1)
    for i in range(after.vocab_size):
        if i not in after.control:
            found = pieces(after.token_bytes(i), ids, longest)
            if found:
                rows[i] = old[found].mean(0)
    rows[after.eos_id] = old[before.eos_id]
    return rows


@torch.no_grad()
def compress(
    decoder: Decoder, before: Tokenizer, layers: list[int], after: Tokenizer | None
) -> None:
    """Change a decoder, and the config.json that it saves, in place."""
    config = decoder.config.hub
    decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in layers)
    for name in ("num_hidden_layers", "n_layer"):
        if name in config:
            config[name] = len(layers)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    if after is None:
        return
    decoder.embed = nn.Embedding.from_pretrained(new_rows(decoder.embed.weight, before, after))
    if not decoder.config.tie_head:
        decoder.head.weight = nn.Parameter(new_rows(decoder.head.weight, before, after))
    decoder.restore_constants()
    config["vocab_size"], config["eos_token_id"] = after.vocab_size, after.eos_id
    config["bos_token_id"] = after.eos_id if after.bos_id is None else after.bos_id
    config.pop("pad_token_id", None)
    decoder.source = after.folder


def name_class(folder: Path, tokenizer: Tokenizer) -> None:
    """Write into tokenizer_config.json what the tokenizer's own config.json said, which is not
    copied."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    kind = (read_json(tokenizer.folder / "config.json") or {}).get("model_type")
    settings.setdefault("tokenizer_class", CLASSES.get(kind, "PreTrainedTokenizerFast"))
    settings.setdefault("eos_token", tokenizer.token_bytes(tokenizer.eos_id).decode())
    text = json.dumps(settings, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv, positional=("model",))
    if not config.model or not config.out_dir:
        raise InputError("name a model and a folder: python -m tools.compress MODEL --out_dir DIR")
    out_dir = Path(config.out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"--out_dir {out_dir}: is not empty; name a new folder")
    decoder, before = load(config.model), load_tokenizer(config.model)
    if not isinstance(decoder, Decoder):
        raise InputError(f"{config.model}: its architecture is not written here, so it stays whole")
    size = sum(p.numel() for p in decoder.parameters())
    layers = chosen_layers(config.layers, len(decoder.layers))
    after = load_tokenizer(config.tokenizer) if config.tokenizer else None
    compress(decoder, before, layers, after)
    decoder.save(out_dir)
    if after is not None:
        name_class(out_dir, after)
    left = sum(p.numel() for p in load(out_dir).parameters())
    print(
        f"{out_dir}: {len(layers)} layers, {(after or before).vocab_size:,} tokens, "
        f"{left / 1e6:.0f}M parameters of {size / 1e6:.0f}M"
    )


if __name__ == "__main__":
    run_script(main)
