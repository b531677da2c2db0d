"""An optimizer step of the default method to be timed, and the same step as plain code on transformers: each in a
process of its own, whose peak memory is its own, and all in turn (tools/bench.py).

    times = alternate(config, folder, {"ours": {}, "transformers": {"reference": True}}, "step")

folder: the two models, and examples.json with the rows of a few batches. transformers: see requirements-test.txt."""
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from discriminator import Discriminator
from files import hub
from files.config import InputError
from methods import fused as compiled_losses
from methods import heads, plain
from methods.dual_space import Projectors
from methods.table import METHODS, Options
from model import load
from running import launches
from running.batches import valid_tokens
from running.cache import TeacherStates
from running.flops import peak_flops, step_flops
from running.setup import keep_memory
from tokenize_align import Example, Sequence, collate

def read_examples(folder: Path) -> list[Example]:
    return [Example(e["row"], Sequence(**e["student"]), Sequence(**e["teacher"]))
            for e in json.loads((folder / "examples.json").read_text())]

def teacher_states(folder: Path, teacher, examples: list[Example]) -> TeacherStates:
    return TeacherStates(folder / "train", "teacher", folder / "teacher", examples, teacher.config.hidden_size,
                         torch.bfloat16, torch.float32)

def our_step(folder: Path, device: str, dtype: torch.dtype, max_length: int, examples, cached=False, fused=True,
             compile=False, keep=True, pad=False, everywhere=False, chunk=0):
    """→ a function of examples that makes an optimizer step → its loss, and one that counts its operations."""
    if keep and device == "cpu":
        keep_memory()
    options = Options(**METHODS["dskd_cma_ga"])
    heads.CHUNK = chunk or heads.CHUNK
    student = load(folder / "student", device=device).eval()            # no dropout, so that losses can be compared
    teacher = load(folder / "teacher", dtype=dtype if device == "cuda" else torch.float32, device=device,
                   layers=not cached).requires_grad_(False)
    states = teacher_states(folder, teacher, examples) if cached else None
    projectors, adversary, optimizer = modules_and_optimizer(student, teacher, device, fused)
    compiled_losses.compiling = compile and device == "cuda"            # as running/setup.py has it
    if compile:
        student.compile(dynamic=True)
        teacher.compile(dynamic=True)

    def step(part):
        if everywhere:
            part = [Example(e.row, *(Sequence(s.ids, 1, [], []) for s in (e.student, e.teacher))) for e in part]
        batch = padded(collate(part, 0, 0), max_length if pad else 0, device)
        if cached:
            batch["teacher_hidden"] = states.grid(part, teacher.embed.weight.dtype).to(device)
        with hub.autocast(device, dtype):
            loss = launches.loss_of(options, batch, student, teacher, projectors, adversary, valid_tokens(part))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step, lambda part: step_flops(options, student, teacher, part, cached)

def modules_and_optimizer(student, teacher, device: str, fused: bool | None = None):
    """The same projectors and adversary for both steps, and AdamW."""
    torch.manual_seed(0)
    sizes = [decoder.embed.weight.size(1) for decoder in (student, teacher)]
    modules = Projectors(*sizes, query=True).to(device), Discriminator(2 * sizes[1], dropout=0.0).to(device)
    parameters = [p for module in (student, *modules) for p in module.parameters()]
    return *modules, torch.optim.AdamW(parameters, lr=1e-5, fused=fused)

def padded(batch: dict[str, torch.Tensor], max_length: int, device: str) -> dict[str, torch.Tensor]:
    """The batch, each row as long as max_length allows (0: as it is), on the device."""
    return {name: F.pad(x, (0, max(0, max_length - 1 - x.size(1))), value=-100 if "labels" in name else 0).to(device)
            for name, x in batch.items()}

class Reference(torch.nn.Module):
    """A model of transformers in the form that methods/plain.py wants."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        model = from_transformers(folder, dtype)
        self.base, self.embed, self.head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()

    def forward(self, ids):
        return self.base(ids, use_cache=False).last_hidden_state

def from_transformers(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

def reference_step(folder: Path, device: str, dtype: torch.dtype, max_length: int, examples):
    """The same step as plain code on transformers: padded rows, all logits."""
    student = Reference(folder / "student", torch.float32).to(device)
    teacher = Reference(folder / "teacher", dtype if device == "cuda" else torch.float32).to(device)
    projectors, adversary, optimizer = modules_and_optimizer(student, teacher.requires_grad_(False), device)

    def step(part):
        batch = padded(collate(part, 0, 0), max_length, device)
        with hub.autocast(device, dtype):
            loss = plain.dskd_cma_ga(batch, student, teacher, projectors, adversary)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step, lambda part: 0

def work(folder: str, device: str, dtype: str, max_length: int, batch_size: int, peak: float, reference=False,
         **settings) -> None:
    """A worker: for each line on standard input make the next step; print its seconds, loss and peak memory so far."""
    examples, make = read_examples(Path(folder)), reference_step if reference else our_step
    step, operations = make(Path(folder), device, getattr(torch, dtype), max_length, examples, **settings)
    print("ready", flush=True)
    for line in sys.stdin:
        part = examples[int(line) * batch_size:(int(line) + 1) * batch_size]
        started = time.perf_counter()
        loss = step(part)
        seconds = time.perf_counter() - started
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory,
                          "mfu": operations(part) / seconds / peak}), flush=True)

def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():                 # Linux's getrusage would count what the parent had at the start
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def alternate(config, folder: Path, jobs: dict[str, dict], desc: str) -> dict[str, dict]:
    """Start a process for each job and let them step in turn → median seconds, peak memory in GB, and losses by job.
    config: bench.Config; jobs: name → what is other than its settings (our_step, reference_step). The first step of
    each is not counted."""
    jobs = {name: dict(folder=str(folder), device=config.device, dtype=config.dtype, max_length=config.max_length,
                       batch_size=config.batch_size) | job for name, job in jobs.items()}
    for job in jobs.values():           # the peak is measured while nothing else runs
        job["peak"] = peak_flops(config.device, getattr(torch, job["dtype"]))
    processes, steps = {}, {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            processes[name] = subprocess.Popen([sys.executable, "-m", "running.timed_steps", json.dumps(job)],
                                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                               cwd=Path(__file__).resolve().parents[1])
        for name, process in processes.items():
            _answer(name, process)
        for repeat in tqdm(range(config.repeats + 1), desc=desc, unit="round", leave=False):
            for name, process in processes.items():
                process.stdin.write(f"{repeat}\n")
                process.stdin.flush()
                steps[name].append(json.loads(_answer(name, process)))
    finally:
        for process in processes.values():
            process.kill()
    return {name: {"seconds": statistics.median(s["seconds"] for s in done[1:]),
                   "memory": max(s["memory"] for s in done) / 1e9, "losses": [s["loss"] for s in done],
                   "mfu": statistics.median(s["mfu"] for s in done[1:])} for name, done in steps.items()}

def _answer(name: str, process) -> str:
    if line := process.stdout.readline():
        return line
    raise InputError(f"bench: the process for \"{name}\" ended (see above)")

if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
