"""What is checked before anything is loaded or written: the flags, and whether models and machine go with them."""
import os
import shutil
from pathlib import Path

import toy
from files import hub
from files.config import InputError, parse
from methods.table import LOGITS_ONLY, METHODS, ONE_VOCABULARY, WITHOUT_KD, check_options
from running import parallel
from running.run_folder import newest_run, saved_config

def read_settings(cls, description: str, argv: list[str] | None = None):
    """train.py's command line → cls, its Config: the flags, with the toy's defaults for the toy and, on --resume, the
    settings of the run. Raises InputError for what does not go together."""
    def presets(given):
        if given.get("resume") and given.get("overwrite"):
            raise InputError("--resume goes on with a run and --overwrite deletes it: pass one of them")
        is_toy = given.get("student", "toy" if not given.get("teacher") else "") == "toy"
        name = given.get("method", toy.TRAINING["method"] if is_toy else cls.method)
        if given.get("resume"):
            saved = saved_config(cls, Path(given.get("out_dir") or newest_run(cls(**{**given, "method": name}))), given)
            return {**METHODS.get(str(saved["method"]), {}), **saved}
        return {**(toy.TRAINING if is_toy else {}), "method": name, **METHODS[name],
                **({} if "alignment" in METHODS[name] else {"probe_interval": 0}),
                **({"student": "toy", "data": "toy"} if is_toy else {"data": "dolly"})}

    toy_defaults = " ".join(f"--{name} {value}" for name, value in toy.TRAINING.items())
    config = parse(cls, f"{description}\nThe toy's defaults: {toy_defaults}", argv, presets=presets)
    if not config.student:
        raise InputError("--teacher without --student: name the student too (without either, the toy is trained)")
    if config.method != "sft" and not config.teacher:
        if config.student != "toy":
            raise InputError(f"--method {config.method} needs a --teacher (--method sft trains the student alone)")
        config.teacher = "toy"
    check_options(config)
    check_flags(config)
    return config

def check_flags(config) -> None:
    """Raise InputError where two flags of train.py exclude each other, or one means nothing beside the others."""
    method, sharded = config.method, config.shard_student or config.shard_teacher
    if method in WITHOUT_KD and (config.cache_teacher or config.shard_teacher):
        raise InputError(f"--cache_teacher, --shard_teacher: --method {method} does not train with the teacher")
    if method in ONE_VOCABULARY and config.student == config.teacher == "toy":
        raise InputError(f"--method {method} needs one vocabulary, and the toy's two models have two")
    if config.alignment == "none" and config.probe_interval:
        raise InputError(f"--probe_interval: --method {method} has no attention to look at")
    if config.lora_rank and config.student_init == "random":
        raise InputError("--lora_rank: keeps the student's weights, so they cannot be random (--student_init random)")
    for field in ("lora_alpha", "lora_dropout"):
        if not config.lora_rank and getattr(config, field) != getattr(type(config), field):
            raise InputError(f"--{field}: without --lora_rank it has no use")
    if config.compile and (sharded or config.gradient_checkpointing):
        raise InputError("--compile: not together with --shard_student, --shard_teacher or --gradient_checkpointing")
    if config.cache_teacher and config.shard_teacher:
        raise InputError("--cache_teacher: trains without the layers that --shard_teacher deals out: pass one of them")
    if config.on_policy:
        if method in WITHOUT_KD:
            raise InputError(f"--on_policy: --method {method} does not train with a teacher, who could judge an answer")
        if config.alignment != "none" and (config.value, config.gate) != ("hidden", "always"):
            raise InputError("--on_policy: what a student answers is no label; dual-space methods need --value hidden "
                             "--gate always for it")
        if config.on_policy == 1 and method not in LOGITS_ONLY:
            raise InputError(f"--on_policy 1: the projectors of {method} learn from labels alone; pass less than 1")
        if config.cache_teacher or config.shard_student:
            raise InputError("--on_policy: the student's answers are new at every step, and of different lengths in "
                             "every process: not together with --cache_teacher or --shard_student")
    if method == "sft" and config.teacher:
        raise InputError("--method sft has no teacher: pass the model that learns as --student, and no --teacher")

def check_machine(config, device: str) -> None:
    """Raise InputError where the flags do not fit the processes, or the machine has no compiler for --compile."""
    several, rows = parallel.world(), config.batch_size * config.grad_accum
    if config.grad_accum % several:
        raise InputError(f"--grad_accum {config.grad_accum}: must be a multiple of the {several} processes; for these "
                         f"{rows} rows a step --batch_size {max(1, rows // several)} --grad_accum {several}")
    if (config.shard_student or config.shard_teacher) and several == 1:
        raise InputError("--shard_student, --shard_teacher: start with torchrun --nproc_per_node=N train.py …")
    if config.compile:
        check_compiler(device)

def check_compiler(device: str) -> None:
    """Raise InputError where --compile has no compiler."""
    variable, compiler = ("CXX", "g++") if device == "cpu" else ("CC", "gcc")
    if not shutil.which(os.environ.get(variable, compiler)):
        raise InputError(f"--compile: torch.compile needs a compiler ({compiler}, or ${variable}), and there is none")

def check_pair(config, student, teacher, tokenizers: dict) -> None:
    """Raise InputError where tokenizers, vocabularies, limits and method do not go together. teacher: or None."""
    for side, model in {"student": student, "teacher": teacher}.items():
        if model is None:
            continue
        name = f"--{side} {getattr(config, side)}"
        hub.check_vocabulary(name, model.config.vocab_size, tokenizers[side].vocab_size)
        if config.max_length > model.config.max_positions:
            raise InputError(f"--max_length {config.max_length}: {name} has {model.config.max_positions} positions")
    if config.method in ONE_VOCABULARY and not same_vocabulary(tokenizers["student"], tokenizers["teacher"]):
        raise InputError(f"--method {config.method} needs one vocabulary, but {config.teacher} and {config.student} "
                         f"have different ones; every method but {' and '.join(ONE_VOCABULARY)} works with any two")

def same_vocabulary(a, b) -> bool:
    """Whether two tokenizers have the same tokens under the same ids."""
    return (a.vocab_size, a.eos_id) == (b.vocab_size, b.eos_id) and \
        all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))
