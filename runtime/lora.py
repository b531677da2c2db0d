"""Low-rank adaptation (LoRA, arXiv 2106.09685): a big model learns by small matrices beside its
frozen ones.

    y = W x + (α / r) · B A dropout(x)      A: (r, in), drawn anew; B: (out, r), zero at first

on queries and values, as in the papers (peft's default). A and B are float32; W is in the type that
the run computes in. A checkpoint holds the merged weights W + (α / r) B A in float32, because
bfloat16 would round most of a small update away, and A and B in adapter/, as the peft library lays
them out."""

import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

DROPOUT = 0.1  # the papers'
TARGETS = ("q_proj", "v_proj", "c_attn")  # GPT-2 has queries, keys and values in one layer


class LoRA(nn.Module):
    """A frozen linear layer and the two matrices beside it: (..., in) → (..., out)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.dropout = nn.Dropout(DROPOUT)
        device = linear.weight.device
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as peft draws it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)


def add_lora(decoder, rank: int, alpha: float) -> None:
    """Freeze a Decoder and put the matrices beside the TARGETS of its layers."""
    decoder.requires_grad_(False)
    decoder.has_lora = True
    for layer in decoder.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if name in TARGETS:
                    setattr(module, name, LoRA(child, rank, alpha))


def lora_layers(decoder) -> dict[str, LoRA]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoRA)}


def merged(decoder, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, by name, of the model without LoRA that computes the same, in float32."""
    state = {name: tensor.float().cpu() for name, tensor in state.items()}
    for name, layer in lora_layers(decoder).items():
        weight = state.pop(f"{name}.linear.weight")
        a, b = state.pop(f"{name}.a"), state.pop(f"{name}.b")
        state[f"{name}.weight"] = weight + layer.scale * b @ a
        if f"{name}.linear.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.linear.bias")
    return state


def _peft_names(decoder) -> dict[str, str]:
    """Our names of A and B → peft's."""
    names = {}
    for name in lora_layers(decoder):
        theirs = "base_model.model." + decoder.hub_name(f"{name}.")
        names[f"{name}.a"] = f"{theirs}lora_A.weight"
        names[f"{name}.b"] = f"{theirs}lora_B.weight"
    return names


def save_adapter(folder: Path, decoder, state: dict[str, torch.Tensor], base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors. base: the frozen model's name."""
    folder.mkdir()
    layers = lora_layers(decoder)
    rank = len(next(iter(layers.values())).a)
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=next(iter(layers.values())).scale * rank,
        lora_dropout=DROPOUT,
        target_modules=sorted({name.rsplit(".", 1)[1] for name in layers}),
        fan_in_fan_out=bool(decoder.transposed),
        bias="none",
        inference_mode=True,
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {
        theirs: state[ours].detach().cpu().contiguous()
        for ours, theirs in _peft_names(decoder).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def load_adapter(folder: Path, decoder) -> None:
    """Put A and B back."""
    tensors = load_file(folder / "adapter_model.safetensors")
    state = {ours: tensors[theirs] for ours, theirs in _peft_names(decoder).items()}
    decoder.load_state_dict(state, strict=False)
