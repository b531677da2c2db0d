"""Low-rank adaptation (LoRA, arXiv 2106.09685): a big model learns by small matrices beside its frozen ones.

    y = W x + (α / r) · B A dropout(x)          A: (r, in), drawn anew; B: (out, r), zero at first

on every linear layer of attention and MLP. Only A and B have gradients and optimizer state, and are float32; W is what
the run computes in, bfloat16 on a GPU, so that no pass casts it. A checkpoint holds the merged weights W + (α / r) B A,
as any other, and A and B themselves in adapter/, as the peft library lays them out."""
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from files.config import InputError

class LoRA(nn.Module):
    """A frozen linear layer and the two matrices beside it: (..., in) → (..., out)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / rank, nn.Dropout(dropout)
        like = dict(device=linear.weight.device, dtype=torch.float32)        # the frozen weights may be bfloat16
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))         # as peft draws it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)

def add_lora(decoder, rank: int, alpha: float, dropout: float) -> None:
    """Freeze a Decoder and put matrices of the given rank beside every linear layer of its blocks."""
    decoder.requires_grad_(False)
    for layer in decoder.layers:
        for part in list(layer.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, LoRA(child, rank, alpha, dropout))

def has_lora(decoder) -> bool:
    return any(isinstance(part, LoRA) for part in decoder.modules())

def merged(decoder, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, by name, of the model without LoRA that computes the same; in the CPU's memory, a layer at a time.
    state: the state_dict, whole."""
    state = dict(state)
    for place, part in decoder.named_modules():
        if isinstance(part, LoRA):
            weight, a, b = (state.pop(f"{place}.{name}").cpu() for name in ("linear.weight", "a", "b"))
            state[f"{place}.weight"] = (weight.float() + part.scale * b.float() @ a.float()).to(weight.dtype)
            if f"{place}.linear.bias" in state:
                state[f"{place}.bias"] = state.pop(f"{place}.linear.bias")
    return state

def _peft_names(decoder) -> dict[str, str]:
    """Our names of A and B → peft's."""
    names = {}
    for place, part in decoder.named_modules():
        if isinstance(part, LoRA):
            theirs = "base_model.model." + decoder.hub_name(f"{place}.")
            names |= {f"{place}.a": f"{theirs}lora_A.weight", f"{place}.b": f"{theirs}lora_B.weight"}
    return names

def save_adapter(folder: Path, decoder, state: dict[str, torch.Tensor], base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors. state: the decoder's, whole; base: the frozen model."""
    folder.mkdir()
    one = next(part for part in decoder.modules() if isinstance(part, LoRA))
    targets = sorted({place.rsplit(".", 1)[1] for place, part in decoder.named_modules() if isinstance(part, LoRA)})
    rank = len(one.a)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank,
                  lora_alpha=one.scale * rank, lora_dropout=one.dropout.p,
                  target_modules=targets, fan_in_fan_out=bool(decoder.transposed), bias="none", inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({theirs: state[ours].detach().cpu().contiguous() for ours, theirs in _peft_names(decoder).items()},
              folder / "adapter_model.safetensors")

def load_adapter(folder: Path, decoder) -> None:
    """Put A and B back. Raises InputError where they are damaged or of another shape."""
    try:
        content = load_file(folder / "adapter_model.safetensors")
        state = {ours: content.pop(theirs) for ours, theirs in _peft_names(decoder).items()}
        decoder.load_state_dict(state, strict=False)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: missing, damaged, or of another model or rank ({error})") from error
