"""config.json to ModelConfig: GPT-2, Llama, Mistral, Qwen2 and Qwen3, as transformers 4 and 5
write them.

A field that may change the model's result must be one that is implemented here. Whatever is neither
used nor known to be harmless is an error: a model that ignores its configuration is silently wrong.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch

from runtime.config import InputError

ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Fields that say nothing about the forward pass: names, generation defaults, training history.
HARMLESS = set("""architectures model_type dtype torch_dtype transformers_version _name_or_path
    name_or_path use_cache bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    task_specific_params n_ctx pretraining_tp max_window_layers is_llama_config
    transformers.js_config keys_to_ignore_at_inference return_dict output_hidden_states
    output_attentions chunk_size_feed_forward id2label label2id problem_type
    reorder_and_upcast_attn attn_implementation _attn_implementation max_length num_labels
    finetuning_task license gradient_checkpointing predict_special_tokens n_special output_past
    _num_labels _attn_implementation_autoset is_decoder unsloth_fixed unsloth_version
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj tokenizer_class do_sample num_beams num_beam_groups num_return_sequences
    temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping min_length bad_words_ids
    forced_bos_token_id forced_eos_token_id decoder_start_token_id prefix suppress_tokens
    begin_suppress_tokens remove_invalid_values exponential_decay_length_penalty
    output_scores return_dict_in_generate auto_map max_sequence_length""".split())


@dataclasses.dataclass
class ModelConfig:
    """The shape of a decoder. `hub` is config.json as it was read, for Decoder.save()."""

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
        """Angle per position of each pair of features, (head_dim / 2,), float32, on the CPU."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / self.rope_theta ** (pairs / self.head_dim)
        scaling = self.rope_scaling
        if scaling["rope_type"] == "linear":
            return frequencies / scaling["factor"]
        if scaling["rope_type"] == "llama3":
            # Wavelengths beyond the original context are stretched, short ones are kept, and those
            # between are interpolated.
            wavelength = 2 * math.pi / frequencies
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            original = scaling["original_max_position_embeddings"]
            keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
        return frequencies


class _Fields:
    """config.json as a function of a field's name that remembers what was asked for."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values
        self.used = set(HARMLESS)

    def __call__(self, name: str, *default):
        """The field's value. Where it is absent or null: the default, or else an InputError."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            if not default:
                raise InputError(f'{self.path}: no field "{name}"')
            return default[0]
        return value

    def require(self, name: str, *allowed) -> None:
        """Raise InputError where a field has a value that is not implemented."""
        self.used.add(name)
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise InputError(
                f'{self.path}: "{name}": {value!r} is not implemented '
                f"(implemented: {', '.join(map(repr, allowed))})"
            )

    def refuse_unknown(self) -> None:
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", [], {}):
                raise InputError(
                    f'{self.path}: the field "{name}": {value!r} is not implemented, '
                    "and it might matter"
                )


def read_fields(path: Path) -> tuple[dict, str | None]:
    """config.json, and the name of the architecture. Raises InputError where it is missing or
    damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no config.json in this folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    return values, (values.get("architectures") or [None])[0]


def read_config(path: Path) -> ModelConfig:
    """Read config.json. Raises InputError for a missing or damaged file and for an architecture,
    a field or a value that is not implemented."""
    values, name = read_fields(path)
    family = ARCHITECTURES.get(name)
    if family is None:
        raise InputError(
            f"{path}: the architecture {name!r} is not implemented (implemented, for students too: "
            f"{', '.join(ARCHITECTURES)})"
        )
    fields = _Fields(path, values)
    config = _gpt2(fields) if family == "gpt2" else _llama(fields, family)
    config.hub = values
    fields.refuse_unknown()
    return config


def _gpt2(get: _Fields) -> ModelConfig:
    get.require("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu")
    get.require("scale_attn_weights", True)
    hidden, heads, layers = get("n_embd"), get("n_head"), get("n_layer")
    return ModelConfig(
        family="gpt2",
        vocab_size=get("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=get("n_inner", 4 * hidden),
        max_positions=get("n_positions", 1024),
        norm_eps=get("layer_norm_epsilon", 1e-5),
        tie_head=get("tie_word_embeddings", True),
        activation=get("activation_function", "gelu_new"),
        initializer_range=get("initializer_range", 0.02),
        attention_dropout=get("attn_pdrop", 0.1),
        embed_dropout=get("embd_pdrop", 0.1),
        residual_dropout=get("resid_pdrop", 0.1),
        sliding_layers=[False] * layers,
    )


def _llama(get: _Fields, family: str) -> ModelConfig:
    get.require("hidden_act", "silu")
    get.require("rope_interleaved", False)
    get.require("partial_rotary_factor", 1.0)
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    layers = get("num_hidden_layers")
    # What transformers takes where the field is absent.
    kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, heads)
    head_dim = 128 if family == "qwen3" else hidden // heads
    attention_bias = get("attention_bias", False) and family in ("llama", "qwen3")
    rope_theta, rope_scaling = _rope(get)
    sliding_window, sliding_layers = _sliding_layers(get, family, layers)
    return ModelConfig(
        family=family,
        vocab_size=get("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", kv_heads),
        head_dim=get("head_dim", head_dim),
        intermediate_size=get("intermediate_size"),
        max_positions=get("max_position_embeddings"),
        norm_eps=get("rms_norm_eps", 1e-6),
        tie_head=get("tie_word_embeddings", False),
        activation="silu",
        initializer_range=get("initializer_range", 0.02),
        attention_dropout=get("attention_dropout", 0.0),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=get("mlp_bias", False) and family == "llama",
        qk_norm=family == "qwen3",
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
    )


def _rope(get: _Fields) -> tuple[float, dict]:
    """The base of the rotary angles and their scaling: transformers 5 writes rope_parameters,
    transformers 4 rope_theta and rope_scaling."""
    scaling = {**get("rope_parameters", {}), **get("rope_scaling", {})}
    theta = get("rope_theta", 10000.0)
    theta = scaling.pop("rope_theta", theta)
    kind = scaling.pop("type", None) or scaling.get("rope_type", "default")
    scaling["rope_type"] = kind
    implemented = ("default", "linear", "llama3")
    if kind not in implemented or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{get.path}: the rotary scaling {scaling} is not implemented "
            f"(implemented: {', '.join(implemented)})"
        )
    return theta, scaling


def _sliding_layers(get: _Fields, family: str, layers: int) -> tuple[int | None, list[bool]]:
    """The window in tokens, and which layers have it: all of Mistral's; of Qwen's the upper ones,
    where the window is switched on."""
    window, types = get("sliding_window", None), get("layer_types", None)
    switched_on, first = get("use_sliding_window", False), get("max_window_layers", 28)
    if family == "mistral":
        switched_on, first = True, 0
        if "sliding_window" not in get.values:
            window = 4096  # absent is transformers' default, null is off
    if family == "llama" or not switched_on:
        window = None
    slides = [kind == "sliding_attention" for kind in types or []]
    if window is None:
        if family != "llama" and any(slides):
            raise InputError(
                f"{get.path}: layer_types has sliding_attention, but the sliding window is off"
            )
        return None, [False] * layers
    if family == "mistral" and not all(slides):
        raise InputError(
            f"{get.path}: layer_types is {types}, but a Mistral with a sliding_window has it "
            "in all layers (the architecture with both kinds is Ministral)"
        )
    return window, slides or [layer >= first for layer in range(layers)]
