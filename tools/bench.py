"""How fast, and in how much memory: each number is a ratio of two things measured in turn, in one run, on one machine.

    python -m tools.bench                                       # all of it on random models of the real shapes
    python -m tools.bench --teacher DIR --student DIR --data DIR    # on real models and text
    python -m tools.bench --only step parts     # step, parts, decoder, generation, rouge, tokens, growth, launches

`step` is one optimizer step of the default method against a plain one built on transformers: rows padded to 512 tokens,
logits at every position, no chunks (as the method's release does it). Both compute the same loss, which is checked in
float32.
Times are medians of alternating repeats; peak memory is that of a process of its own. transformers and rouge-score come
with requirements-test.txt."""
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import toy
from discriminator import Discriminator
from eval_rouge import rouge_l
from files import hub
from files.config import InputError, flag, parse
from files.rows import read_rows
from methods import fused as compiled_losses
from methods import heads, plain
from methods.dual_space import Projectors
from methods.table import METHODS, Options
from model import load
from running import launches, pictures
from running.batches import valid_tokens
from running.cache import TeacherStates, cached_rows
from running.flops import peak_flops, step_flops
from running.generation import compile_steps, generate
from running.setup import keep_memory
from tokenize_align import Example, Sequence, collate, encode_rows, left_pad, load_tokenizer, make_batches

SECTIONS = ("step", "parts", "decoder", "generation", "rouge", "tokens", "growth", "launches")
# What is taken away from our step, one at a time.
PARTS = {"with the teacher's states cached": {"cached": True}, "in bfloat16": {"dtype": "bfloat16"},
         "both of these": {"cached": True, "dtype": "bfloat16"}, "compiled": {"compile": True},
         "without fused AdamW": {"fused": False}, "without memory kept": {"keep": False},
         "rows padded to --max_length": {"pad": True}, "heads at every position": {"everywhere": True},
         "padded, everywhere, in one chunk": {"pad": True, "everywhere": True, "chunk": 1 << 30}}
SMOLLM2 = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=49152,
               hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000,
               tie_word_embeddings=True, initializer_range=0.02, bos_token_id=0, eos_token_id=0)
GPT2_124M = toy.STUDENT | dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024, eos_token_id=0)
# Qwen1.5-1.8B, the papers' teacher
QWEN = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", vocab_size=151936,
            hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1000000.0,
            tie_word_embeddings=False, initializer_range=0.02, bos_token_id=0, eos_token_id=0)
WIDE = dict(vocab_size=40000, eos_token_id=0)
SHAPES = {"small": (SMOLLM2, GPT2_124M), "papers": (QWEN, GPT2_124M), "tiny": (toy.TEACHER | WIDE, toy.STUDENT | WIDE)}

@dataclass
class Config:
    teacher: str = flag("", "name or folder (default: the shape that --shapes says, random weights)")
    student: str = flag("", "name or folder, whose weights are drawn anew (default: as --shapes says)")
    shapes: str = flag("small", "of models that are not named: SmolLM2-135M and GPT-2, the papers' pair, or tiny ones",
                       choices=("small", "papers", "tiny"))
    data: str = flag("", "rows to measure on (default: random tokens, as long as Dolly's)")
    only: list[str] = flag(list(SECTIONS), "what to measure")
    batch_size: int = flag(4, "rows a step", at_least=1)
    max_length: int = flag(512, "the longest row, and what the reference pads to, in tokens", at_least=64)
    repeats: int = flag(3, "timed repeats of everything, after one that is not counted", at_least=1)
    out_dir: str = flag("out/bench", "where bench.json and growth.png go")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: float32 on CPU, bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))

    @property
    def computed_in(self) -> torch.dtype:
        return getattr(torch, self.dtype)

# ------------------------------------------------------------------------------------------------ what is measured on
def prepare(config: Config, folder: Path) -> None:
    """Write both models, and examples of a few batches made as train.py makes them, into `folder`, for the workers."""
    tokens = 40000                                                      # fewer where a vocabulary is smaller
    for side, shape in zip(("teacher", "student"), SHAPES[config.shapes]):
        name = getattr(config, side)
        torch.manual_seed(0)
        init = "pretrained" if name and side == "teacher" else "random"
        decoder = load(name or with_shape(folder / side, shape), init)
        if decoder.config.max_positions < max(256, config.max_length):
            raise InputError(f"--{side} {name}: has {decoder.config.max_positions} positions, and 256 and --max_length "
                             f"{config.max_length} are to be measured")
        decoder.save(folder / side)
        tokens = min(tokens, decoder.config.vocab_size)
    stretch, half = 32 * config.batch_size, config.max_length // 2      # rows that train.py sorts by length together
    if config.data:
        rows = read_rows(hub.data_file(config.data, "train"))[:stretch]
        tokenizers = [load_tokenizer(getattr(config, side)) for side in ("student", "teacher")]
        examples = encode_rows(rows, *tokenizers, config.max_length, half)[0]
    else:
        rng, examples = random.Random(0), []
        for row in range(stretch):          # the lengths of Dolly's prompts and responses are about log-normal
            prompt, response = (min(int(rng.lognormvariate(*of)) + 2, half) for of in ((4.5, 0.6), (4.2, 1.0)))
            ids = [rng.randrange(tokens) for _ in range(prompt + response)]
            examples.append(Example(row, Sequence(ids, prompt, [], []), Sequence(ids, prompt, [], [])))
    batches = make_batches(examples, config.batch_size, seed=1)
    if len(batches) <= config.repeats:
        raise InputError(f"--repeats {config.repeats}: the rows make {len(batches)} batches, and one is not counted")
    batches.sort(key=lambda batch: sum(len(e.student.ids) for e in batch))
    first = (len(batches) - config.repeats - 1) // 2                    # those of middling length
    chosen = [asdict(example) for batch in batches[first:first + config.repeats + 1] for example in batch]
    (folder / "examples.json").write_text(json.dumps(chosen))

def with_shape(folder: Path, shape: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder

def read_examples(folder: Path) -> list[Example]:
    return [Example(e["row"], Sequence(**e["student"]), Sequence(**e["teacher"]))
            for e in json.loads((folder / "examples.json").read_text())]

def teacher_states(folder: Path, teacher, examples: list[Example]) -> TeacherStates:
    return TeacherStates(folder / "train", "teacher", folder / "teacher", examples, teacher.config.hidden_size,
                         torch.bfloat16, torch.float32)

# -------------------------------------------------------------------------------------------------- steps, as processes
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

def alternate(config: Config, folder: Path, jobs: dict[str, dict], desc: str) -> dict[str, dict]:
    """Start a process for each job and let them step in turn → median seconds, peak memory in GB, and losses by job.
    The first step of each is not counted."""
    jobs = {name: dict(folder=str(folder), device=config.device, max_length=config.max_length,
                       batch_size=config.batch_size) | {"dtype": config.dtype} | job for name, job in jobs.items()}
    for job in jobs.values():           # the peak is measured while nothing else runs
        job["peak"] = peak_flops(config.device, getattr(torch, job["dtype"]))
    processes, steps = {}, {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            processes[name] = subprocess.Popen([sys.executable, "-m", "tools.bench", "--worker", json.dumps(job)],
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

def bench_step(config: Config, folder: Path) -> list[dict]:
    ours, theirs = alternate(config, folder, {"ours": {}, "transformers": {"reference": True}}, "step").values()
    for a, b in zip(ours["losses"], theirs["losses"]):
        if config.dtype == "float32" and abs(a - b) > 1e-4 * abs(b):
            raise InputError(f"bench: the two steps do not compute the same: losses {a} and {b}")
    memory = [ours["memory"], theirs["memory"]]
    return [_row("step", ours["seconds"], theirs["seconds"], memory=memory, mfu=ours["mfu"])]

def bench_parts(config: Config, folder: Path) -> list[dict]:
    rows, shape = [], load(folder / "teacher", layers=False)
    teacher_states(folder, shape, read_examples(folder)).fill(
        lambda: load(folder / "teacher", device=config.device), config.batch_size, 0, config.device)
    for name, settings in PARTS.items():          # two at a time: not all of them fit into memory together
        ours, other = alternate(config, folder, {"ours": {}, name: settings}, name).values()
        rows.append(_row(f"step, {name}", ours["seconds"], other["seconds"], memory=[ours["memory"], other["memory"]]))
    return rows

# ----------------------------------------------------------------------------------------------- within one process
def in_turn(repeats: int, *functions) -> list[float]:
    """Median seconds of each function, called in turn; the first round is not counted."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for values, function in zip(seconds, functions):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            values.append(time.perf_counter() - started)
    return [statistics.median(values[1:]) for values in seconds]

def _row(what: str, ours: float, other: float, **more) -> dict:
    return {"what": what, "ours": ours, "other": other, "ratio": other / ours, "unit": "s", **more}

def bench_decoder(config: Config, folder: Path) -> list[dict]:
    rows = []
    for side in ("student", "teacher"):
        ours = load(folder / side, device=config.device)
        theirs = Reference(folder / side, torch.float32).to(config.device)
        ids = torch.randint(0, ours.config.vocab_size, (config.batch_size, 256), device=config.device)

        def forward_and_backward(model):
            with hub.autocast(config.device, config.computed_in):
                loss = model(ids).float().square().mean()
            loss.backward()
            model.zero_grad()
        rows.append(_row(f"{side}, forward and backward, {config.batch_size} × 256 tokens", *in_turn(
            config.repeats, lambda: forward_and_backward(ours), lambda: forward_and_backward(theirs))))
    return rows

def bench_generation(config: Config, folder: Path) -> list[dict]:
    ours = load(folder / "teacher", dtype=config.computed_in, device=config.device)
    theirs, rng, new, results = from_transformers(folder / "teacher", config.computed_in), random.Random(0), 64, []
    theirs.to(config.device)
    prompts = [[rng.randrange(5, ours.config.vocab_size) for _ in range(rng.randrange(20, 120))] for _ in range(16)]
    ids, mask = (x.to(config.device) for x in left_pad(prompts, 0))

    def reference():
        text = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                               pad_token_id=0)
        results.append(text[:, ids.size(1):])
    times = in_turn(config.repeats, lambda: results.append(generate(ours, ids, mask, new, temperature=0)), reference)
    if config.dtype == "float32" and (results[0] != results[1]).float().mean() > 0.02:      # a tie may fall either way
        raise InputError("bench: the two generations differ")
    rows = [_row(f"generation, 16 prompts, {new} new tokens, greedy", *times)]
    if config.device == "cuda":
        compile_steps(ours)
        times = in_turn(config.repeats, lambda: generate(ours, ids, mask, new, temperature=0), reference)
        rows.append(_row("… with --compile", *times))
    return rows

def bench_rouge(config: Config, folder: Path) -> list[dict]:
    from rouge_score.rouge_scorer import RougeScorer
    rng, results, scorer = random.Random(0), [], RougeScorer(["rougeL"], use_stemmer=True)
    if config.data:
        texts = [row.outputs[0] for row in read_rows(hub.data_file(config.data, "train"))][:1000]
    else:
        words = [line for line in Path(__file__).read_text().split() if line.isalpha()]
        texts = [" ".join(rng.choices(words, k=int(rng.lognormvariate(3.9, 0.9)) + 1)) for _ in range(1000)]
    texts = (texts * 1000)[:1000]
    pairs = [(" ".join(rng.sample(text.split(), 2 * len(text.split()) // 3)), text) for text in texts]
    times = in_turn(config.repeats, lambda: results.append(rouge_l(*zip(*pairs))),
                    lambda: results.append([scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs]))
    if max(abs(a - b) for a, b in zip(*results[:2])) > 1e-9:
        raise InputError("bench: the two ROUGE-L differ")
    return [_row("ROUGE-L of 1,000 pairs", *times)]

def bench_tokens(config: Config, folder: Path) -> list[dict]:
    if not config.data:
        print("tokens: needs real tokenizers and text (--teacher, --student and --data); left out")
        return []
    rows = (read_rows(hub.data_file(config.data, "train")) * 20)[:11435]
    inputs = rows, *(load_tokenizer(getattr(config, side)) for side in ("student", "teacher")), 512, 256
    return [_row("11,435 rows in two tokenizers, from the cache against anew", *in_turn(
        1, lambda: cached_rows(folder / "tokens", *inputs), lambda: encode_rows(*inputs)))]

def bench_growth(config: Config, folder: Path) -> list[dict]:
    """Seconds of a dskd_cma step of small models as one size grows, the others fixed; a log-log picture."""
    base, factors, rows = {"batch": 4, "length": 128, "vocabulary": 8000}, (0.25, 0.5, 1, 2, 4), []
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what, middle in base.items():
        sizes = [base | {what: int(middle * factor)} for factor in factors]
        seconds = [in_turn(config.repeats, small_step(config, folder / "growth", **size))[0]
                   for size in tqdm(sizes, desc=f"growth of {what}", leave=False)]
        rows.append(_row(f"growth, {what} × 16", seconds[0], seconds[-1]))
        axes.loglog(factors, seconds, "o-", label=f"{what} (1 = {middle})")
        if what == "batch":
            axes.loglog([0.25, 4], [seconds[2] * x for x in (0.25, 4)], ":", color="grey", label="linear")
    axes.minorticks_off()
    axes.set_xticks(factors, ["1/4", "1/2", "1", "2", "4"])
    axes.set(xlabel="size, in units of the middle one", ylabel="seconds a step", title="Cost of a dskd_cma step")
    axes.legend()
    pictures.save(figure, folder / "growth.png", dpi=150)
    return rows

def bench_launches(config: Config, folder: Path) -> list[dict]:
    toy.write_data_for(["toy"])
    return launches.show(read_rows(hub.data_file("toy", "train"))[:8],
                         [toy.folder(f"{side}-start") for side in ("student", "teacher")])

def small_step(config: Config, folder: Path, batch: int, length: int, vocabulary: int):
    """Forward and backward of dskd_cma, as a function."""
    shapes = (GPT2_124M | dict(n_embd=128, n_layer=2, n_head=4),
              SMOLLM2 | dict(hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6))
    student, teacher = (load(with_shape(folder, shape | dict(vocab_size=vocabulary)), "random", device=config.device)
                        for shape in shapes)
    projectors = Projectors(128, 192, query=True).to(config.device)
    ids = torch.randint(0, vocabulary, (batch, length), device=config.device)
    tensors = {f"{side}_{kind}": ids for side in ("student", "teacher") for kind in ("ids", "labels")}
    options, n = Options(method="dskd_cma", alignment="attention"), {"student": ids.numel(), "teacher": ids.numel()}
    models = student.train(), teacher.requires_grad_(False)
    return lambda: launches.loss_of(options, tensors, *models, projectors, None, n).backward()

def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        return work(**json.loads(sys.argv[2]))
    config = parse(Config, __doc__)
    if unknown := set(config.only) - set(SECTIONS):
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if bool(config.data) > bool(config.teacher and config.student):
        raise InputError("--data: needs --teacher and --student, whose tokenizers cut it")
    hub.claim(Path(config.out_dir), "bench.json", {"table", "config"}, ["growth.png"])
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config.device, dtype = hub.pick_device(config.device, config.dtype)
    config.dtype = str(dtype).removeprefix("torch.")
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"{config.device}, {dtype}, {machine['threads']} threads, torch {machine['torch']}", flush=True)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        if config.only != ["launches"]:
            prepare(config, Path(folder))
        for section in config.only:
            try:
                rows = globals()[f"bench_{section}"](config, Path(folder))
            except ImportError as error:
                raise InputError(f"bench: {section} is measured against {error.name}: pip install -r "
                                 "requirements-test.txt") from error
            for row in rows if section != "launches" else ():
                more = "   {:.1f} | {:.1f} GB".format(*row["memory"]) if "memory" in row else ""
                more += f"   MFU {100 * row['mfu']:.0f} %" if "mfu" in row else ""
                times = f"{row['ours']:9.3f} s {row['other']:9.3f} s   × {row['ratio']:5.2f}"
                print(f"{row['what']:<64}{times}{more}", flush=True)
            table += rows
        with hub.atomic_write(Path(config.out_dir) / "bench.json") as file:
            json.dump({"config": asdict(config), **machine, "table": table}, file, indent=2)
        if "growth" in config.only:
            with hub.whole_file(Path(config.out_dir) / "growth.png") as temporary:
                shutil.copyfile(Path(folder) / "growth.png", temporary)
    print(f"wrote bench.json{' and growth.png' if 'growth' in config.only else ''} into {config.out_dir}")

if __name__ == "__main__":
    hub.run(main)
