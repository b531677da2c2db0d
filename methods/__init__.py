"""A method is one file with a record of what it is: METHOD = Method(loss=…).

    --method byte_kd            finds methods/byte_kd.py
    --method path/to/mine.py    takes a file of yours

methods/plain.py is the place to begin: one whole method as its equations stand. These files, like
cma.py and discriminator.py, import no model, no file and no script of the project."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config import InputError, did_you_mean

HERE = Path(__file__).parent
# Options that only some methods use. A method's record names those that it does.
METHOD_OPTIONS = (
    "kd_rate",
    "temperature",
    "divergence",
    "adversary",
    "ga_weight",
    "ga_lr",
    "dtw_weight",
    "projector_init",
    "projector_lr",
    "on_policy",
    "cache_teacher",
)


@dataclass
class Objective:
    """What is minimized: the paper's total. All that train.py runs takes it from here.

        total = (1 − α) · CE + α · KD + λ_GA · GA + λ_DTW · DTW

    A method calls it on the terms of a block of logits, or on those of a whole batch, and adds up
    what it gets. CE, KD and DTW are given as sums over tokens; they are divided by the number n of
    student tokens in a whole optimizer step, so that the total depends neither on how the step is
    split into batches nor on how far a batch is padded. (But for what is taken over a batch: σ,
    dskdv2's means over pairs, xtoken's likeliest tokens.) GA is given as it stands.

    train.py weighs a step's total by n beside an average step's, so that every token of an epoch
    weighs the same. The release does not, so that a token of a short answer weighs more than one of
    a long answer: 1.1 times at 32 rows a step, 2.3 times at 4."""

    options: object  # train.Config: kd_rate, temperature, divergence, …
    step: int  # optimizer steps done so far
    num_student_tokens: int  # response tokens and EOS in the step, of all processes
    num_teacher_tokens: int
    has_labels: bool = True  # False: the student's own answers, which no label teaches

    def __call__(self, ce=0.0, kd=0.0, ga=0.0, dtw=0.0):
        α = self.options.kd_rate
        λ_GA, λ_DTW = self.options.ga_weight, self.options.dtw_weight
        n = self.num_student_tokens
        CE, KD, GA, DTW = ce / n, kd / n, ga, dtw / n
        if not self.has_labels:
            CE = 0.0 * CE
        return (1 - α) * CE + α * KD + λ_GA * GA + λ_DTW * DTW

    def per_student_token(self, sums: dict) -> dict:
        """Sums over student tokens → what they add to the step's means, for the log; without labels
        what only these teach is left out."""
        means = {name: value.detach() / self.num_student_tokens for name, value in sums.items()}
        if not self.has_labels:
            means.pop("nll_loss", None)
            means.pop("accuracy", None)
        return means

    def per_teacher_token(self, sums: dict) -> dict:
        """The same for sums over teacher tokens."""
        return {name: value.detach() / self.num_teacher_tokens for name, value in sums.items()}


@dataclass(frozen=True)
class Method:
    """loss(batch, student, teacher, modules, objective) → (total, terms for the log).

    batch: what tokenize_align.collate and batch_extras give. student, teacher: decoders, or
    anything with .embed, .head and forward(ids, mask=None) → hidden states; nobody reads them where
    the mask is false. modules: what learns beside the student, from make_modules. The terms,
    tensors without gradients, add up to means over tokens.

    A file of yours has its own constants. For an option of the command line add a field to
    train.Config and its name to METHOD_OPTIONS."""

    loss: Callable
    uses: tuple[str, ...] = ()  # which METHOD_OPTIONS
    defaults: dict = field(default_factory=dict)  # options with other defaults
    # (options, student's config, teacher's config) → {name: module}; the projectors, the adversary
    make_modules: Callable | None = None
    # A class: (student tokenizer, teacher tokenizer, training examples) → a function of a batch's
    # examples and the device → {name: what the loss needs beside token ids}, merged into the batch
    batch_extras: Callable | None = None
    # What --cache_teacher keeps of the teacher in place of its last hidden states: a class like
    # runtime.teacher_states.HiddenStates that is made of (batch_extras' function, options)
    teacher_part: Callable | None = None
    needs_teacher: bool = True
    answered_by_teacher: bool = False  # the teacher's answers take the place of the data's
    one_vocabulary: bool = False  # both models must have the same tokens
    # How cma.align takes modules["projectors"], for probe.py; None: nothing to see but next bytes
    attention: str | None = None


def method_names() -> list[str]:
    """The files here that hold a METHOD."""
    files = HERE.glob("*.py")
    return sorted(f.stem for f in files if "\nMETHOD = " in f.read_text(encoding="utf-8"))


def method_file(name: str) -> Path:
    """The file of a method in this folder, or the user's own."""
    if name in method_names():
        return HERE / f"{name}.py"
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(
            f"--method {name}: must be the path of a file or one of {', '.join(method_names())}"
            f"{did_you_mean(name, method_names())}"
        )
    return path


def find_method(name: str) -> Method:
    """The record of a method. Raises InputError where there is none, or one with options that do
    not exist."""
    path = method_file(name)
    if path.parent == HERE:
        module = importlib.import_module(f"methods.{path.stem}")
    else:
        if str(path.resolve().parent) not in sys.path:
            sys.path.append(str(path.resolve().parent))  # it may import files beside it
        spec = importlib.util.spec_from_file_location(f"method_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise InputError(f"--method {name}: this file has no METHOD = Method(loss=…)")
    unknown = [option for option in method.uses if option not in METHOD_OPTIONS]
    if unknown:
        raise InputError(
            f"--method {name}: uses {', '.join(unknown)}, which METHOD_OPTIONS in "
            "methods/__init__.py lacks"
        )
    return method
