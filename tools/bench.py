"""How fast, and in how much memory: ratios of things measured in turn, on one machine, in one run.

    python -m tools.bench                       # all of it, on random weights of real shapes
    python -m tools.bench --only step           # step, generation, rouge
    python -m tools.bench --only pair --teacher qwen2.5-0.5b --student smollm2 --data dolly

- step: an optimizer step of the default method, against methods/plain.py (rows padded to 512
  tokens, all logits), SmolLM2-135M → GPT-2 124M. Both compute the same loss, which is checked.
- pair: steps of byte_kd and dskd_cma_ga, against one of TRL's GOLD on transformers' models, on
  --teacher, --student and the first four rows of --data, cut to 256 tokens.
- generation: 64 new tokens after prompts of 100, greedy, against transformers.
- rouge: ROUGE-L of 1,000 pairs, against rouge-score.

Steps run in processes of their own, whose peak memory is measured; times are medians. What ours is
compared with comes with requirements-test.txt."""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import toy
from data import read_split
from discriminator import Discriminator
from distillation import DistillationLoss
from hub.download import model_folder
from methods import Objective, find_method
from methods.byte_kd import BytePaths, teacher_bytes
from methods.plain import dskd_cma_ga
from model import load
from runtime.config import InputError, flag, parse, run_script
from runtime.distributed import autocast, keep_memory, pick_device
from runtime.teacher_states import HiddenStates
from tokenize_align import collate, encode_rows, load_tokenizer
from train import Config as TrainConfig

SECTIONS = ("step", "pair", "generation", "rouge")
POSITIONS = 512
LENGTH = 256  # of the pair's rows
SMOLLM2 = toy.TEACHER | dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    max_position_embeddings=POSITIONS,
)
GPT2 = toy.STUDENT | dict(
    vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=POSITIONS
)


@dataclass
class Config:
    only: list[str] = flag(["step", "generation", "rouge"], "What to measure.", choices=SECTIONS)
    teacher: str = flag("", "Of pair: a model's name or folder.")
    student: str = flag("", "The same.")
    data: str = flag("", "Of pair: a set's name or folder.")
    cache_teacher: bool = flag(False, "Of pair: our teacher's states are computed once.")
    repeats: int = flag(3, "Timed repeats, after one that is not counted.", minimum=1)
    device: str = flag("auto", "Where to run.", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "As in train.py.", choices=("auto", "float32", "bfloat16"))
    worker: str = flag("", "For this script's own processes: the step to time, or states.")
    folder: str = flag("", "For this script's own processes: the models, or the states.")


def random_batch(vocab_size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of 100 prompt tokens and 20 to 80 response tokens, padded to a length."""
    rows = 32 if device == "cuda" else 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (rows, 180), generator=generator)
    labels = torch.randint(0, vocab_size, (rows, 180), generator=generator)
    lengths = 180 - 60 * torch.arange(rows) // rows
    mask = torch.arange(180) < lengths[:, None]
    labels[:, :100] = -100
    labels[~mask] = -100
    of_side = {
        "ids": F.pad(ids, (0, length - 180)),
        "mask": F.pad(mask, (0, length - 180)),
        "labels": F.pad(labels, (0, length - 180), value=-100),
    }
    return {
        f"{side}_{name}": tensor.to(device)
        for side in ("student", "teacher")
        for name, tensor in of_side.items()
    }


def our_step(name: str, folder: Path, device: str, dtype: torch.dtype):
    """(the loss as a function, what learns) of "fast" or "plain" code."""
    student = load(folder / "student", device=device)
    teacher = load(folder / "teacher", dtype=dtype, device=device).requires_grad_(False)
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)
    batch = random_batch(vocab_size, POSITIONS if name == "plain" else 180, device)
    num_tokens = int((batch["student_labels"] != -100).sum())
    method = find_method("dskd_cma_ga")
    options = TrainConfig(**method.defaults)
    torch.manual_seed(0)
    modules = method.make_modules(options, student.config, teacher.config)
    modules["adversary"] = Discriminator(2 * teacher.config.hidden_size, dropout=0.0)
    learners = torch.nn.ModuleList([student, *modules.values()]).to(device)
    if name == "plain":
        return lambda: dskd_cma_ga(batch, student, teacher, **modules), learners
    objective = Objective(options, 0, num_tokens, num_tokens)
    return lambda: method.loss(batch, student, teacher, modules, objective)[0], learners


def pair_step(method: str, config: Config, device: str, dtype: torch.dtype):
    """The same of a method of ours on --student, --teacher and four rows of --data."""
    student = load(config.student, device=device)
    teacher = load(config.teacher, dtype=dtype, device=device, layers=not config.cache_teacher)
    folders = config.student, config.teacher
    loss_function = DistillationLoss(method, student, teacher, *folders, LENGTH, LENGTH)
    if config.cache_teacher:
        extras = loss_function.extras or (lambda examples, device: {})
        kept = torch.load(Path(config.folder) / f"{method}.pt", map_location=device)
        loss_function.extras = lambda examples, device: extras(examples, device) | kept
    rows = read_split(config.data, "train")[:4]
    return lambda: loss_function(rows)[0], torch.nn.ModuleList([student, loss_function])


def pair_rows(config: Config, tokenizers):
    """The four rows of the pair's steps, encoded for the student and the teacher."""
    rows = read_split(config.data, "train")[:4]
    return encode_rows(rows, *tokenizers, LENGTH, LENGTH)[0]


@torch.no_grad()
def save_states(config: Config, device: str, dtype: torch.dtype) -> None:
    """What --cache_teacher keeps of the pair's rows, for each method."""
    teacher = load(config.teacher, dtype=dtype, device=device)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    examples = pair_rows(config, tokenizers)
    batch = {name: tensor.to(device) for name, tensor in collate(examples, 0, 0).items()}
    batch |= BytePaths(*tokenizers, examples)(examples, device)
    hidden = HiddenStates(teacher)(batch, teacher)
    q_t = teacher_bytes(batch, teacher, temperature=1.0)
    torch.save({"teacher_hidden": hidden}, Path(config.folder) / "dskd_cma_ga.pt")
    torch.save({"teacher_expects": q_t}, Path(config.folder) / "byte_kd.pt")


def gold_step(config: Config, device: str, dtype: torch.dtype):
    """The same of TRL's GOLD on transformers' models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    names = [str(model_folder(name)) for name in (config.student, config.teacher)]
    examples = pair_rows(config, [load_tokenizer(name) for name in names])
    models, ids, labels, offsets = [], [], [], []
    for side, name, of_side in zip(("student", "teacher"), names, (torch.float32, dtype)):
        models.append(AutoModelForCausalLM.from_pretrained(name, dtype=of_side).to(device))
        of_rows = [getattr(example, side) for example in examples]
        ids.append(padded([s.ids for s in of_rows], 0, device))
        labels.append(
            padded([[-100] * s.prompt_length + s.response_ids for s in of_rows], -100, device)
        )
        offsets.append(padded([[(0, 0)] * s.prompt_length + s.spans for s in of_rows], 0, device))
    student, teacher = models
    settings = GOLDConfig("", use_extended_uld=True, uld_use_hybrid_loss=True, bf16=False)
    uld_loss = ULDLoss(settings, *map(AutoTokenizer.from_pretrained, names))

    def loss():
        with torch.no_grad():
            teacher_logits = teacher(ids[1]).logits
        return uld_loss(student(ids[0]).logits, teacher_logits, *labels, *ids, *offsets).squeeze()

    return loss, student


def padded(rows: list[list], value: int, device: str) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value).to(device)


def work(config: Config) -> None:
    """Time one kind of step in this process → a line of JSON; of "states", save them."""
    device, dtype = pick_device(config.device, config.dtype)
    if device == "cpu":
        keep_memory()
    folder = Path(config.folder)
    if config.worker == "states":
        with autocast(device, dtype):
            save_states(config, device, dtype)
        return
    if config.worker == "gold":
        loss_function, learners = gold_step(config, device, dtype)
    elif config.worker in ("fast", "plain"):
        loss_function, learners = our_step(config.worker, folder, device, dtype)
    else:
        loss_function, learners = pair_step(config.worker, config, device, dtype)
    optimizer = torch.optim.AdamW(learners.parameters(), lr=1e-5, fused=True)
    seconds, losses = [], []
    for _ in range(config.repeats + 1):
        started = time.perf_counter()
        with autocast(device, dtype):
            loss = loss_function()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps({"seconds": seconds[1:], "memory": memory, "loss": losses[0]}))


def bench_steps(config: Config, folder: Path, names: tuple[str, str]) -> None:
    """Two kinds of step, in processes in turn, twice each."""
    found = {name: [] for name in names}
    for name in names * 2:
        found[name].append(json.loads(run_worker(config, folder, name).splitlines()[-1]))
    seconds, memory, losses = [], [], []
    for runs in found.values():
        seconds.append(statistics.median(second for run in runs for second in run["seconds"]))
        memory.append(max(run["memory"] for run in runs))
        losses.append(runs[0]["loss"])
    if "plain" in names and abs(losses[0] / losses[1] - 1) > 0.02:
        raise InputError(f"bench: the two steps have different losses, {losses}")
    report(f"a step: {names[0]}, {names[1]}", seconds)
    print(f"{'its peak memory':<40}{memory[0]:9.2f} GB{memory[1]:9.2f} GB")


def run_worker(config: Config, folder: Path, name: str) -> str:
    """work() in a process of its own → what it prints."""
    command = [sys.executable, "-m", "tools.bench", "--worker", name, "--folder", str(folder)]
    command += ["--repeats", str(config.repeats), "--device", config.device]
    command += ["--dtype", config.dtype, "--teacher", config.teacher]
    command += ["--student", config.student, "--data", config.data]
    if config.cache_teacher:
        command.append("--cache_teacher")
    here = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here)
    if result.returncode:
        raise InputError(f"bench: {name}: {result.stderr[-2000:]}")
    return result.stdout


def in_turn(repeats: int, *functions) -> list[float]:
    """Median seconds of each function, called in turn; the first round is not counted."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for values, function in zip(seconds, functions):
            started = time.perf_counter()
            function()
            values.append(time.perf_counter() - started)
    return [statistics.median(values[1:]) for values in seconds]


def bench_generation(config: Config, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from runtime.generation import generate

    device, dtype = pick_device(config.device, config.dtype)
    ours = load(folder / "teacher", dtype=dtype, device=device)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=dtype).to(device)
    ids = random_batch(ours.config.vocab_size, 180, device)["student_ids"][:, :100]
    mask, length = torch.ones_like(ids), dict(max_new_tokens=64, min_new_tokens=64)
    seconds = in_turn(
        config.repeats,
        lambda: generate(ours, ids, mask, 64, temperature=0).tolist(),
        lambda: theirs.generate(ids, attention_mask=mask, do_sample=False, **length).tolist(),
    )
    report("generation: ours, transformers", seconds)


def bench_rouge(config: Config) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    from eval_rouge import rouge_l

    rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    words = toy.__doc__.split()
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 150))) for _ in range(1000)]
    answers = [" ".join(rng.choices(text.split(), k=50)) for text in texts]
    seconds = in_turn(
        config.repeats,
        lambda: rouge_l(answers, texts),
        lambda: [scorer.score(text, answer) for text, answer in zip(texts, answers)],
    )
    report("ROUGE-L: ours, rouge-score", seconds)


def report(what: str, seconds: list[float]) -> None:
    ours, theirs = seconds
    print(f"{what:<40}{ours:9.3f} s {theirs:9.3f} s   × {theirs / ours:5.2f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    if config.worker:
        work(config)
        return
    device, dtype = pick_device(config.device, config.dtype)
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "step" in config.only or "generation" in config.only:
            for side, shape in (("teacher", SMOLLM2), ("student", GPT2)):
                toy.write_json(folder / side / "config.json", shape)
                load(folder / side, init="random").save(folder / side)
        if "step" in config.only:
            bench_steps(config, folder, ("fast", "plain"))
        if "pair" in config.only:
            if not (config.teacher and config.student and config.data):
                raise InputError("--only pair: name a --teacher, a --student and --data")
            if config.cache_teacher:
                run_worker(config, folder, "states")
            for method in ("byte_kd", "dskd_cma_ga"):
                bench_steps(config, folder, (method, "gold"))
        if "generation" in config.only:
            bench_generation(config, folder)
        if "rouge" in config.only:
            bench_rouge(config)


if __name__ == "__main__":
    run_script(main)
