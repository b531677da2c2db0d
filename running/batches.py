"""A run's steps and their tensors: which rows a step has, dealt out to processes, prepared during the step before."""
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from methods.sides import with_places
from methods.uld import common_positions
from running import parallel
from running.setup import Run
from tokenize_align import Example, collate, make_batches

def steps_of(config, run: Run, first: int) -> Iterator[tuple[int, list[Example], list[tuple[dict, float]]]]:
    """(number, examples, forward passes) of every step from `first` on. A step's rows are batch_size · grad_accum of
    like length; the examples are all of them, the forward passes this process's own. The next step is prepared in
    another thread while this one is used."""
    prepared = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for step, examples in schedule(config, run, first):
            prepared.append((step, examples, pool.submit(prepare, config, run, examples)))
            if len(prepared) == 2:
                yield ready(run, *prepared.popleft())
        for waiting in prepared:
            yield ready(run, *waiting)

def ready(run: Run, step: int, examples: list[Example], passes):
    """A prepared step; its largest forward pass is noted, should the memory not suffice for it."""
    passes = passes.result()
    batch = max((batch for batch, _ in passes), key=lambda batch: batch["student_ids"].numel())
    run.shapes = {name: tuple(x.shape) for name, x in batch.items() if name.endswith("_ids")}
    return step, examples, passes

def schedule(config, run: Run, first: int) -> Iterator[tuple[int, list[Example]]]:
    """Every step's number and rows; each epoch has an order of its own."""
    for step in range(first, run.total_steps):
        epoch, number = divmod(step, run.steps_per_epoch)
        if step == first or number == 0:
            seed = config.seed * 1_000_003 + epoch
            batches = make_batches(run.examples, config.batch_size * config.grad_accum, seed)
        yield step, batches[number]

def prepare(config, run: Run, examples: list[Example]) -> list[tuple[dict[str, torch.Tensor], float]]:
    """This process's forward passes of a step: its tensors, and its weight, which is 0 where there is nothing left for
    this process; it then goes through the motions so that the others need not wait."""
    parts = [part for k in range(config.grad_accum) if (part := examples[k::config.grad_accum])]
    several = parallel.world()
    mine = range(parallel.rank(), math.ceil(len(parts) / several) * several, several)
    return [(tensors(config, run, parts[k % len(parts)]), float(k < len(parts))) for k in mine]

def tensors(config, run: Run, examples: list[Example]) -> dict[str, torch.Tensor]:
    """One forward pass's batch, with what its method needs beside ids and labels."""
    batch = collate(examples, *run.pads, config.align_on if config.alignment not in ("none", "attention") else None)
    batch = with_places(batch)
    if config.method == "uld":
        batch["common"] = common_positions(batch["student_grid_mask"], batch["teacher_grid_mask"])
    if run.pairing:
        batch |= run.pairing.tensors(examples)
    if run.states:
        batch["teacher_hidden"] = run.states.grid(examples, run.teacher.embed.weight.dtype)
    return {name: x.pin_memory() for name, x in batch.items()} if run.device == "cuda" else batch

def valid_tokens(examples: list[Example]) -> dict[str, int]:
    """n of each side: the step's valid tokens, of all processes."""
    return {side: sum(getattr(example, side).valid for example in examples) for side in ("student", "teacher")}
