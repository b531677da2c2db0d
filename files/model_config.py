"""config.json → ModelConfig: both dialects (transformers 4 and 5) of GPT-2, Llama, Mistral, Qwen2 and Qwen3.

A field that would change the model's result must be one we know: whatever is neither used nor known to be harmless is
an error, because a model that silently ignores its configuration is wrong in a way that nobody sees."""
import dataclasses
import json
import math
from pathlib import Path

import torch

from files.config import InputError

ARCHITECTURES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
                 "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

MOST, MOST_LAYERS = 10_000_000, 10_000          # of any size in a config.json; beyond it, the file is damaged

# Fields that say nothing about the forward pass of a decoder (names of files, generation defaults, training history).
HARMLESS = set("""architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id initializer_range task_specific_params n_ctx
    pretraining_tp max_window_layers is_llama_config transformers.js_config keys_to_ignore_at_inference
    return_dict output_hidden_states output_attentions chunk_size_feed_forward id2label label2id problem_type
    reorder_and_upcast_attn attn_implementation _attn_implementation max_length num_labels finetuning_task license
    gradient_checkpointing predict_special_tokens n_special output_past _num_labels _attn_implementation_autoset
    is_decoder unsloth_fixed unsloth_version""".split())

@dataclasses.dataclass
class ModelConfig:
    """The shape of a decoder. `hub` is config.json as it was read, for save()."""
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    tie_head: bool
    activation: str
    initializer_range: float
    attention_dropout: float
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict = dataclasses.field(default_factory=dict)
    sliding_window: int | None = None
    sliding_layers: list[bool] = dataclasses.field(default_factory=list)
    hub: dict = dataclasses.field(default_factory=dict, repr=False)

    def rope_frequencies(self) -> torch.Tensor:
        """Angle per position of each pair of features, (head_dim / 2,), float32, on the CPU; with Llama 3's scaling."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        frequencies = 1.0 / self.rope_theta ** pairs
        if self.rope_scaling.get("rope_type") == "linear":
            return frequencies / self.rope_scaling["factor"]
        if self.rope_scaling.get("rope_type") == "llama3":
            # wavelengths beyond the original context are stretched, short ones kept, those between interpolated
            names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
            factor, low, high, original = (self.rope_scaling[name] for name in names)
            wavelength = 2 * math.pi / frequencies
            keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - keep) * frequencies / factor + keep * frequencies
        return frequencies

class _Fields:
    """config.json as a dict that remembers which fields were asked for."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values, self.used = path, values, set(HARMLESS)

    def __call__(self, name, *default):
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            if not default:
                raise InputError(f'{self.path}: no field "{name}"')
            return default[0]
        return value

    def size(self, name, *default) -> int:
        value = self(name, *default)
        most = MOST_LAYERS if name in ("n_layer", "num_hidden_layers") else MOST
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f'{self.path}: "{name}" is {value!r:.200}, but must be a whole number from 1 to {most:,}')
        return value

    def number(self, name, default: float, low: float, high: float = math.inf) -> float:
        value = self(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InputError(f'{self.path}: "{name}" is {value!r}, but must be a number from {low} to {high}')
        return value

    def switch(self, name, default: bool) -> bool:
        value = self(name, default)
        if not isinstance(value, bool):
            raise InputError(f'{self.path}: "{name}" is {value!r}, but must be true or false')
        return value

    def only(self, name, allowed: tuple) -> None:
        """A field whose other values are not implemented."""
        self.used.add(name)
        if name in self.values and self.values[name] not in allowed:
            raise InputError(f'{self.path}: "{name}": {self.values[name]!r} is not implemented '
                             f"(implemented: {', '.join(map(repr, allowed))})")

    def refuse_unknown(self) -> None:
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", [], {}):
                raise InputError(f'{self.path}: the field "{name}": {value!r} is not implemented; it might matter')

def read_config(path: Path) -> ModelConfig:
    """Read config.json. Raises InputError for a missing, malformed or not implemented file, field or architecture."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no config.json in this folder") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object")
    architectures = values.get("architectures") or [None]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str | None):
        raise InputError(f'{path}: "architectures" is {architectures!r}, but must be a list of names')
    family = ARCHITECTURES.get(architectures[0], values.get("model_type") if architectures == [None] else None)
    if family not in list(ARCHITECTURES.values()):
        raise InputError(f"{path}: the architecture {architectures[0] or values.get('model_type')!r} is not "
                         f"implemented (implemented: {', '.join(ARCHITECTURES)})")
    get = _Fields(path, values)
    config = _gpt2(get) if family == "gpt2" else _llama(get, family)
    config.hub = values
    get.refuse_unknown()
    if config.num_heads * config.head_dim > MOST:
        raise InputError(f"{path}: {config.num_heads} heads of size {config.head_dim} are beyond {MOST:,} features")
    if config.num_heads % config.num_kv_heads:
        raise InputError(f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} key-value heads")
    if family != "gpt2" and config.head_dim % 2:
        raise InputError(f"{path}: rotary embeddings need an even head size, not {config.head_dim}")
    return config

def _gpt2(get: _Fields) -> ModelConfig:
    for name in [n for n in get.values if n.startswith("summary_")]:       # a classification head we don't build
        get.used.add(name)
    get.only("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu", None))
    get.only("scale_attn_weights", (True,))
    hidden, heads = get.size("n_embd"), get.size("n_head")
    if hidden % heads:
        raise InputError(f"{get.path}: n_embd {hidden} cannot be divided by n_head {heads}")
    layers = get.size("n_layer")
    return ModelConfig(
        family="gpt2", vocab_size=get.size("vocab_size"), hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=hidden // heads, intermediate_size=get.size("n_inner", 4 * hidden),
        max_positions=get.size("n_positions", 1024), norm_eps=get.number("layer_norm_epsilon", 1e-5, 0),
        tie_head=get.switch("tie_word_embeddings", True), activation=get("activation_function", "gelu_new"),
        initializer_range=get.number("initializer_range", 0.02, 0),
        attention_dropout=get.number("attn_pdrop", 0.1, 0, 1),
        embed_dropout=get.number("embd_pdrop", 0.1, 0, 1), residual_dropout=get.number("resid_pdrop", 0.1, 0, 1),
        sliding_layers=[False] * layers)

def _llama(get: _Fields, family: str) -> ModelConfig:
    get.only("hidden_act", ("silu", None))
    get.only("rope_interleaved", (False, None))
    get.only("partial_rotary_factor", (1.0, None))
    hidden, heads, layers = get.size("hidden_size"), get.size("num_attention_heads"), get.size("num_hidden_layers")
    theta, rope = _rope(get)
    attention_bias = get.switch("attention_bias", False) and family in ("llama", "qwen3")
    window, sliding_layers = _sliding_layers(get, family, layers)
    head_dim = get.size("head_dim", 128 if family == "qwen3" else hidden // heads)
    return ModelConfig(
        family=family, vocab_size=get.size("vocab_size"), hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=get.size("num_key_value_heads",
                              8 if family == "mistral" else 32 if family in ("qwen2", "qwen3") else heads),
        head_dim=head_dim, intermediate_size=get.size("intermediate_size"),
        max_positions=get.size("max_position_embeddings"), norm_eps=get.number("rms_norm_eps", 1e-6, 0),
        tie_head=get.switch("tie_word_embeddings", False), activation="silu",
        initializer_range=get.number("initializer_range", 0.02, 0),
        attention_dropout=get.number("attention_dropout", 0.0, 0, 1), qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias, mlp_bias=get.switch("mlp_bias", False) and family == "llama", qk_norm=family == "qwen3",
        rope_theta=theta, rope_scaling=rope, sliding_window=window, sliding_layers=sliding_layers)

def _rope(get: _Fields) -> tuple[float, dict]:
    """The base of the rotary angles and their scaling: in rope_parameters (dialect 5), or in two fields (dialect 4)."""
    parts = get("rope_parameters", {}), get("rope_scaling", {})
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{get.path}: rope_parameters and rope_scaling must be JSON objects")
    rope = {**parts[0], **parts[1]}
    theta = rope.pop("rope_theta", None) or get("rope_theta", 10000.0)
    get("rope_theta", None)
    kind = rope["rope_type"] = str(rope.pop("type", None) or rope.get("rope_type", "default"))
    needed = {"default": [], "linear": ["factor"],
              "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
    if kind not in needed or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{get.path}: the rotary scaling {rope} is not implemented (implemented: {', '.join(needed)})")
    for name, value in [("rope_theta", theta), *((name, rope.get(name)) for name in needed[kind])]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(f"{get.path}: rotary embeddings want a positive number as {name}, found {value!r}")
    return theta, rope

def _sliding_layers(get: _Fields, family: str, layers: int) -> tuple[int | None, list[bool]]:
    """The window in tokens, and whether each layer slides: all of Mistral's; Qwen's upper ones, when switched on."""
    # a window that is absent has the family's default in transformers, one that is null is off
    present = "sliding_window" in get.values or family != "mistral"
    window, types = get("sliding_window", None if present else 4096), get("layer_types", None)
    if window is not None:
        window = get.size("sliding_window", window)
    switched_on = get.switch("use_sliding_window", family == "mistral")
    first = get.number("max_window_layers", 28, 0)
    if types is not None and not isinstance(types, list):
        raise InputError(f"{get.path}: layer_types must be a list")
    if family == "llama" or window is None or not switched_on:
        if types and "sliding_attention" in types and family != "llama":
            raise InputError(f"{get.path}: layer_types name sliding_attention, but the sliding window is off")
        return None, [False] * layers
    if types is None:
        return window, [family == "mistral" or i >= first for i in range(layers)]
    if len(types) != layers or not set(map(str, types)) <= {"full_attention", "sliding_attention"}:
        raise InputError(f"{get.path}: layer_types must be full_attention or sliding_attention for {layers} layers")
    return window, [family == "mistral" or kind == "sliding_attention" for kind in types]
