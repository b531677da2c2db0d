"""How much memory a run takes in each process, before it is started: what stays, and what a step computes.

    python -m tools.memory --teacher qwen --student gpt2
    python -m tools.memory --teacher mistral --student tinyllama --lora_rank 256 --gradient_checkpointing
    python -m tools.memory --teacher mistral --student tinyllama --processes 8 --shard_teacher --shard_student

Weights that are trained are float32 and cost 16 bytes a parameter: 4 for the weight, 4 for its gradient, 8 for AdamW's
two moments. The teacher's are bfloat16 on a GPU, 2 bytes, and so are the student's beside LoRA, unless it is sharded.
What a step computes is counted in a step on tensors without content (seconds, whatever the models' size): the most
bytes that are alive at once, the gradients left out, of --batch_size rows of --max_length tokens, half of them of the
response. Of sharded models the layers that are fetched come on top of it, and everywhere what the libraries keep."""
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from files import hub
from files.config import InputError, flag, parse
from methods import heads
from methods.alm import TextChunks
from methods.byte_kd import NextBytes
from methods.sides import with_places
from methods.table import METHODS, Options, make_modules
from model import Attention, shape_of
from running.launches import Launches, loss_of
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

# ------------------------------------------------------------------------------------------------- what a step computes
def step_bytes(options: Options, student, teacher, modules, rows: int, length: int, dtype: torch.dtype,
               cache_teacher: bool = False) -> int:
    """The most bytes that a forward and a backward pass have alive at once, gradients among them. student, teacher (or
    None), modules (or Nones): without memory (shape_of); student.checkpointing counts. dtype: computed in."""
    mode, batch = FakeTensorMode(), full_batch(rows, length)
    batch = {name: mode.from_tensor(x) for name, x in batch.items()}
    with mode:
        for module in filter(None, (student, teacher, *modules)):
            _allocate(module, dtype)
        batch |= pairing_like(options, student, teacher, rows, length - length // 2)
        if cache_teacher:
            batch["teacher_hidden"] = torch.empty(rows, length - length // 2, teacher.config.hidden_size, dtype=dtype)
        student.train()
        with Launches() as count:
            with hub.autocast("cpu", dtype):
                loss = loss_of(options, batch, student, teacher, *modules, {"student": 1, "teacher": 1})
            loss.backward()
    return count.peak

def _allocate(module, dtype: torch.dtype) -> None:
    """Give a module parameters in the mode that is on, float32 where they learn; what is one stays one."""
    given = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p not in given:
                made = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else dtype)
                given[p] = torch.nn.Parameter(made, p.requires_grad)
            part._parameters[name] = given.get(p)
    if hasattr(module, "tie"):
        module.tie()

def full_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows that are not padded, of the same number of tokens on both sides, the second half of them the response."""
    ids = torch.ones(rows, length, dtype=torch.long)
    labels = ids.clone()
    labels[:, :length // 2] = -100
    places = torch.arange(length).expand(rows, -1)
    kinds = {"ids": ids, "labels": labels, "chunks": places, "starts": places}
    return with_places({f"{side}_{kind}": x for side in ("student", "teacher") for kind, x in kinds.items()})

def pairing_like(options: Options, student, teacher, rows: int, responses: int) -> dict:
    """What running.setup.pairing_of would add to a batch: 4 bytes a token, 2 tokens a chunk, a pair at every token."""
    n, position = rows * responses, torch.arange(rows * responses)
    if options.method == "byte_kd":
        sizes = {"student": student.config.vocab_size, "teacher": teacher.config.vocab_size}
        tables = {side: (torch.arange(size), torch.zeros(9999, 257, dtype=torch.int32), torch.zeros(9999).long(), 0)
                  for side, size in sizes.items()}
        at = {side: position.repeat_interleave(4) for side in sizes}
        return {"next_bytes": NextBytes(at, {side: torch.zeros(4 * n).long() for side in sizes},
                                        {side: list(range(0, 4 * n + 1, 4)) for side in sizes}, tables)}
    if options.method == "alm":
        size, numbers = heads.chunk_size("cpu"), {side: position // 2 for side in ("student", "teacher")}
        pieces = [(slice(k, min(k + size, n)), k // 2, (min(k + size, n) + 1) // 2) for k in range(0, n, size)]
        return {"text_chunks": TextChunks(numbers, (n + 1) // 2, pieces)}
    if options.method == "mined":
        vocabulary_map = torch.arange(teacher.config.vocab_size) % student.config.vocab_size
        return {"pairs": torch.stack([position // responses, position % responses, position % responses]),
                "vocabulary_map": vocabulary_map}
    return {"common": position.expand(2, -1)} if options.method == "uld" else {}

@dataclass
class Config:
    student: str = flag("gpt2", "name, hub id or folder (only its config.json is read)")
    teacher: str = flag("", "the same; none for --method sft")
    method: str = flag("", "as in train.py (default: dskd_cma_ga, or sft without a teacher)", choices=("", *METHODS))
    batch_size: int = flag(32, "rows a forward pass", at_least=1)
    max_length: int = flag(512, "their length in tokens", at_least=2)
    gradient_checkpointing: bool = flag(False, "as in train.py")
    processes: int = flag(1, "of torchrun", at_least=1)
    shard_student: bool = flag(False, "as in train.py")
    shard_teacher: bool = flag(False, "as in train.py")
    cache_teacher: bool = flag(False, "as in train.py")
    lora_rank: int = flag(0, "as in train.py (0: all weights are trained)", at_least=0)
    dtype: str = flag("bfloat16", "computed in; bfloat16 counts a GPU's larger chunks", choices=("bfloat16", "float32"))

def main() -> None:
    config = parse(Config, __doc__)
    if (config.shard_student or config.shard_teacher) and config.processes == 1:
        raise InputError("--shard_student, --shard_teacher: parts for several processes; pass --processes")
    method = config.method or ("dskd_cma_ga" if config.teacher else "sft")
    if (method == "sft") == bool(config.teacher):
        raise InputError(f"--method {method}: {'has no' if config.teacher else 'needs a'} --teacher")
    options, dtype = Options(method=method, **METHODS[method]), getattr(torch, config.dtype)
    student, teacher = shape_of(config.student), None
    if config.lora_rank:
        add_lora(student, config.lora_rank, 1.0, 0.0)
    if config.teacher:
        teacher = shape_of(config.teacher).requires_grad_(False)
    positions = min(model.config.max_positions for model in (student, teacher) if model is not None)
    if config.max_length > positions:
        raise InputError(f"--max_length {config.max_length}: there are {positions} positions")
    with torch.device("meta"):
        modules = make_modules(options, student, teacher)
    others = list(filter(None, modules))
    parts = state_bytes(student, teacher, others, dtype.itemsize, config.processes,
                        config.shard_student, config.shard_teacher, config.cache_teacher)
    student.checkpointing = config.gradient_checkpointing
    if dtype == torch.bfloat16:             # as on a GPU: chunks are larger, and dropout needs no matrix of attention
        heads.CHUNK *= 8
        Attention.float32_up_to = 0
        student.config.attention_dropout = 0.0
    whole = state_bytes(student, None, others, dtype.itemsize)["gradients"]
    stays = sum(parts.values())
    step = step_bytes(options, student, teacher, modules, config.batch_size, config.max_length, dtype,
                      config.cache_teacher) - whole
    parts |= {"what stays": stays, "what a step computes": step, "in each process": stays + step}
    for name, size in parts.items():
        print(f"{name:<28}{size / 1e9:8.2f} GB")

if __name__ == "__main__":
    hub.run(main)
