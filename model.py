"""Small hand-written decoders that hold real weights: GPT-2, and Llama with its relatives.

    decoder = load("gpt2")                      # or a folder in the hub's layout, or any hub id
    hidden = decoder(ids)                       # (B, T) → (B, T, d), after the final norm
    logits = decoder.logits(hidden)             # (B, T, V)

Notable here:
- two classes: `GPT2`, and `Llama`, which by configuration alone is Llama 2/3, TinyLlama, Mistral, SmolLM2 (rotary
  embeddings, RMSNorm, SwiGLU, grouped-query attention), Qwen1.5/2/2.5 (bias on q, k, v) and Qwen3 (norm on q and k);
- the forward pass stops at the hidden states, because distillation needs logits at response positions only;
- a config field that would change the result and is not implemented is an error (files/model_config.py)."""
import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute_later

from files import hub
from files.config import InputError
from files.model_config import ModelConfig, read_config
from files.weights import weights_for

class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v under a mask; the subclasses differ in how they make q, k, v."""

    float32_up_to = 256     # positions; on a CPU the gradient in bfloat16 takes 2 to 5 times as long as in float32

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer

    def attend(self, q, k, v, masks, cache):
        """q: (B, heads, T, hd), k and v: (B, kv_heads, T, hd) → (B, T, heads · hd)."""
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        mask = masks[self.config.sliding_layers[self.layer]]
        groups = self.config.num_heads // self.config.num_kv_heads
        if groups > 1 and q.size(2) == 1:       # one new token: heads that share k and v are so many queries of them
            y = F.scaled_dot_product_attention(q.unflatten(1, (-1, groups)).squeeze(3), k, v, attn_mask=mask)
            return y.flatten(1)[:, None]
        dropout, dtype = self.config.attention_dropout if self.training else 0.0, q.dtype
        if q.device.type == "cpu" and dtype == torch.bfloat16 and q.requires_grad and q.size(2) <= self.float32_up_to:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=False):      # they have the type in which this is computed
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1,
                                               dropout_p=dropout, enable_gqa=groups > 1)
        return y.to(dtype).transpose(1, 2).flatten(2)

    def heads(self, x, count):
        """(B, T, count · hd) → (B, count, T, hd)"""
        return x.unflatten(-1, (count, self.config.head_dim)).transpose(1, 2)

class Decoder(nn.Module):
    """What GPT2 and Llama share: embeddings, masks, files. `.embed` and `.head` may be one tensor."""

    hub_names: dict[str, str]               # prefix of our parameter names → prefix in the hub's files
    transposed = ()                         # endings of weights that the hub stores as (in, out)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.fixed_step = self.fixed = None         # one more token, compiled, and its cache (running/generation.py)
        self.source: Path | None = None     # the folder it was loaded from; save() copies the tokenizer from there
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def tie(self) -> None:
        """What is not in the files: a head that is the embedding, and a subclass's constants."""
        if self.config.tie_head:
            self.head.weight = self.embed.weight

    def allocate(self, device: str | torch.device) -> None:
        """Memory for the weights of a Decoder that has none (shape_of); they are arbitrary."""
        self.to_empty(device=device)
        self.tie()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T) → hidden states (B, T, d) after the final norm, i.e. h with logits = W h.
        mask: (B, T), true on real tokens, for left padding. Right padding needs none: attention is causal, so what
        stands behind a token cannot reach it. Raises ValueError where T exceeds the model's positions."""
        masks = self.masks(mask, ids.size(1), ids.size(1), ids.device)
        return self._hidden(ids, self.positions(ids, mask), masks, None)

    def run(self, layer, *inputs) -> torch.Tensor:
        """One block; with `checkpointing`, its inner results are computed again for the gradient, not kept."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return recompute_later(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) → (..., V)"""
        return self.head(hidden)

    def step(self, new, positions, masks, cache) -> torch.Tensor:
        """New ids (B, T), behind what a cache (running/generation.py) holds → the last one's hidden state (B, d)."""
        return self._hidden(new, positions, masks, cache)[:, -1]

    def positions(self, ids, mask) -> torch.Tensor:
        """Each token's place in its row, (1, T), or (B, T) where the left is padding."""
        if mask is None:
            return torch.arange(ids.size(1), device=ids.device)[None]
        return mask.long().cumsum(1).sub(1).clamp(min=0)

    def masks(self, mask, queries: int, keys: int, device) -> dict[bool, torch.Tensor | None]:
        """For layers without (False) and with (True) a sliding window: None for plain causal attention, or a mask
        (B or 1, 1, queries, keys) that is true where attention is allowed. The queries are the last of the keys."""
        if keys > self.config.max_positions:
            raise ValueError(f"{keys} tokens, but this model has {self.config.max_positions} positions")
        window = self.config.sliding_window
        sliding_matters = window is not None and keys > window and any(self.config.sliding_layers)
        if mask is None and queries == keys and not sliding_matters:
            return {False: None, True: None}
        distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
        full = (distance >= 0)[None, None]
        sliding = full & (distance < window) if sliding_matters else full
        if mask is None:
            return {False: full, True: sliding}
        # a padding position sees itself, so that no row of the softmax is empty (its result is never used)
        seen, itself = mask.bool()[:, None, None, :], distance == 0
        return {False: full & seen | itself, True: sliding & seen | itself}

    def save(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the hub's layout: config.json, model.safetensors and, copied from `self.source`, the tokenizer's files.
        weights: what to write in place of the state_dict, where that is in pieces (parallel.shard)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for name, tensor in (weights or self.state_dict()).items():
            if name == "head.weight" and self.config.tie_head:
                continue
            tensor = tensor.t() if name.endswith(self.transposed) else tensor
            state[self.hub_name(name)] = tensor.detach().cpu().contiguous()
        with hub.whole_file(folder / "model.safetensors") as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        config = copy.deepcopy(self.config.hub)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(self.embed.weight.dtype).removeprefix("torch.")
        with hub.atomic_write(folder / "config.json") as file:
            json.dump(config, file, indent=2)
        if self.source and not self.source.is_dir():
            raise InputError(f"{self.source}: this folder is gone, and with it the tokenizer that {folder} needs")
        for name in hub.TOKENIZER_FILES:
            if self.source and (self.source / name).exists() and self.source.resolve() != folder.resolve():
                shutil.copyfile(self.source / name, folder / name)

    def hub_name(self, name: str) -> str:
        """A parameter's name in the hub's files."""
        ours = next(prefix for prefix in self.hub_names if name.startswith(prefix))
        return self.hub_names[ours] + name.removeprefix(ours)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights, as the authors draw them: N(0, initializer_range²), GPT-2's residual outputs / √(2 layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = isinstance(self, GPT2) and name.endswith("c_proj.weight")
                std = self.config.initializer_range / ((2 * self.config.num_layers) ** 0.5 if residual else 1)
                parameter.normal_(0.0, std)

def computed_in(x: torch.Tensor) -> torch.dtype:
    """The type in which a layer computes with a tensor: autocast's where that is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

# ----------------------------------------------------------------------------------------------------------- GPT-2
class GPT2Attention(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, masks, cache):
        q, k, v = (self.heads(part, self.config.num_heads) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(self.attend(q, k, v, masks, cache))

class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = "none" if config.activation == "gelu" else "tanh"
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))

class GPT2Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x, masks, cache):
        x = x + self.dropout(self.attn(self.ln_1(x), masks, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))

class GPT2(Decoder):
    """GPT-2 of any size: learned positions, LayerNorm before each part, GELU."""

    hub_names = {"embed.": "transformer.wte.", "position_embed.": "transformer.wpe.", "layers.": "transformer.h.",
                 "norm.": "transformer.ln_f.", "head.": "lm_head."}
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

    def __init__(self, config):
        super().__init__(config)
        self.position_embed = nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(GPT2Block(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.tie()

    def _hidden(self, ids, positions, masks, cache):
        x = self.dropout(self.embed(ids) + self.position_embed(positions))
        for layer in self.layers:
            x = self.run(layer, x, masks, cache)
        return self.norm(x)

# ------------------------------------------------------------------------------------------- Llama and its relatives
class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32; one kernel on GPUs."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)

def rotate(x, cos, sin):
    """Rotary embedding (arXiv 2104.09864), half-split order. x: (B, heads, T, hd), cos and sin: (B or 1, 1, T, hd), the
    first half of sin negated: the halves of x change places and signs."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

class LlamaAttention(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, rope, masks, cache):
        q = self.heads(self.q_proj(x), self.config.num_heads)
        k = self.heads(self.k_proj(x), self.config.num_kv_heads)
        v = self.heads(self.v_proj(x), self.config.num_kv_heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        return self.o_proj(self.attend(q, k, v, masks, cache))

class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, rope, masks, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, masks, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(Decoder):
    """Llama 2/3, TinyLlama, Mistral, SmolLM2, Qwen1.5/2/2.5/3: which one is a matter of ModelConfig's fields."""

    hub_names = dict(zip(("embed.", "layers.", "norm.", "head."),
                         ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")))

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.register_buffer("frequencies", None, persistent=False)
        self.tie()

    def tie(self):
        super().tie()
        self.frequencies = self.config.rope_frequencies().to(self.embed.weight.device)

    def _hidden(self, ids, positions, masks, cache):
        x = self.embed(ids)
        dtype = computed_in(x)
        angles = positions[:, None, :, None].float() * self.frequencies                         # (B or 1, 1, T, hd / 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        rope = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        for layer in self.layers:
            x = self.run(layer, x, rope, masks, cache)
        return self.norm(x)

# ------------------------------------------------------------------------------------------------------------ files
def shape_of(name_or_dir: str | Path, layers: bool = True) -> Decoder:
    """A Decoder without memory for its weights; only config.json is read."""
    folder = hub.model_dir(name_or_dir, weights=False)
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        config = config if layers else dataclasses.replace(config, num_layers=0)
        decoder = (GPT2 if config.family == "gpt2" else Llama)(config).eval()
    decoder.source = folder
    return decoder

def load(name_or_dir: str | Path, init: str = "pretrained", dtype: torch.dtype = torch.float32,
         device: str | torch.device = "cpu", layers: bool = True) -> Decoder:
    """A Decoder from a short name, a hub id or a folder. init="random" takes the shape only and draws fresh weights.
    layers=False leaves its layers on the disk: what remains is good for .embed and .head only.

    Raises InputError for an unknown name, a folder without config or weights, an architecture or config field that is
    not implemented, a cut file, and missing, extra or misshapen tensors (which it names)."""
    folder = hub.model_dir(name_or_dir, weights=init == "pretrained")
    decoder = shape_of(folder, layers)
    if init == "random":
        parameters = sum(p.numel() for p in decoder.parameters())
        if 4 * parameters > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise InputError(f"{folder}: a model of {parameters:,} parameters does not fit into memory")
        decoder.allocate("cpu")
        decoder.initialize()
        decoder.to(dtype)
    else:
        decoder.load_state_dict(weights_for(decoder, folder, dtype), assign=True)
    decoder.tie()
    return decoder.to(device)
