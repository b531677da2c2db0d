"""How fast, and in how much memory: each number is a ratio of two things measured in turn, in one run, on one machine.

    python -m tools.bench                                       # all of it on random models of the real shapes
    python -m tools.bench --teacher DIR --student DIR --data DIR    # on real models and text
    python -m tools.bench --only step parts     # step, parts, decoder, generation, rouge, tokens, growth

`step` is one optimizer step of the default method against a plain one built on transformers: rows padded to 512 tokens,
logits at every position, no chunks (as the method's release does it). Both compute the same loss, which is checked.
Times are medians of alternating repeats; peak memory is that of a process of its own. transformers and rouge-score come
with requirements-test.txt.
"""
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy
from discriminator import Discriminator
from eval_rouge import rouge_l
from files import hub
from files.config import InputError, flag, parse
from files.rows import read_rows
from methods import heads, plain
from methods.dual_space import Projectors
from methods.table import KD_PARTS, METHODS, Options, distill, terms
from model import load
from running.batches import valid_tokens
from running.cache import TeacherStates, cached_rows
from running.flops import peak_flops, step_flops
from tokenize_align import Example, Sequence, collate, encode_rows, left_pad, load_tokenizer, make_batches

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("step", "parts", "decoder", "generation", "rouge", "tokens", "growth")
# What is taken away from our step, one at a time.
PARTS = {"with the teacher's states cached": {"cached": True}, "in bfloat16": {"dtype": "bfloat16"},
         "both of these": {"cached": True, "dtype": "bfloat16"}, "compiled": {"compile": True},
         "without fused AdamW": {"fused": False}, "rows padded to --max_length": {"pad": True},
         "heads at every position": {"everywhere": True},
         "padded, everywhere, in one chunk": {"pad": True, "everywhere": True, "chunk": 1 << 30}}


@dataclass
class Config:
    teacher: str = flag("", "name or folder (default: the shape of SmolLM2-135M, random weights)")
    student: str = flag("", "name or folder, whose weights are drawn anew (default: the shape of GPT-2, 124M)")
    data: str = flag("", "rows to measure on (default: random tokens, as long as Dolly's)")
    only: list[str] = flag(list(SECTIONS), "what to measure")
    batch_size: int = flag(4, "rows a step", at_least=1)
    max_length: int = flag(512, "the longest row, and what the reference pads to, in tokens", at_least=64)
    repeats: int = flag(3, "timed repeats of everything, after one that is not counted", at_least=1)
    out_dir: str = flag("out/bench", "where bench.json and growth.png go")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: float32 on CPU, bfloat16 autocast on CUDA",
                      choices=("auto", "float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------ what is measured on

SMOLLM2 = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=49152,
               hidden_size=576, intermediate_size=1536,
               num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
               rms_norm_eps=1e-5,
               rope_theta=100000, tie_word_embeddings=True, initializer_range=0.02, torch_dtype="float32",
               bos_token_id=0, eos_token_id=0)
GPT2_124M = toy.STUDENT | dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024, bos_token_id=0,
                               eos_token_id=0)


def prepare(config: Config, folder: Path) -> None:
    """Write both models and the examples of a few batches, made as train.py makes them, into `folder`, for the
    workers."""
    for side, shape in (("teacher", SMOLLM2), ("student", GPT2_124M)):
        name = getattr(config, side)
        if not name:
            (folder / side).mkdir()
            (folder / side / "config.json").write_text(json.dumps(shape))
        torch.manual_seed(0)
        load(name or folder / side, init="pretrained" if name and side == "teacher" else "random").save(folder / side)
    stretch = 32 * config.batch_size            # rows among which train.py, too, looks for those of like length
    if config.data:
        rows = read_rows(hub.data_file(config.data, "train"))[:stretch]
        examples = encode_rows(rows, *(load_tokenizer(getattr(config, side)) for side in ("student", "teacher")),
                               config.max_length, config.max_length // 2)[0]
        pairs = [(e.student, e.teacher) for e in examples]
    else:
        generator = random.Random(0)

        def sequence(prompt, response):
            prompt, response = min(prompt, config.max_length // 2), min(response, config.max_length // 2)
            return Sequence([generator.randrange(40000) for _ in range(prompt + response)], prompt, [], [])
        # the lengths of Dolly's prompts and responses are about log-normal
        lengths = [(int(generator.lognormvariate(4.5, 0.6)) + 2, int(generator.lognormvariate(4.2, 1.0)) + 2)
                   for _ in range(stretch)]
        pairs = [(sequence(*pair), sequence(*pair)) for pair in lengths]
    batches = make_batches([Example(i, *pair) for i, pair in enumerate(pairs)], config.batch_size, seed=1)
    middle = sorted(batches, key=lambda batch: sum(len(e.student.ids)
                                                   for e in batch))[(len(batches) - config.repeats - 1) // 2:]
    # batches of middling length
    pairs = [(e.student, e.teacher) for batch in middle[:config.repeats + 1] for e in batch]
    (folder / "examples.json").write_text(json.dumps([[asdict(s) for s in pair] for pair in pairs]))


def read_examples(folder: Path) -> list[Example]:
    return [Example(i, *(Sequence(**s) for s in pair))
            for i, pair in enumerate(json.loads((folder / "examples.json").read_text()))]


def teacher_states(folder: Path, teacher, examples: list[Example]) -> TeacherStates:
    return TeacherStates(folder / "train", "teacher", folder / "teacher", examples, teacher.config.hidden_size,
                         torch.bfloat16, torch.float32)


# -------------------------------------------------------------------------------------------------- steps, as processes

def our_step(folder: Path, device: str, dtype: torch.dtype, max_length: int, examples, cached=False, fused=True,
             compile=False, pad=False, everywhere=False, chunk=0):
    """→ a function of a list of examples that makes an optimizer step and returns its loss."""
    options = Options(**METHODS["dskd_cma_ga"])
    heads.CHUNK = chunk or heads.CHUNK
    # no dropout, so that the losses can be compared
    student = load(folder / "student", device=device).eval()
    teacher = load(folder / "teacher", dtype=weights_type(device, dtype), device=device, layers=not cached)
    teacher.requires_grad_(False)
    states = teacher_states(folder, teacher, examples) if cached else None
    projectors, adversary, optimizer = modules_and_optimizer(student, teacher, device, fused)
    if compile:
        student.compile(dynamic=True)
        teacher.compile(dynamic=True)

    def step(part):
        if everywhere:
            part = [Example(e.row, *(Sequence(s.ids, 1, [], []) for s in (e.student, e.teacher))) for e in part]
        batch = padded(collate(part, 0, 0), max_length if pad else 0, device)
        if cached:
            batch["teacher_hidden"] = states.grid(part, teacher.embed.weight.dtype).to(device)
        n = valid_tokens(part)
        with hub.autocast(device, dtype):
            loss = loss_of(options, batch, student, teacher, projectors, adversary, n)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    step.flops = lambda part: step_flops(options, student, teacher, part, cached)
    return step


def loss_of(options, batch, student, teacher, projectors, adversary, n) -> torch.Tensor:
    """The total, as train.py writes it."""
    α, λ_GA = options.kd_rate, options.ga_weight
    factors = {"nll_loss": 1 - α, **dict.fromkeys(KD_PARTS, α)}
    CE, KD, GA, _ = terms(distill(options, batch, student, teacher, projectors, adversary, 0, factors), n)
    return (1 - α) * CE + α * KD + λ_GA * GA


def modules_and_optimizer(student, teacher, device: str, fused: bool | None = None):
    """The same projectors and adversary for both steps, and AdamW."""
    torch.manual_seed(0)
    sizes = [decoder.embed.weight.size(1) for decoder in (student, teacher)]
    projectors, adversary = Projectors(*sizes, query=True).to(device), Discriminator(2 * sizes[1],
                                                                                     dropout=0.0).to(device)
    parameters = [p for module in (student, projectors, adversary) for p in module.parameters()]
    return projectors, adversary, torch.optim.AdamW(parameters, lr=1e-5, fused=fused)


def weights_type(device: str, dtype: torch.dtype) -> torch.dtype:
    """Of the teacher's weights."""
    return dtype if device == "cuda" else torch.float32


def padded(batch: dict[str, torch.Tensor], max_length: int, device: str) -> dict[str, torch.Tensor]:
    """The batch, each row as long as max_length allows (0: as it is), on the device."""
    return {name: F.pad(x, (0, max(0, max_length - 1 - x.size(1))), value=-100 if "labels" in name else 0).to(device)
            for name, x in batch.items()}


class Reference(torch.nn.Module):
    """A model of transformers in the form that methods/plain.py wants."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.base, self.embed, self.head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()

    def forward(self, ids):
        return self.base(ids, use_cache=False).last_hidden_state


def reference_step(folder: Path, device: str, dtype: torch.dtype, max_length: int, examples):
    """The same step as plain code on transformers: padded rows, all logits."""
    student = Reference(folder / "student").to(device).eval()
    teacher = Reference(folder / "teacher", weights_type(device, dtype)).to(device).eval().requires_grad_(False)
    projectors, adversary, optimizer = modules_and_optimizer(student, teacher, device)

    def step(part):
        batch = padded(collate(part, 0, 0), max_length, device)
        with hub.autocast(device, dtype):
            loss = plain.dskd_cma_ga(batch, student, teacher, projectors, adversary)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    step.flops = lambda part: 0
    return step


def work(job: dict) -> None:
    """A worker: for each line on standard input make the next step and print its seconds, loss and the peak memory so
    far."""
    folder, device = Path(job["folder"]), job["device"]
    dtype = getattr(torch, job["settings"].pop("dtype", job["dtype"]))
    examples = read_examples(folder)
    make = reference_step if job["settings"].pop("reference", False) else our_step
    step = make(folder, device, dtype, job["max_length"], examples, **job["settings"])
    print("ready", flush=True)
    for line in sys.stdin:
        first = int(line) * job["batch_size"]
        part = examples[first:first + job["batch_size"]]
        started = time.perf_counter()
        loss = step(part)
        seconds = time.perf_counter() - started
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory,
                          "mfu": step.flops(part) / seconds / job["peak"]}), flush=True)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():                 # Linux's getrusage would count what the parent had at the start
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alternate(config: Config, folder: Path, jobs: dict[str, dict], desc: str) -> dict[str, dict]:
    """Start a process for each job and let them step in turn → median seconds, peak memory in GB, and losses by job.
    The first step of each is not counted."""
    processes = {}
    device, dtype = hub.pick_device(config.device, config.dtype)
    # while nothing else runs
    peaks = [peak_flops(device, getattr(torch, settings.get("dtype", str(dtype).removeprefix("torch."))))
             for settings in jobs.values()]
    try:
        for (name, settings), peak in zip(jobs.items(), peaks):
            job = {"peak": peak, "folder": str(folder), "device": device, "dtype": str(dtype).removeprefix("torch."),
                   "max_length": config.max_length,
                   "batch_size": config.batch_size, "settings": settings}
            processes[name] = subprocess.Popen([sys.executable, "-m", "tools.bench", "--worker", json.dumps(job)],
                                               stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
        steps = {name: [] for name in jobs}
        for name, process in processes.items():
            _answer(name, process)
        with tqdm(total=len(jobs) * (config.repeats + 1), desc=desc, unit="step", leave=False,
                  dynamic_ncols=True) as bar:
            for repeat in range(config.repeats + 1):
                for name, process in processes.items():
                    process.stdin.write(f"{repeat}\n")
                    process.stdin.flush()
                    steps[name].append(json.loads(_answer(name, process)))
                    bar.update()
    finally:
        for process in processes.values():
            process.kill()
    return {name: {"seconds": statistics.median(s["seconds"] for s in done[1:]),
                   "memory": max(s["memory"] for s in done) / 1e9,
                   "losses": [s["loss"] for s in done], "mfu": statistics.median(s["mfu"] for s in done[1:])}
            for name, done in steps.items()}


def _answer(name: str, process) -> str:
    line = process.stdout.readline()
    if not line:
        raise InputError(f"bench: the process for \"{name}\" ended (see above)")
    return line


def bench_step(config: Config, folder: Path) -> list[dict]:
    result = alternate(config, folder, {"transformers": {"reference": True}, "ours": {}}, "step")
    for ours, theirs in zip(*(result[name]["losses"] for name in ("ours", "transformers"))):
        if hub.pick_device(config.device, config.dtype)[1] == torch.float32 and abs(ours - theirs) > 1e-4 * abs(theirs):
            raise InputError(f"bench: the two steps do not compute the same: losses {ours} and {theirs}")
    ours, theirs = result["ours"], result["transformers"]
    return [_row("step", {"ours": ours["seconds"], "other": theirs["seconds"]})
            | {"memory": [ours["memory"], theirs["memory"]], "mfu": ours["mfu"]}]


def bench_parts(config: Config, folder: Path) -> list[dict]:
    examples = read_examples(folder)
    device, _ = hub.pick_device(config.device, config.dtype)
    teacher = load(folder / "teacher", device=device)
    teacher_states(folder, teacher, examples).fill(teacher, config.batch_size, 0, device)
    del teacher
    rows = []
    for name, settings in PARTS.items():          # two at a time: not all of them fit into memory together
        pair = alternate(config, folder, {"ours": {}, name: settings}, name)
        ours, other = pair["ours"], pair[name]
        rows.append(_row(f"step, {name}", {"ours": ours["seconds"], "other": other["seconds"]})
                    | {"ours": None, "memory": [ours["memory"], other["memory"]]})
    return rows


# ----------------------------------------------------------------------------------------------- within one process

def in_turn(repeats: int, **functions) -> dict[str, float]:
    """Median seconds of each function, called in turn; the first round is not counted."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _row(what: str, times: dict[str, float]) -> dict:
    return {"what": what, "ours": times["ours"], "other": times["other"], "ratio": times["other"] / times["ours"],
            "unit": "s"}


def bench_decoder(config: Config, folder: Path) -> list[dict]:
    from transformers import AutoModelForCausalLM
    rows = []
    device, _ = hub.pick_device(config.device, config.dtype)
    for side in ("student", "teacher"):
        ours, theirs = load(folder / side,
                            device=device), AutoModelForCausalLM.from_pretrained(folder / side).to(device).eval()
        ids = torch.randint(0, 40000, (config.batch_size, 256), device=device)

        def run(forward, model):
            forward(ids).square().mean().backward()
            model.zero_grad()
        base = theirs.base_model
        rows.append(_row(f"{side}, forward and backward, {config.batch_size} × 256 tokens", in_turn(
            config.repeats, ours=lambda: run(ours, ours),
            other=lambda: run(lambda x: base(x, use_cache=False).last_hidden_state, theirs))))
    return rows


def bench_generation(config: Config, folder: Path) -> list[dict]:
    from transformers import AutoModelForCausalLM
    device, _ = hub.pick_device(config.device, config.dtype)
    ours, theirs = load(folder / "teacher",
                        device=device), AutoModelForCausalLM.from_pretrained(folder / "teacher").to(device).eval()
    generator = random.Random(0)
    ids, mask = (x.to(device) for x in left_pad([[generator.randrange(5, 40000)
                                                  for _ in range(generator.randrange(20, 120))] for _ in range(16)], 0))
    new = 64
    result = []
    times = in_turn(config.repeats, ours=lambda: result.append(ours.generate(ids, mask, new, temperature=0)),
                    other=lambda: result.append(theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=new,
                                                                min_new_tokens=new, do_sample=False,
                                                                pad_token_id=0)[:, ids.size(1):]))
    if (result[0] != result[1]).float().mean() > 0.02:          # a tie may fall either way
        raise InputError("bench: the two generations differ")
    return [_row(f"generation, 16 prompts, {new} new tokens, greedy", times)]


def bench_rouge(config: Config, folder: Path) -> list[dict]:
    from rouge_score.rouge_scorer import RougeScorer
    generator = random.Random(0)
    if config.data:
        texts = [row.outputs[0] for row in read_rows(hub.data_file(config.data, "train"))][:1000]
    else:
        words = [line for line in Path(__file__).read_text().split() if line.isalpha()]
        texts = [" ".join(generator.choices(words, k=int(generator.lognormvariate(3.9, 0.9)) + 1)) for _ in range(1000)]
    texts = (texts * 1000)[:1000]
    pairs = [(" ".join(generator.sample(text.split(), 2 * len(text.split()) // 3)), text) for text in texts]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    result = []
    times = in_turn(config.repeats, ours=lambda: result.append(rouge_l(*zip(*pairs))),
                    other=lambda: result.append([scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs]))
    if max(abs(a - b) for a, b in zip(*result[:2])) > 1e-9:
        raise InputError("bench: the two ROUGE-L differ")
    return [_row("ROUGE-L of 1,000 pairs", times)]


def bench_tokens(config: Config, folder: Path) -> list[dict]:
    if not config.data:
        print("tokens: needs real tokenizers and text (--teacher, --student and --data); left out")
        return []
    rows = (read_rows(hub.data_file(config.data, "train")) * 20)[:11435]
    tokenizers = [load_tokenizer(getattr(config, side)) for side in ("student", "teacher")]
    times = in_turn(1, ours=lambda: cached_rows(folder / "tokens", rows, *tokenizers, 512, 256),
                    other=lambda: encode_rows(rows, *tokenizers, 512, 256))
    return [_row("11,435 rows in two tokenizers, from the cache against anew", times)]


def bench_growth(config: Config, folder: Path) -> list[dict]:
    """Seconds of a dskd_cma step as one size grows, the others fixed; a log-log picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    device, _ = hub.pick_device(config.device, config.dtype)
    options = Options(method="dskd_cma", alignment="attention")
    base = {"batch": 4, "length": 128, "vocabulary": 8000}
    series = {"batch": (1, 2, 4, 8, 16), "length": (32, 64, 128, 256, 512),
              "vocabulary": (2000, 4000, 8000, 16000, 32000)}
    results = {}
    for what, values in series.items():
        for value in tqdm(values, desc=f"growth of {what}", leave=False):
            size = base | {what: value}
            models = []
            for shape in (GPT2_124M | dict(n_embd=128, n_layer=2, n_head=4),
                          SMOLLM2 | dict(hidden_size=192, intermediate_size=512, num_hidden_layers=2,
                                         num_attention_heads=6)):
                (folder / "growth").mkdir(exist_ok=True)
                (folder / "growth" / "config.json").write_text(json.dumps(shape | dict(vocab_size=size["vocabulary"])))
                models.append(load(folder / "growth", init="random", device=device).train())
            models[1].requires_grad_(False)
            projectors = Projectors(128, 192, query=True).to(device)
            ids = torch.randint(0, size["vocabulary"], (size["batch"], size["length"]), device=device)
            batch = {f"{side}_{kind}": ids for side in ("student", "teacher") for kind in ("ids", "labels")}
            n = {"student": ids.numel(), "teacher": ids.numel()}

            def step():
                loss_of(options, batch, *models, projectors, None, n).backward()
            results.setdefault(what, []).append((value, in_turn(config.repeats, step=step)["step"]))
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for what, points in results.items():
        axes.loglog([value / base[what] for value, _ in points], [seconds for _, seconds in points], "o-",
                    label=f"{what} (1 = {base[what]})")
    axes.loglog([0.25, 4], [results["batch"][2][1] * x for x in (0.25, 4)], ":", color="grey", label="linear")
    axes.minorticks_off()
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes.set(xlabel="size, in units of the middle one", ylabel="seconds a step", title="Cost of a dskd_cma step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(config.out_dir) / "growth.png", dpi=150)
    print(f"wrote {Path(config.out_dir) / 'growth.png'}")
    return [{"what": f"growth, {what} × {points[-1][0] // points[0][0]}", "ours": points[0][1], "other": points[-1][1],
             "ratio": points[-1][1] / points[0][1], "unit": "s"}
            for what, points in results.items()]


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        return work(json.loads(sys.argv[2]))
    config = parse(Config, __doc__)
    if unknown := set(config.only) - set(SECTIONS):
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if bool(config.data) > bool(config.teacher and config.student):
        raise InputError("--data: needs --teacher and --student, whose tokenizers cut it")
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    device, dtype = hub.pick_device(config.device, config.dtype)
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(config, Path(folder))
        for section in config.only:
            try:
                rows = globals()[f"bench_{section}"](config, Path(folder))
            except ImportError as error:
                raise InputError(f"bench: {section} is measured against {error.name}: pip install -r "
                                 "requirements-test.txt") from error
            for row in rows:
                memory = "{:.1f} | {:.1f} GB".format(*row["memory"]) if "memory" in row else ""
                mfu = f"   MFU {100 * row['mfu']:.0f} %" if row.get("mfu") else ""
                ours = f"{row['ours']:9.3f} s" if row["ours"] is not None else " " * 11
                print(f"{row['what']:<64}{ours} {row['other']:9.3f} s   × {row['ratio']:5.2f}   {memory}{mfu}",
                      flush=True)
            table += rows
    with hub.atomic_write(Path(config.out_dir) / "bench.json") as file:
        json.dump({"config": asdict(config), "torch": torch.__version__, "threads": torch.get_num_threads(),
                   "table": table}, file, indent=2)
    print(f"wrote {Path(config.out_dir) / 'bench.json'}")


if __name__ == "__main__":
    hub.run(main)
