"""A run's steps and their tensors: which rows a step has, dealt out to processes, prepared during the step before."""
import math
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from methods.byte_kd import BytePaths
from methods.sides import with_places
from running import parallel
from running.answers import own_answers
from running.setup import Run
from tokenize_align import Example, collate, make_batches

Pass = tuple[dict[str, torch.Tensor], float, str]       # a forward pass: tensors, weight, what it `learns` from

def steps_of(config, run: Run, first: int) -> Iterator[tuple[int, list[Example], dict[str, int], list[Pass]]]:
    """(number, examples, valid tokens, forward passes) of every step from `first` on. A step's rows are batch_size ·
    grad_accum of like length; the examples and tokens are of all processes, the forward passes this process's own. The
    next step is prepared in another thread while this one is used; what a student itself answers, when it is due."""
    prepared = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for step, examples in schedule(config, run, first):
            prepared.append((step, examples, pool.submit(prepare, config, run, step, examples)))
            if len(prepared) == 2:
                yield ready(config, run, *prepared.popleft())
        for waiting in prepared:
            yield ready(config, run, *waiting)

def ready(config, run: Run, step: int, examples: list[Example], passes):
    """A prepared step; its largest forward pass is noted, should the memory not suffice for it."""
    passes, n = passes.result(), valid_tokens(examples)
    if is_on_policy(config, step):
        answered, of_answers = with_own_answers(config, run, step, examples)
        passes, n = passes + answered, of_answers | {"labels": n["student"]}
    batch = max((batch for batch, _, _ in passes), key=lambda batch: batch["student_ids"].numel())
    run.shapes = {name: tuple(x.shape) for name, x in batch.items() if name.endswith("_ids")}
    return step, examples, n, passes

def schedule(config, run: Run, first: int) -> Iterator[tuple[int, list[Example]]]:
    """Every step's number and rows; each epoch has an order of its own."""
    for step in range(first, run.total_steps):
        epoch, number = divmod(step, run.steps_per_epoch)
        if step == first or number == 0:
            seed = config.seed * 1_000_003 + epoch
            batches = make_batches(run.examples, config.batch_size * config.grad_accum, seed)
        yield step, batches[number]

def shares(config, examples: list[Example]) -> list[tuple[list[Example], float]]:
    """The rows of this process's forward passes of a step, and their weight, which is 0 where there is nothing left for
    this process; it then goes through the motions so that the others need not wait."""
    parts = [part for k in range(config.grad_accum) if (part := examples[k::config.grad_accum])]
    several = parallel.world()
    mine = range(parallel.rank(), math.ceil(len(parts) / several) * several, several)
    return [(parts[k % len(parts)], float(k < len(parts))) for k in mine]

def prepare(config, run: Run, step: int, examples: list[Example]) -> list[Pass]:
    """This process's forward passes over the data's rows."""
    if not is_on_policy(config, step):
        return [(tensors(config, run, part), weight, "all") for part, weight in shares(config, examples)]
    return [(pinned(run, with_places(collate(part, *run.pads))), weight, "labels")
            for part, weight in shares(config, examples)]

def tensors(config, run: Run, examples: list[Example]) -> dict[str, torch.Tensor]:
    """One forward pass's batch, with what its method needs beside ids and labels."""
    batch = collate(examples, *run.pads, config.align_on if config.alignment not in ("none", "attention") else None)
    batch = with_places(batch)
    if run.pairing:
        batch |= run.pairing.tensors(examples)
    if run.states:
        batch["teacher_hidden"] = run.states.grid(examples, run.teacher.embed.weight.dtype)
    return pinned(run, batch)

def pinned(run: Run, batch: dict) -> dict:
    return {name: x.pin_memory() for name, x in batch.items()} if run.device == "cuda" else batch

def valid_tokens(examples: list[Example]) -> dict[str, int]:
    """n of each side: the step's valid tokens, of all processes."""
    return {side: sum(getattr(example, side).valid for example in examples) for side in ("student", "teacher")}

# ---------------------------------------------------------------------------------------------------------- on-policy
def is_on_policy(config, step: int) -> bool:
    """Whether the student answers for itself in this step: a draw with the probability --on_policy that is the same in
    every process, and after an interruption."""
    return random.Random(f"{config.seed}, {step}").random() < config.on_policy

def with_own_answers(config, run: Run, step: int, examples: list[Example]) -> tuple[list[Pass], dict[str, int]]:
    """The student answers the prompts of this process's rows → forward passes over its answers, and all processes'
    valid tokens of both sides."""
    passes, counts = [], torch.zeros(2)
    for part, weight in shares(config, examples):
        seed = random.Random(f"{config.seed}, {step}, {part[0].row}").getrandbits(63)      # whichever process has it
        generator = torch.Generator(run.device).manual_seed(seed)
        with run.autocast():
            answered, texts = own_answers(run.student, run.cut_by, part, run.rows["train"], config.max_length,
                                          config.max_prompt_length, generator)
        if isinstance(run.pairing, BytePaths):
            run.pairing.add(answered, texts)
        passes.append((tensors(config, run, answered), weight, "answers"))
        n = valid_tokens(answered)
        counts += weight * torch.tensor([n["student"], n["teacher"]])
    n_s, n_t = parallel.add(counts.to(run.device)).tolist()
    return passes, {"student": int(n_s), "teacher": int(n_t)}
