"""How much memory a run's weights, gradients and optimizer take in each process, before it is started.

    python memory.py --teacher qwen --student gpt2
    python memory.py --teacher mistral --student tinyllama --processes 8 --shard_teacher --shard_student      # of torchrun

Weights that are trained are float32 and cost 16 bytes a parameter: 4 for the weight, 4 for its gradient, 8 for AdamW's two
moments. The teacher's are bfloat16 on a GPU, 2 bytes. What a step computes comes on top of it and grows with --batch_size
and --max_length; --gradient_checkpointing makes it smaller.
"""
from dataclasses import dataclass

import torch

import hub
from cma import Projectors
from config import flag, parse
from discriminator import Discriminator
from hub import InputError
from lora import add_lora
from model import GPT2, Llama
from model_config import read_config


def shape_of(name_or_dir: str):
    """A Decoder without memory for its weights; only config.json is read."""
    config = read_config(hub.model_dir(name_or_dir, weights=False) / "config.json")
    with torch.device("meta"):
        return (GPT2 if config.family == "gpt2" else Llama)(config)


def state_bytes(student, teacher, others: list, teacher_bytes: int, processes: int = 1, shard_student: bool = False, shard_teacher: bool = False,
                cache_teacher: bool = False) -> dict[str, int]:
    """Bytes in the first of `processes`: of the student, of the teacher (or None), and of the other modules that learn.

    teacher_bytes: of a number in the teacher's weights. Of a sharded model's layers a process has a share of every
    matrix's rows, rounded up. cache_teacher: only the embedding and the head.
    """
    def count(module, sharded, wanted=lambda name, p: True):
        total = 0
        for name, p in module.named_parameters():
            if wanted(name, p):
                rows = -(-p.size(0) // processes) if sharded and name.startswith("layers.") else p.size(0)
                total += rows * (p.numel() // p.size(0))
        return total

    learns = lambda name, p: p.requires_grad
    trained = count(student, shard_student, learns) + sum(count(module, False, learns) for module in others)
    result = {"student's weights": 4 * count(student, shard_student), "projectors and adversary": 4 * sum(count(module, False) for module in others),
              "gradients": 4 * trained, "AdamW's moments": 8 * trained}
    if teacher is not None:
        embedding = lambda name, p: not cache_teacher or not name.startswith("layers.")
        result["teacher's weights"] = teacher_bytes * count(teacher, shard_teacher, embedding)
    return result


@dataclass
class Config:
    student: str = flag("gpt2", "name, hub id or folder (only its config.json is read)")
    teacher: str = flag("", "the same; none for --method sft")
    processes: int = flag(1, "of torchrun", at_least=1)
    shard_student: bool = flag(False, "as in train.py")
    shard_teacher: bool = flag(False, "as in train.py")
    cache_teacher: bool = flag(False, "as in train.py")
    lora_rank: int = flag(0, "as in train.py (0: all weights are trained)", at_least=0)
    dtype: str = flag("bfloat16", "of the teacher's weights", choices=("bfloat16", "float32"))


def main() -> None:
    config = parse(Config, __doc__)
    if (config.shard_student or config.shard_teacher) and config.processes == 1:
        raise InputError("--shard_student, --shard_teacher: parts for several processes; pass --processes")
    student, teacher, others = shape_of(config.student), None, []
    if config.lora_rank:
        add_lora(student, config.lora_rank, 1.0, 0.0)
    if config.teacher:
        teacher = shape_of(config.teacher)
        sizes = student.config.hidden_size, teacher.config.hidden_size
        with torch.device("meta"):
            others = [Projectors(*sizes, query=True), Discriminator(2 * sizes[1])]
    parts = state_bytes(student, teacher, others, 2 if config.dtype == "bfloat16" else 4, config.processes, config.shard_student, config.shard_teacher, config.cache_teacher)
    for name, size in [*parts.items(), ("in each process", sum(parts.values()))]:
        print(f"{name:<28}{size / 1e9:8.2f} GB")


if __name__ == "__main__":
    hub.run(main)
