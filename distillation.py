"""The losses without the training script, for a loop of your own or a transformers Trainer:

    loss_function = DistillationLoss("byte_kd", student, teacher, "gpt2", "qwen2.5-0.5b")
    loss, terms = loss_function([{"prompt": "Name a river.", "output": "The Rhine."}, …])
    loss.backward()

Models are transformers' or this project's (model.load); tokenizers are transformers', this
project's, names or folders. examples/ has a notebook and a Trainer."""

import tempfile
from pathlib import Path

import torch
import torch.nn as nn

from data import Row, read_row
from methods import Objective, find_method
from methods.projector_init import init_from_shared, shared_tokens
from model import Decoder
from runtime.config import InputError, checked
from runtime.distributed import autocast
from runtime.transformers_model import TransformersModel
from tokenize_align import Tokenizer, collate, encode_rows, load_tokenizer, same_vocabulary
from train import Config

# Options of train.py that a loss alone has no use for.
OF_TRAINING = ("on_policy", "cache_teacher", "projector_lr", "ga_lr")


class DistillationLoss(nn.Module):
    """The total of a method, and its terms for a log. parameters(): what learns beside the student
    (projectors, an adversary), for the optimizer; the student's own are the student's.

    options: the method's, as train.py has them (kd_rate, temperature, divergence, …). step: the
    optimizer steps done, which dwa_kd goes by; every call in training counts as one, so set it
    where several calls make a step. Where a model is in bfloat16, autocast to it is on. Raises
    InputError for an option or a pair of models that the method cannot use."""

    def __init__(
        self,
        method: str,
        student,
        teacher,
        student_tokenizer,
        teacher_tokenizer,
        max_length: int = 512,
        max_prompt_length: int = 256,
        prompt_format: str = "auto",
        **options,
    ):
        super().__init__()
        self.method = find_method(method)
        if not self.method.needs_teacher or self.method.answered_by_teacher:
            raise InputError(f"{method}: is cross-entropy on a text; nothing to compute here")
        known = [name for name in self.method.uses if name not in OF_TRAINING]
        for name in options:
            if name not in known:
                raise InputError(f"{name}: {method} does not use it (it uses: {', '.join(known)})")
        self.options = checked(Config, {"method": method, **self.method.defaults, **options})
        if "ga_weight" in options and self.options.adversary == "none":
            raise InputError("ga_weight: there is no adversary")
        # In a tuple, so that they are no submodules: their parameters are not this module's.
        self.models = tuple(as_decoder(model) for model in (student, teacher))
        self.models[1].requires_grad_(False).eval()
        self.tokenizers = tuple(
            as_tokenizer(given, prompt_format) for given in (student_tokenizer, teacher_tokenizer)
        )
        if self.method.one_vocabulary:
            if not same_vocabulary(*self.tokenizers):
                raise InputError(f"{method}: needs one vocabulary, but these models have two")
            if self.tokenizers[0].eos_id != self.tokenizers[1].eos_id:
                raise InputError(f"{method}: the two models' answers end with different tokens")
        self.limits = max_length, max_prompt_length
        types = [model.embed.weight.dtype for model in self.models]
        self.dtype = torch.bfloat16 if torch.bfloat16 in types else torch.float32
        if self.method.make_modules and torch.float16 in types:
            raise InputError(
                f"{method}: needs models in bfloat16 or float32, but one is in float16"
            )
        self.learned = nn.ModuleDict()
        if self.method.make_modules:
            configs = (model.config for model in self.models)
            self.learned.update(self.method.make_modules(self.options, *configs))
        if self.options.projector_init == "shared":
            pairs = shared_tokens(*self.tokenizers)
            init_from_shared(self.learned["projectors"], *self.models, pairs)
        self.extras = None
        if self.method.batch_extras:
            self.extras = self.method.batch_extras(*self.tokenizers, [])
        self.step = 0

    def forward(self, rows: list[Row | dict]):
        """Rows as in a data file → the loss, a mean over the student's response tokens, and its
        terms. Raises InputError where no row has an answer that fits."""
        rows = [
            row if isinstance(row, Row) else read_row(f"row {number}", row)
            for number, row in enumerate(rows)
        ]
        examples, _, _ = encode_rows(list(filter(None, rows)), *self.tokenizers, *self.limits)
        if not examples:
            raise InputError(f"no row has a response token within max_length {self.limits[0]}")
        for example in examples:
            example.row = -1  # what is computed of a row is not kept for the next call
        student, teacher = self.models
        device = student.embed.weight.device
        if torch.is_autocast_enabled(device.type):
            if torch.get_autocast_dtype(device.type) == torch.float16:
                raise InputError(
                    "float16: it is too coarse for these gradients; use bfloat16 or float32"
                )
        if teacher.embed.weight.device != device:  # a Trainer moves the student alone
            teacher.to(device)
        self.learned.to(device)
        pads = (tokenizer.eos_id for tokenizer in self.tokenizers)
        batch = {name: tensor.to(device) for name, tensor in collate(examples, *pads).items()}
        if self.extras:
            batch |= self.extras(examples, device)
        objective = Objective(
            self.options,
            self.step,
            sum(len(example.student.response_ids) for example in examples),
            sum(len(example.teacher.response_ids) for example in examples),
        )
        if self.training:
            self.step += 1
        with autocast(device.type, self.dtype):
            return self.method.loss(batch, student, teacher, dict(self.learned), objective)


def as_decoder(model):
    """A model of this project as it is, one of transformers behind what the losses ask for."""
    return model if isinstance(model, (Decoder, TransformersModel)) else TransformersModel(model)


def as_tokenizer(given, prompt_format: str) -> Tokenizer:
    """This project's tokenizer, of a name, a folder or a tokenizer of transformers."""
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, (str, Path)):
        return load_tokenizer(given, prompt_format)
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return load_tokenizer(folder, prompt_format)
