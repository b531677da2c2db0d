"""Hand-written decoders that hold real weights: GPT-2, and Llama with its relatives.

    decoder = load("gpt2")                      # or a folder in the hub's layout, or any hub id
    hidden = decoder(ids)                       # (B, T) → (B, T, d), after the final norm
    logits = decoder.logits(hidden)             # (B, T, V)

- `Llama` is, by configuration alone, Llama 2/3, TinyLlama, Mistral, SmolLM2 (rotary embeddings,
  RMSNorm, SwiGLU, grouped-query attention), Qwen1.5/2/2.5 (bias on q, k, v) and Qwen3 (norm on q
  and k).
- The forward pass stops at the hidden states: distillation needs logits at response positions only.
- Training and scoring compute no padding, but for attention, which goes over padded rows
  (RealTokens).
- A new family: its name and its fields in hub/model_config.py (read_config chooses the reader);
  where its shape is new, a class here, chosen in shape_of.
"""

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from hub.download import CHAT_TEMPLATES, TOKENIZER_FILES, model_folder
from hub.model_config import ARCHITECTURES, ModelConfig, read_config, read_fields
from hub.weights import weights_for

# On a CPU the gradient of bfloat16 attention takes 2 to 5 times as long as float32's on rows of up
# to this many positions.
FLOAT32_ATTENTION = 256


class RealTokens:
    """The places of a padded batch (B, T) that hold a token, N of them. The layers compute these
    alone, as one row (1, N, …); attention needs them in rows of their own again."""

    def __init__(self, mask: torch.Tensor, positions: torch.Tensor):
        """mask (B, T): true on real tokens; positions (B, T): of these in their rows."""
        self.shape = mask.shape
        self.index = mask.flatten().nonzero().squeeze(1)  # (N,), among B · T places
        first = torch.arange(len(mask), device=mask.device)[:, None] * mask.size(1)
        self.moved_left = (first + positions).flatten()[self.index]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (1, N, …)"""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, …) → (B, T, …), zeros on padding."""
        return self._placed(x[0], self.index)

    def heads_to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, N, hd) → (B, heads, T, hd), each row's tokens moved to the left, so that
        causal attention sees no padding."""
        return self._placed(x[0].transpose(0, 1), self.moved_left).transpose(1, 2)

    def rows_to_heads(self, y: torch.Tensor) -> torch.Tensor:
        """(B, heads, T, hd) → (1, heads, N, hd)"""
        y = y.transpose(1, 2).flatten(0, 1).index_select(0, self.moved_left)
        return y.transpose(0, 1)[None]

    def _placed(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return rows.index_copy_(0, index, x).unflatten(0, self.shape)


@dataclass
class Context:
    """What attention needs beside q, k and v; the same in every layer.

    Masks are (B or 1, 1, T, length), true where a query may look; None: plain causal attention."""

    full_mask: torch.Tensor | None = None
    sliding_mask: torch.Tensor | None = None
    cache: object = None  # runtime.generation.KVCache
    real_tokens: RealTokens | None = None  # None: every place is computed


class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v under a mask; the subclasses make q, k and v."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer

    def attend(self, q, k, v, context: Context):
        """q: (B, heads, T, hd), k and v: (B, kv_heads, T, hd) → (B, T, heads · hd); with
        context.real_tokens (1, …, N, hd) → (1, N, heads · hd)."""
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        if context.real_tokens is not None:
            q, k, v = (context.real_tokens.heads_to_rows(x) for x in (q, k, v))
        slides = self.config.sliding_layers[self.layer]
        mask = context.sliding_mask if slides else context.full_mask
        # Without a cache no size decides it: torch.compile takes sizes that vary for unknown.
        is_causal = mask is None and (context.cache is None or q.size(2) > 1)
        dtype, training_on_cpu = q.dtype, q.device.type == "cpu" and q.requires_grad
        if training_on_cpu and dtype == torch.bfloat16 and q.size(2) <= FLOAT32_ATTENTION:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=False):  # keep the type chosen above
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
                enable_gqa=q.size(1) != k.size(1),
            )
        if context.real_tokens is not None:
            y = context.real_tokens.rows_to_heads(y)
        return y.to(dtype).transpose(1, 2).flatten(2)

    def split_heads(self, x, count):
        """(B, T, count · hd) → (B, count, T, hd)"""
        return x.unflatten(-1, (count, self.config.head_dim)).transpose(1, 2)


class Decoder(nn.Module):
    """What GPT2 and Llama share: embeddings, masks, files. `.embed` and `.head` may be tied."""

    hub_names: dict[str, str]  # prefix of our parameters' names → prefix in the hub's files
    transposed = ()  # endings of weights that the hub stores as (in, out)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.has_lora = False  # runtime/lora.py
        self.source: Path | None = None  # where it was loaded from; save() copies the tokenizer
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def restore_constants(self) -> None:
        """Set what is in no file: a head that is the embedding, and a subclass's buffers."""
        if self.config.tie_head:
            self.head.weight = self.embed.weight

    def allocate(self, device) -> None:
        """Give a decoder of shape_of() memory; its weights are arbitrary."""
        self.to_empty(device=device)
        self.restore_constants()

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, cache=None
    ) -> torch.Tensor:
        """Token ids (B, T) → hidden states (B, T, d) after the final norm: logits = W h.

        mask (B, T): true on real tokens. Padding on the left needs it; padding on the right costs
        less with it, because only real tokens are computed, and the states of padding are 0. With a
        KVCache, ids continue what it holds, mask (B, past + T) covers both, and everything is
        computed. Raises ValueError where the model has fewer positions.
        """
        past = cache.length if cache is not None else 0
        length = past + ids.size(1)
        if length > self.config.max_positions:
            raise ValueError(
                f"{length} tokens, but this model has {self.config.max_positions} positions"
            )
        if mask is None:
            positions = torch.arange(past, length, device=ids.device)[None]
        else:
            positions = mask.long().cumsum(1).sub(1).clamp(min=0)[:, past:]
        real_tokens = None
        if mask is not None and cache is None:
            real_tokens = RealTokens(mask, positions)
            ids, positions, mask = real_tokens.pack(ids), real_tokens.pack(positions), None
        masks = self.attention_masks(mask, past, length, ids.device)
        context = Context(*masks, cache, real_tokens)
        x, *rotary = self.embed_tokens(ids, positions)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, *rotary, context, use_reentrant=False)
            else:
                x = layer(x, *rotary, context)
        hidden = self.norm(x)
        return hidden if real_tokens is None else real_tokens.unpack(hidden)

    def attention_masks(self, mask, past: int, length: int, device):
        """(full, sliding): where attention is allowed, (B or 1, 1, T, length); None: plain causal
        attention. The T queries are the last of `length` positions."""
        window = self.config.sliding_window
        slides = window is not None and length > window
        if mask is None and not slides and (past == 0 or length == past + 1):
            return None, None
        queries = torch.arange(past, length, device=device)[:, None]
        distance = queries - torch.arange(length, device=device)[None]
        full = (distance >= 0)[None, None]
        sliding = full & (distance < window) if slides else full
        if mask is None:
            return full, sliding
        # A padding position sees itself, so that no row of the softmax is empty; nobody reads it.
        real, itself = mask.bool()[:, None, None, :], distance == 0
        return full & real | itself, sliding & real | itself

    def drop_layers(self) -> None:
        """Free what .embed and .head are not needed for."""
        self.layers = nn.ModuleList()

    @property
    def hidden_scale(self) -> float:
        """The root mean square of hidden states, about: that of the final norm's weights."""
        return float(self.norm.weight.detach().float().square().mean().sqrt())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) → (..., V)"""
        return self.head(hidden)

    def hub_name(self, name: str) -> str:
        """A parameter's name in the hub's files."""
        for ours, theirs in self.hub_names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)

    def save(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the hub's layout: config.json, model.safetensors, the tokenizer's files.

        weights: what to write in place of the state_dict, where that is sharded or has LoRA."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in (weights or self.state_dict()).items():
            if name == "head.weight" and self.config.tie_head:
                continue
            if name.endswith(self.transposed):
                tensor = tensor.t()
            tensors[self.hub_name(name)] = tensor.detach().cpu().contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.config.hub)
        dtype_field = "dtype" if "dtype" in config else "torch_dtype"
        dtype = tensors[self.hub_name("embed.weight")].dtype
        config[dtype_field] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if self.source == folder:
            return
        for name in TOKENIZER_FILES:
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, folder / name)
        if (self.source / CHAT_TEMPLATES).is_dir():
            shutil.copytree(self.source / CHAT_TEMPLATES, folder / CHAT_TEMPLATES)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights as the authors do: N(0, initializer_range²), and GPT-2's residual
        outputs divided by √(2 · layers)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / (2 * self.config.num_layers) ** 0.5)
            else:
                parameter.normal_(0.0, std)


class GPT2Attention(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, context):
        q, k, v = self.c_attn(x).chunk(3, -1)
        heads = self.config.num_heads
        q, k, v = self.split_heads(q, heads), self.split_heads(k, heads), self.split_heads(v, heads)
        return self.c_proj(self.attend(q, k, v, context))


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

    def forward(self, x, context):
        x = x + self.dropout(self.attn(self.ln_1(x), context))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(Decoder):
    """GPT-2 of any size: learned positions, LayerNorm before each part, GELU."""

    hub_names = {
        "embed.": "transformer.wte.",
        "position_embed.": "transformer.wpe.",
        "layers.": "transformer.h.",
        "norm.": "transformer.ln_f.",
        "head.": "lm_head.",
    }
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

    def __init__(self, config):
        super().__init__(config)
        self.position_embed = nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(GPT2Block(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.restore_constants()

    def embed_tokens(self, ids, positions):
        return [self.dropout(self.embed(ids) + self.position_embed(positions))]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding (arXiv 2104.09864), half-split order.

    x: (B, heads, T, hd); cos, sin: (B or 1, 1, T, hd), the first half of sin negated, because the
    halves of x change places and signs."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class LlamaAttention(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, context):
        q = self.split_heads(self.q_proj(x), self.config.num_heads)
        k = self.split_heads(self.k_proj(x), self.config.num_kv_heads)
        v = self.split_heads(self.v_proj(x), self.config.num_kv_heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(self.attend(q, k, v, context))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, context):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Decoder):
    """Llama 2/3, TinyLlama, Mistral, SmolLM2, Qwen1.5/2/2.5/3, as ModelConfig's fields say."""

    hub_names = {
        "embed.": "model.embed_tokens.",
        "layers.": "model.layers.",
        "norm.": "model.norm.",
        "head.": "lm_head.",
    }

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.register_buffer("frequencies", None, persistent=False)
        self.restore_constants()

    def restore_constants(self):
        super().restore_constants()
        self.frequencies = self.config.rope_frequencies().to(self.embed.weight.device)

    def embed_tokens(self, ids, positions):
        x = self.embed(ids)
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        angles = positions[:, None, :, None].float() * self.frequencies  # (B or 1, 1, T, hd / 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return x, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def shape_of(folder: Path, layers: bool = True) -> Decoder:
    """A Decoder without memory for its weights; only config.json is read."""
    config = read_config(folder / "config.json")
    if not layers:
        config = dataclasses.replace(config, num_layers=0)
    with torch.device("meta"):
        decoder = GPT2(config) if config.family == "gpt2" else Llama(config)
    decoder.source = folder
    return decoder.eval()


def load(
    name: str | Path,
    init: str = "pretrained",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layers: bool = True,
) -> Decoder:
    """A Decoder from a short name, a hub id or a folder.

    init="random" takes the shape alone and draws fresh weights. layers=False leaves the layers on
    the disk; what remains is good for .embed and .head.
    An architecture that is not written here, good for a teacher, is left to transformers.
    Raises InputError for an unknown name, a folder without config or weights, what is not
    implemented, damaged files, and missing, extra or misshapen tensors."""
    folder = model_folder(name, weights=init == "pretrained")
    _, architecture = read_fields(folder / "config.json")
    if architecture not in (None, *ARCHITECTURES) and init == "pretrained":
        from runtime.transformers_model import load_transformers

        decoder = load_transformers(folder, dtype, device)
        if not layers:
            decoder.drop_layers()
        return decoder
    decoder = shape_of(folder, layers)
    if init == "random":
        decoder.allocate("cpu")
        decoder.initialize()
        decoder.to(dtype)
    else:
        decoder.load_state_dict(weights_for(decoder, folder, dtype), assign=True)
    decoder.restore_constants()
    return decoder.to(device)
