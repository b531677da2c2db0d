"""A model of the transformers library, as the losses see one: embeddings, last hidden states and a
head. train.py needs no more of a teacher whose architecture is not written here (Gemma, Phi, OLMo,
Pythia …), and distillation.py no more of either model."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

from runtime.config import InputError
from runtime.distributed import print_first

NO_LIMIT = 1 << 20  # positions of a model that names no limit
# Fields of configurations that change logits: soft caps (Gemma 2), scales (Cohere, Granite …).
ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class TransformersModel(nn.Module):
    """What model.Decoder offers to the losses, to scoring and to generation, but for save().

    Raises InputError where the logits are not W h, h being the last hidden states: a bias, a scale
    or a soft cap would be left out of the distillation."""

    def __init__(self, model, folder: Path | None = None):
        super().__init__()
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        inside = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
        self.model, self.source = inside.base_model, folder
        text = model.config.get_text_config()
        vocab_size, hidden_size = self.head.weight.shape
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_positions=getattr(text, "max_position_embeddings", NO_LIMIT),
        )
        name = folder or type(model).__name__
        refused = [field for field in ON_LOGITS if getattr(text, field, None) not in (None, 1)]
        if getattr(self.head, "bias", None) is not None:
            refused.append("a bias of the head")
        if refused:
            raise InputError(
                f"{name}: has {', '.join(refused)}; a teacher's logits must be its head times "
                "its last hidden states, and nothing else"
            )
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        ids = torch.arange(8, device=self.embed.weight.device)[None]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                hidden, cache = self(ids)[0], SimpleNamespace(of_library=None)
                steps = [self(ids[:, :5], None, cache), self(ids[:, 5:], None, cache)]
                expected = model(ids).logits[0].float()
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise InputError(
                f"{name}: {type(model).__name__} does not run token by token as decoders do "
                f"({error})"
            ) from error
        model.train(training)
        self.hidden_scale = float(hidden.float().square().mean().sqrt())
        for states in (hidden, torch.cat(steps, 1)[0]):
            found = (states @ self.head.weight.mT).float()
            if (found - expected).norm() > 0.05 * expected.norm():  # bfloat16 is off by 0.01
                raise InputError(
                    f"{name}: the logits of {type(model).__name__} are not its head times its last "
                    "hidden states, so it cannot teach here"
                )

    def forward(self, ids: torch.Tensor, mask=None, cache=None) -> torch.Tensor:
        """As model.Decoder: token ids (B, T) → hidden states (B, T, d)."""
        how = {"use_cache": False}
        if cache is None and mask is not None and mask[:, 0].all():
            mask = None  # padding on the right, which causal attention does not see
        if cache is not None:
            if cache.of_library is None:
                from transformers import DynamicCache

                cache.of_library = DynamicCache(config=self.model.config)
            how = {"past_key_values": cache.of_library, "use_cache": True}
        if mask is not None:
            how["attention_mask"] = mask.long()
            if self.takes_positions:
                positions = mask.long().cumsum(1).sub(1).clamp(min=0)
                how["position_ids"] = positions[:, -ids.size(1) :]
        return self.model(input_ids=ids, **how).last_hidden_state

    def drop_layers(self) -> None:
        """Free what .embed and .head are not needed for."""
        self.model = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) → (..., V)"""
        return self.head(hidden)


def load_transformers(folder: Path, dtype: torch.dtype, device: str) -> TransformersModel:
    """Read a folder by transformers' AutoModelForCausalLM. Raises InputError where transformers is
    not installed or does not know the architecture either."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError(
            f"{folder}: this architecture is not written here; as a teacher it needs a library:  "
            "pip install transformers"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # the library's own
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: transformers cannot load it ({reason:.300})") from error
    print_first(f"note: {folder} ({type(model).__name__}) is run by the transformers library")
    return TransformersModel(model.to(device).eval(), folder).eval()
