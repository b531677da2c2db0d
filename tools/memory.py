"""How much memory a run's weights, gradients and optimizer take in each process, before it is started.

    python -m tools.memory --teacher qwen --student gpt2
    python -m tools.memory --teacher mistral --student tinyllama --processes 8 --shard_teacher --shard_student

Weights that are trained are float32 and cost 16 bytes a parameter: 4 for the weight, 4 for its gradient, 8 for AdamW's
two moments. The teacher's are bfloat16 on a GPU, 2 bytes, and so are the student's beside LoRA, unless it is sharded.
What a step computes comes on top of it and grows with --batch_size and --max_length; --gradient_checkpointing makes it
smaller."""
from dataclasses import dataclass

import torch

from discriminator import Discriminator
from files import hub
from files.config import InputError, flag, parse
from methods.dual_space import Projectors
from model import shape_of
from running.lora import add_lora

def state_bytes(student, teacher, others: list, frozen_bytes: int, processes: int = 1, shard_student: bool = False,
                shard_teacher: bool = False, cache_teacher: bool = False) -> dict[str, int]:
    """Bytes in the first of `processes`: of the student, of the teacher (or None), and of the other modules that learn.
    frozen_bytes: of a number in the teacher's weights, and in the student's beside LoRA. Of a sharded model's layers a
    process has a share of every matrix's rows, rounded up. cache_teacher: only the embedding and the head."""
    def count(module, sharded=False, trained=False, layers=True):
        total = 0
        for name, p in module.named_parameters():
            in_layer = name.startswith("layers.")
            if (p.requires_grad or not trained) and (layers or not in_layer):
                rows = -(-p.size(0) // processes) if sharded and in_layer else p.size(0)
                total += rows * (p.numel() // p.size(0))
        return total

    learning = count(student, shard_student, trained=True)
    trained = learning + sum(count(module, trained=True) for module in others)
    frozen = (4 if shard_student else frozen_bytes) * (count(student, shard_student) - learning)
    result = {"student's weights": 4 * learning + frozen,
              "projectors and adversary": 4 * sum(map(count, others)),
              "gradients": 4 * trained, "AdamW's moments": 8 * trained}
    if teacher is not None:
        result["teacher's weights"] = frozen_bytes * count(teacher, shard_teacher, layers=not cache_teacher)
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
    parts = state_bytes(student, teacher, others, 2 if config.dtype == "bfloat16" else 4, config.processes,
                        config.shard_student, config.shard_teacher, config.cache_teacher)
    for name, size in [*parts.items(), ("in each process", sum(parts.values()))]:
        print(f"{name:<28}{size / 1e9:8.2f} GB")

if __name__ == "__main__":
    hub.run(main)
