"""The hub's weight files: safetensors, pickles without code execution, one file or shards."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hub.download import weight_file
from runtime.config import InputError

IN_A_LAYER = r"(^|\.)(h|layers)\.\d+\."  # in a tensor's name
CONSTANTS = r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$"


def weights_for(decoder, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The folder's tensors under the names of a model.Decoder, each checked against its config.

    Raises InputError, which names what is missing, extra, misshapen or not finite."""
    found = {}
    for name, tensor in _read_weights(folder, layers=decoder.config.num_layers > 0).items():
        if decoder.config.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"  # the hub's own gpt2 was saved without the prefix
        if not re.search(CONSTANTS, name):
            found[name] = tensor
    if decoder.config.tie_head:
        head, embedding = found.get("lm_head.weight"), found.get(decoder.hub_name("embed.weight"))
        if head is not None and embedding is not None and torch.equal(head, embedding):
            del found["lm_head.weight"]  # a copy

    state, problems = {}, []
    for name, parameter in decoder.state_dict().items():
        hub_name = decoder.hub_name(name)
        if name == "head.weight" and decoder.config.tie_head:
            continue
        if hub_name not in found:
            problems.append(f"missing {hub_name}")
            continue
        tensor = found.pop(hub_name)
        if name.endswith(decoder.transposed):
            tensor = tensor.t()
        if tensor.shape != parameter.shape:
            problems.append(
                f"{hub_name} is {list(tensor.shape)}, the config wants {list(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            problems.append(f"{hub_name} is {tensor.dtype}: quantized weights are not implemented")
        state[name] = tensor.to(dtype).contiguous()
        if not torch.isfinite(state[name]).all():
            problems.append(f"{hub_name} holds numbers that are not finite in {dtype}")
    problems += [f"extra {name}" for name in found]
    if problems:
        raise InputError(
            f"{folder}: the weights do not fit config.json: "
            f"{'; '.join(problems[:4])} ({len(problems)} problems)"
        )
    if decoder.config.tie_head:
        state["head.weight"] = state["embed.weight"]
    return state


def _read_weights(folder: Path, layers: bool) -> dict[str, torch.Tensor]:
    """All tensors of a folder; layers=False leaves out those of the layers."""
    first = weight_file(folder)
    if first is None:
        raise InputError(
            f"{folder}: no weights (model.safetensors, pytorch_model.bin, or an index of shards)"
        )
    paths = [first]
    if first.suffix == ".json":
        shards = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / Path(shard).name for shard in sorted(set(shards))]
    state = {}
    for path in paths:
        try:
            state.update(_read_file(path, layers))
        except FileNotFoundError as error:
            raise InputError(f"{path}: the index names this file, but it is not there") from error
        except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
            raise InputError(f"{path}: cannot be read, it is cut or damaged ({error})") from error
        except Exception as error:  # torch refuses a pickle of anything but tensors
            raise InputError(
                f"{path}: not plain weights ({type(error).__name__}); use safetensors"
            ) from error
    return state


def _read_file(path: Path, layers: bool) -> dict[str, torch.Tensor]:
    def wanted(name):
        return layers or not re.search(IN_A_LAYER, name)

    if path.suffix == ".bin":
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in content if wanted(name)}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}
