"""The hub's files of weights: safetensors, pickles without code execution, one file or shards with an index."""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from files import hub
from files.config import InputError

IN_A_LAYER = r"(^|\.)(h|layers)\.\d+\."        # in a name in the hub's files

def weights_for(decoder, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The folder's tensors under the names of a model.Decoder, checked one by one against what its config asks for.
    Raises InputError, which names what is missing, extra, misshapen or not finite."""
    found = {}
    for name, tensor in _read_weights(folder, layers=decoder.config.num_layers > 0).items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not dense:
            raise InputError(f"{folder}: the weights hold {name!r}, a {type(tensor).__name__}, not a dense tensor")
        if decoder.config.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"            # the hub's own gpt2 was saved without the prefix
        if not re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name):    # constants, not weights
            found[name] = tensor
    wanted = {decoder.hub_name(name): (name, tensor) for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_head:
        del wanted["lm_head.weight"]
        head, embedding = found.get("lm_head.weight"), found.get(decoder.hub_name("embed.weight"))
        if head is not None and embedding is not None and torch.equal(head, embedding):
            del found["lm_head.weight"]
    state, problems = {}, []
    for hub_name, (name, ours) in wanted.items():
        if hub_name not in found:
            problems.append(f"missing {hub_name}")
            continue
        tensor = found.pop(hub_name)
        tensor = tensor.t() if name.endswith(decoder.transposed) and tensor.dim() == 2 else tensor
        if tensor.shape != ours.shape:
            problems.append(f"{hub_name} is {list(tensor.shape)}, the config wants {list(ours.shape)}")
        if not tensor.is_floating_point():
            problems.append(f"{hub_name} is {tensor.dtype}, quantized weights are not implemented")
        state[name] = tensor.to(dtype).contiguous()
        if not torch.isfinite(state[name]).all():
            problems.append(f"{hub_name} holds numbers that are not finite in {dtype}")
    problems += [f"extra {name}" for name in found]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:4])}{more}")
    if decoder.config.tie_head:
        state["head.weight"] = state["embed.weight"]
    return state

def _read_weights(folder: Path, layers: bool) -> dict[str, torch.Tensor]:
    """The tensors of a folder, with or without those of the layers, from one file or from the shards of an index;
    pickles without code execution."""
    files = hub.weight_files(folder)
    if not files:
        raise InputError(f"{folder}: no weights (model.safetensors, pytorch_model.bin or a sharded index)")
    paths = [files[0]]
    if files[0].suffix == ".json":
        try:
            shards = sorted(set(json.loads(files[0].read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [folder / Path(shard).name for shard in shards]
            outside = [shard for shard in shards if not re.fullmatch(r"\w[\w.-]*", shard)]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{files[0]}: not an index of shards ({error!r:.200})") from error
        if outside:
            raise InputError(f"{files[0]}: names {outside[0]!r:.200}, which is not a file beside it")
    state = {}
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if layers or not re.search(IN_A_LAYER, name)]
                    content = {name: file.get_tensor(name) for name in names}
            else:
                content = torch.load(path, map_location="cpu", weights_only=True).items()
                content = {name: x for name, x in content if layers or not re.search(IN_A_LAYER, str(name))}
        except FileNotFoundError as error:
            raise InputError(f"{path}: this file is named by the index but is not there") from error
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read, it is cut or damaged ({error})") from error
        except Exception as error:      # pickle.UnpicklingError and its kin: torch refuses anything but tensors
            raise InputError(f"{path}: not plain weights ({type(error).__name__}); use safetensors") from error
        if twice := content.keys() & state.keys():
            raise InputError(f"{path}: holds {min(twice, key=str)!r:.200}, and so does another shard")
        state |= content
    return state
