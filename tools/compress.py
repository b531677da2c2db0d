"""Cut a model you have down to some of its layers, onto a tokenizer you like: a student for the model itself to teach.

    python -m tools.compress smollm2-folder --layers 0-7,18-29 --tokenizer gpt2 --out_dir out/student
    python train.py --teacher smollm2-folder --student out/student --data DIR        # then the model repairs it

The layers that are named stay, in their order. A new token's rows of the embedding and of the head are the means of the
rows of the old tokens that its bytes fall into, the longest first; a token that both vocabularies have keeps its own.
The result is a damaged model in the hub's layout, of which training makes a useful one."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from files import hub
from files.config import InputError, flag, parse
from files.tokenizer_config import read_json
from model import Decoder, load
from tokenize_align import Tokenizer, load_tokenizer

LAYERS = "num_hidden_layers", "n_layer"             # what config.json calls their number
CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "llama": "LlamaTokenizer",
           "mistral": "LlamaTokenizer"}             # of a tokenizer whose files don't say it

@dataclass
class Config:
    model: str = flag("", "the model: name, hub id or folder")
    layers: str = flag("", "which of its layers stay, from 0, such as 0-7,18-29 (default: all)")
    tokenizer: str = flag("", "name, hub id or folder of a model with the new tokenizer (default: the model's own)")
    out_dir: str = flag("", "a new folder for the result")

def chosen_layers(text: str, number: int) -> list[int]:
    """Of "0-2,5" it is [0, 1, 2, 5], of "" all. Raises InputError for what does not rise within 0 … number − 1."""
    try:
        ranges = [[int(end) for end in part.split("-", 1)] for part in text.split(",")] if text else [[0, number - 1]]
        layers = [layer for first, *last in ranges for layer in range(first, (last or [first])[-1] + 1)]
        if not layers or sorted(set(layers)) != layers or layers[-1] >= number:
            raise ValueError
    except ValueError as error:
        raise InputError(f"--layers {text}: must be rising numbers and ranges within 0-{number - 1}, such as 0-3,6") \
            from error
    return layers

def pieces(text: bytes, ids: dict[bytes, int], longest: int) -> list[int]:
    """The old tokens that a new one's bytes fall into: at each place the longest; bytes without a token give none."""
    found, start = [], 0
    while start < len(text):
        ends = range(min(len(text), start + longest), start, -1)
        end = next((end for end in ends if text[start:end] in ids), None)
        if end:
            found.append(ids[text[start:end]])
        start = end or start + 1
    return found

def new_rows(old: torch.Tensor, before: Tokenizer, after: Tokenizer) -> torch.Tensor:
    """(V_old, d) → (V_new, d), see above. EOS keeps its row; what has no piece, control tokens too, gets the mean."""
    # where SentencePiece has a letter twice, the last is a piece, the first a byte that no text gives
    ids = {before.token_bytes(i): i for i in range(before.vocab_size) if i not in before.control}
    ids.pop(b"", None)
    longest = max(map(len, ids))
    rows = old.mean(0).repeat(after.vocab_size, 1)
    for i in range(after.vocab_size):
        found = [] if i in after.control else pieces(after.token_bytes(i), ids, longest)
        if found:
            rows[i] = old[found].mean(0)
    rows[after.eos_id] = old[before.eos_id]
    return rows

@torch.no_grad()
def compress(decoder: Decoder, before: Tokenizer, layers: list[int], after: Tokenizer | None) -> None:
    """Change a decoder, and the config.json that it saves, in place. after: the new tokenizer, or None."""
    config = decoder.config.hub
    decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in layers)
    config |= {name: len(layers) for name in LAYERS if name in config}
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    if after is not None:
        decoder.embed = nn.Embedding.from_pretrained(new_rows(decoder.embed.weight, before, after))
        if not decoder.config.tie_head:
            decoder.head.weight = nn.Parameter(new_rows(decoder.head.weight, before, after))
        decoder.tie()
        bos = after.eos_id if after.bos_id is None else after.bos_id
        config |= dict(vocab_size=after.vocab_size, eos_token_id=after.eos_id, bos_token_id=bos)
        config.pop("pad_token_id", None)
        decoder.source = after.folder

def tell_class(folder: Path, tokenizer: Tokenizer) -> None:
    """Write into tokenizer_config.json what the tokenizer's own config.json told, which does not come along."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    kind = (read_json(tokenizer.folder / "config.json") or {}).get("model_type")
    settings.setdefault("tokenizer_class", CLASSES.get(kind, "PreTrainedTokenizerFast"))
    settings.setdefault("eos_token", tokenizer.token_bytes(tokenizer.eos_id).decode())
    with hub.atomic_write(folder / "tokenizer_config.json") as file:
        json.dump(settings, file, indent=2)

def main() -> None:
    config = parse(Config, __doc__, positional=("model",))
    if not config.model or not config.out_dir:
        raise InputError("name a model and a folder for the result: python -m tools.compress MODEL --out_dir DIR")
    out_dir = Path(config.out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"--out_dir {out_dir}: is there already; name a new folder")
    decoder, before = load(config.model), load_tokenizer(config.model)
    hub.check_vocabulary(config.model, decoder.config.vocab_size, before.vocab_size)
    size = sum(p.numel() for p in decoder.parameters())
    layers = chosen_layers(config.layers, len(decoder.layers))
    after = load_tokenizer(config.tokenizer) if config.tokenizer else None
    compress(decoder, before, layers, after)
    decoder.save(out_dir)
    if after is not None:
        tell_class(out_dir, after)
    left = sum(p.numel() for p in load(out_dir).parameters())
    print(f"{out_dir}: {len(layers)} layers, {(after or before).vocab_size:,} tokens, {left / 1e6:.0f}M parameters of "
          f"{size / 1e6:.0f}M")

if __name__ == "__main__":
    hub.run(main)
