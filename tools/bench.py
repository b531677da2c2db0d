"""How fast, and in how much memory: each number is a ratio of two things measured in turn, in one run, on one machine.

    python -m tools.bench                                       # all of it on random models of the real shapes
    python -m tools.bench --teacher DIR --student DIR --data DIR    # on real models and text
    python -m tools.bench --only step parts     # step, parts, decoder, generation, rouge, tokens, growth, launches

`step` is one optimizer step of the default method against a plain one built on transformers: rows padded to 512 tokens,
logits at every position, no chunks (as the method's release does it). Both compute the same loss, which is checked in
float32. Times are medians of alternating repeats; peak memory is that of a process of its own (running/timed_steps.py).
transformers and rouge-score come with requirements-test.txt."""
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import toy
from eval_rouge import rouge_l
from files import hub
from files.config import InputError, flag, parse
from files.rows import read_rows
from methods.dual_space import Projectors
from methods.table import Options
from model import load
from running import launches, pictures
from running.cache import cached_rows
from running.generation import compile_steps, generate
from running.timed_steps import Reference, alternate, from_transformers, read_examples, teacher_states
from tokenize_align import Example, Sequence, encode_rows, left_pad, load_tokenizer, make_batches

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

# -------------------------------------------------------------------------------------------------- steps, as processes
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
