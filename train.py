"""Distil a teacher into a student that cuts text into other tokens. Reads from top to bottom like the algorithm.

    python train.py                                                       # the toy: minutes on a laptop, no download
    python train.py --teacher qwen --student gpt2                         # the paper's pair, on Dolly; wants a GPU
    python train.py --teacher DIR --student DIR --data DIR --method dwa_kd --adversary gan
    python train.py --method sft --student qwen --out_dir out/teacher     # fine-tune the teacher first
    python train.py --out_dir out/NAME --resume                           # go on after an interruption

    total = (1 − α) · CE(z_s, y_s) + α · KD + λ_GA · GA + λ_DTW · DTW        (distill.py: the methods as options, and this sum)

Every term is a sum over valid tokens divided by their number in the whole optimizer step. The papers' settings are the
defaults; the toy has its own (TOY below).
"""
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
import hub
import probe
import toy
from cache import TeacherStates, cached_rows
from checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from cma import Projectors
from config import flag, parse
from distill import ADVERSARIES, METHODS, Options, check_options, distill, total
from eval_rouge import answer, rouge_l, tell_cut_prompts
from flops import peak_flops, step_flops
from hub import InputError
from model import load
from seqkd import teacher_rows
from tokenize_align import collate, encode_rows, load_tokenizer, make_batches, read_rows


@dataclass
class Config(Options):
    teacher: str = flag("", "the teacher: name, hub id or folder (toy when no student is given either)")
    student: str = flag("", "the student: name, hub id or folder (toy when no teacher is given either)")
    data: str = flag("", "training data: name, or folder with train.jsonl and dev.jsonl (default: toy for the toy, else dolly)")
    student_init: str = flag("pretrained", "the student's first weights", choices=("pretrained", "random"))
    out_dir: str = flag("", "where everything is written (default: a new folder under out/)")
    epochs: int = flag(20, "passes over the training data", at_least=1)
    max_steps: int = flag(0, "optimizer steps, in place of --epochs (0: all epochs)", at_least=0)
    batch_size: int = flag(32, "rows a forward pass", at_least=1)
    grad_accum: int = flag(1, "forward passes an optimizer step", at_least=1)
    lr: float = flag(5e-4, "peak learning rate of the student, cosine to 1e-7", at_least=0)
    projector_lr: float = flag(1e-3, "the same for the projectors", at_least=0)
    ga_lr: float = flag(1e-3, "the same for the adversary", at_least=0)
    weight_decay: float = flag(0.01, "AdamW's decay of matrices, per unit of learning rate", at_least=0)
    warmup_steps: int = flag(0, "optimizer steps until the peak learning rate", at_least=0)
    clip_grad: float = flag(1.0, "largest gradient norm", at_least=1e-6)
    max_length: int = flag(512, "prompt, response and EOS together, in tokens", at_least=2)
    max_prompt_length: int = flag(256, "longer prompts are cut, in tokens", at_least=1)
    eval_interval: int = flag(0, "optimizer steps between scorings of the dev split (0: once an epoch)", at_least=0)
    eval_num: int = flag(100, "rows of the dev and test splits that are scored (0: all)", at_least=0)
    save_interval: int = flag(0, "optimizer steps between checkpoints (0: at every scoring)", at_least=0)
    probe_interval: int = flag(0, "optimizer steps between looks at the attention on dev rows, see probe.py (0: never)", at_least=0)
    seed: int = flag(1, "of the first weights, the order of the rows and dropout", at_least=0, at_most=2**40)
    device: str = flag("auto", "where to train", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: float32 on CPU, bfloat16 autocast on CUDA", choices=("auto", "float32", "bfloat16"))
    cache_teacher: bool = flag(False, "write the teacher's hidden states to disk once, beside the data, and train without its layers")
    cache_dtype: str = flag("bfloat16", "their type", choices=("bfloat16", "float32"))
    compile: bool = flag(False, "torch.compile the two decoders")
    num_threads: int = flag(0, "CPU threads (0: PyTorch's choice)", at_least=0, at_most=1024)
    resume: bool = flag(False, "go on with the run in --out_dir; its own settings are taken")
    overwrite: bool = flag(False, "delete the run in --out_dir first")


# Other defaults where the student is the toy. Chosen so that a run takes about two minutes on two cores.
TOY = dict(epochs=45, lr=3e-3, projector_lr=3e-3, warmup_steps=20, max_length=128, max_prompt_length=100, eval_interval=225, probe_interval=45)
# What may change between a run and its continuation.
FREE = ("resume", "overwrite", "out_dir", "device", "num_threads")


# ------------------------------------------------------------------------------------------------- the command line

def read_config(argv: list[str] | None = None) -> Config:
    """The flags, with the toy's defaults for the toy and, on --resume, the settings of the run."""
    def presets(given):
        if given.get("resume") and given.get("overwrite"):
            raise InputError("--resume goes on with a run and --overwrite deletes it: pass one of them")
        if given.get("resume"):
            return saved_config(Path(given.get("out_dir") or newest_run(Config(**given))), given)
        is_toy = given.get("student", "toy" if not given.get("teacher") else "") == "toy"
        method = METHODS[given.get("method", Config.method)]
        return {**(TOY if is_toy else {}), **({} if "alignment" in method else {"probe_interval": 0}),
                **({"student": "toy", "data": "toy"} if is_toy else {"data": "dolly"}), **method}

    toy_defaults = " ".join(f"--{name} {value}" for name, value in TOY.items())
    config = parse(Config, f"{__doc__}\nThe toy's defaults: {toy_defaults}", argv, presets=presets)
    if not config.student:
        raise InputError("--teacher without --student: name the student too (without either, the toy is trained)")
    if config.method != "sft" and not config.teacher:
        if config.student != "toy":
            raise InputError(f"--method {config.method} needs a --teacher (--method sft trains the student alone)")
        config.teacher = "toy"
    check_options(config)
    if config.method in ("sft", "seqkd") and config.cache_teacher:
        raise InputError(f"--cache_teacher: --method {config.method} does not run the teacher while it trains")
    if config.alignment == "none" and config.probe_interval:
        raise InputError(f"--probe_interval: --method {config.method} has no attention to look at")
    if config.method == "sft" and config.teacher:
        raise InputError("--method sft has no teacher: pass the model that learns as --student, and no --teacher")
    return config


def run_name(config: Config) -> Path:
    names = [Path(name).name for name in (config.teacher, config.student) if name and name != "toy"]
    return Path("out") / "-".join([*(names or ["toy"]), config.method])


def numbered(name: Path, number: int) -> Path:
    return name if number == 1 else name.with_name(f"{name.name}-{number}")


def newest_run(config: Config) -> Path:
    """The last of out/NAME, out/NAME-2, …"""
    name, number = run_name(config), 1
    while (numbered(name, number + 1) / "config.json").exists():
        number += 1
    return numbered(name, number)


def saved_config(out_dir: Path, given: dict) -> dict:
    """The settings of the run in out_dir. Raises InputError where there is none or a given flag says otherwise."""
    path = out_dir / "config.json"
    if not path.exists():
        raise InputError(f"--resume: no run in {out_dir} (no config.json); leave --resume out to start one")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        other_fields = saved.keys() ^ {field.name for field in dataclasses.fields(Config)}
    except (ValueError, AttributeError):
        saved, other_fields = {}, set()
    if "method" not in saved or not (out_dir / "metrics.jsonl").exists():
        raise InputError(f"--resume: {out_dir} is not the folder of a run (its config.json is not train.py's, or metrics.jsonl is missing)")
    if other_fields:
        raise InputError(f"--resume: the run in {out_dir} was made by another version of train.py (fields that differ: {', '.join(sorted(other_fields))})")
    for name, value in given.items():
        if name not in FREE and value != saved[name]:
            raise InputError(f"--resume: the run in {out_dir} has --{name} {saved[name]}, not {value}; "
                             "leave the flag out, or start a new run in another --out_dir")
    return {**saved, "out_dir": str(out_dir)}


def check_out_dir(config: Config, inputs: list[Path]) -> Path:
    """Choose or check the run's folder and touch nothing yet. Raises InputError where it holds another run, or where
    --overwrite would delete one of the inputs."""
    if not config.out_dir:
        number = 1
        while not config.overwrite and (numbered(run_name(config), number) / "config.json").exists():
            number += 1
        config.out_dir = str(numbered(run_name(config), number))
    out_dir = Path(config.out_dir)
    if config.resume:
        return out_dir
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out_dir {out_dir}: is a file")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not (out_dir / "metrics.jsonl").exists():
            raise InputError(f"--out_dir {out_dir}: holds files that are not a run's; pass another folder")
        if not config.overwrite:
            raise InputError(f"--out_dir {out_dir}: holds a run; pass --resume to go on with it, --overwrite to delete it, "
                             "or another folder")
        for path in inputs:
            if path.resolve().is_relative_to(out_dir.resolve()):
                raise InputError(f"--overwrite would delete {path}, which this run reads; pass another --out_dir")
    return out_dir


def start_run(config: Config, out_dir: Path) -> None:
    """Make the run's folder, empty, and write config.json."""
    if out_dir.exists() and config.overwrite:
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.iterdir()):          # it was empty when this run began to prepare its data
        raise InputError(f"--out_dir {out_dir}: another run has begun there; pass another folder")
    (out_dir / "metrics.jsonl").touch()
    with hub.atomic_write(out_dir / "config.json") as file:
        json.dump(dataclasses.asdict(config), file, indent=2)


# -------------------------------------------------------------------------------------------------------- the models

def check_pair(config: Config, student, teacher, student_tokenizer, teacher_tokenizer) -> None:
    """Raise InputError where tokenizers, vocabularies, limits and method do not go together."""
    for side, model, tokenizer in (("student", student, student_tokenizer), ("teacher", teacher, teacher_tokenizer)):
        if model is None:
            continue
        name = getattr(config, side)
        hub.check_vocabulary(f"--{side} {name}", model.config.vocab_size, tokenizer.vocab_size)
        if config.max_length > model.config.max_positions:
            raise InputError(f"--max_length {config.max_length}: --{side} {name} has only {model.config.max_positions} positions")
    if config.method in ("kd", "dskd") and not same_vocabulary(student_tokenizer, teacher_tokenizer):
        raise InputError(f"--method {config.method} needs one vocabulary, but {config.teacher} and {config.student} have different "
                         "ones; every other method works with any two")


def same_vocabulary(a, b) -> bool:
    return (a.vocab_size, a.eos_id) == (b.vocab_size, b.eos_id) and \
        all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))


def parameter_groups(config: Config, student, projectors, discriminator) -> list[dict]:
    """AdamW's groups: each module's matrices (decayed) and its vectors (not)."""
    groups = []
    for module, lr in ((student, config.lr), (projectors, config.projector_lr), (discriminator, config.ga_lr)):
        parameters = [] if module is None else list(module.parameters())
        for decay, chosen in ((config.weight_decay, [p for p in parameters if p.dim() > 1]),
                              (0.0, [p for p in parameters if p.dim() <= 1])):
            if chosen:
                groups.append(dict(params=chosen, lr=lr, peak_lr=lr, weight_decay=decay))
    return groups


def learning_rate(peak: float, step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine from the peak down to 1e-7 at the last step, total − 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return min(peak, 1e-7) + 0.5 * (1 + math.cos(math.pi * progress)) * max(0.0, peak - 1e-7)


# ---------------------------------------------------------------------------------------------------------- training

def main() -> None:
    config = read_config()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device, dtype = hub.pick_device(config.device, config.dtype)
    variable, compiler = ("CXX", "g++") if device == "cpu" else ("CC", "gcc")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise InputError(f"--compile: torch.compile needs a compiler ({compiler}, or the one that {variable} names), and there is none")
    autocast = functools.partial(hub.autocast, device, dtype)
    toy.write_data_for([config.data])
    files = {split: hub.data_file(config.data, split, required=split != "test") for split in ("train", "dev", "test")}
    rows = {split: read_rows(file) for split, file in files.items() if file}

    sides = [side for side in ("student", "teacher") if getattr(config, side)]
    folders = {side: toy.folder(side) if getattr(config, side) == "toy" else Path(getattr(config, side)) for side in sides}
    out_dir = check_out_dir(config, [*(file for file in files.values() if file), *folders.values()])
    toy.prepare([side for side in sides if getattr(config, side) == "toy"], ["--device", config.device, "--num_threads", str(config.num_threads)])
    last = last_checkpoint(out_dir) if config.resume else None

    torch.manual_seed(config.seed)
    student_tokenizer = load_tokenizer(folders["student"])
    student = load(last or folders["student"], init="pretrained" if last else config.student_init, device=device)
    teacher = teacher_tokenizer = projectors = discriminator = None
    if config.method != "sft":
        teacher = load(folders["teacher"], dtype=dtype, device=device, layers=not config.cache_teacher).requires_grad_(False)
        teacher_tokenizer = load_tokenizer(folders["teacher"])
        recommend_sft(config, teacher)
    check_pair(config, student, teacher, student_tokenizer, teacher_tokenizer)
    if config.method.startswith(("dskd", "dwa_kd")):
        sizes = student.config.hidden_size, teacher.config.hidden_size
        projectors = Projectors(*sizes, query=config.alignment in ("attention", "chunk_attention"), dtw_embed=config.dtw_weight > 0).to(device)
        discriminator = None if config.adversary == "none" else ADVERSARIES[config.adversary](2 * sizes[1]).to(device)
    if config.method == "seqkd":
        with autocast():
            rows["train"] = teacher_rows(rows["train"], files["train"], config.teacher, teacher, teacher_tokenizer, config.max_length, config.max_prompt_length, config.batch_size)
    mined = baselines.MinED(student_tokenizer, teacher_tokenizer, hub.DATA_DIR) if config.method == "mined" else None

    one_tokenizer = config.method in ("sft", "seqkd") or same_vocabulary(student_tokenizer, teacher_tokenizer)
    examples, cut, dropped = cached_rows(hub.DATA_DIR / "tokens", rows["train"], student_tokenizer, student_tokenizer if one_tokenizer else teacher_tokenizer,
                                         config.max_length, config.max_prompt_length)
    if cut or dropped:
        print(f"{config.data}, train: {cut} of {len(rows['train'])} prompts cut to {config.max_prompt_length} tokens, "
              f"{dropped} rows dropped, because no response token fits into {config.max_length}")
    if not examples:
        raise InputError(f"--data {config.data}: no row has a response token within --max_length {config.max_length}")

    pads = student_tokenizer.eos_id, (teacher_tokenizer or student_tokenizer).eos_id
    states = None
    if config.cache_teacher:
        states = TeacherStates(files["train"], config.teacher, teacher.source, examples, teacher.config.hidden_size, getattr(torch, config.cache_dtype), dtype)
        if not states.complete:
            with autocast():
                states.fill(load(teacher.source, dtype=dtype, device=device), config.batch_size, pads[1], device)
    if config.compile:
        for decoder in (student, teacher):
            if decoder is not None:
                decoder.compile(dynamic=True)

    if not config.resume:
        start_run(config, out_dir)
    optimizer = torch.optim.AdamW(parameter_groups(config, student, projectors, discriminator), betas=(0.9, 0.999), fused=True)
    steps_per_epoch = math.ceil(math.ceil(len(examples) / config.batch_size) / config.grad_accum)
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    eval_interval = config.eval_interval or steps_per_epoch
    start_step, best = 0, -1.0
    if last:
        start_step, best = load_checkpoint(last, projectors, discriminator, optimizer)
    keep_metrics(out_dir / "metrics.jsonl", start_step)

    scored = {split: rows[split][:config.eval_num or None] for split in ("dev", "test") if split in rows}
    tell_cut_prompts(f"{config.data}, dev", scored["dev"], student_tokenizer, config.max_prompt_length)

    def score(model, tokenizer, split: str, desc: str) -> float:
        """ROUGE-L × 100 of a model's greedy answers, the mean over the scored rows of a split."""
        with autocast():
            answers = answer(model, tokenizer, scored[split], config.max_length, config.max_prompt_length, temperature=0.0, desc=desc)
        return 100 * sum(rouge_l(answers, [row.outputs for row in scored[split]])) / len(answers)

    def look() -> dict[str, float]:
        """The main numbers of probe.py on the first dev rows."""
        with autocast():
            samples = probe.attend(config, dev_examples, student, teacher, projectors, pads)
        return probe.training_numbers(config, samples, discriminator)

    dev_examples = encode_rows(rows["dev"][:probe.BATCH], student_tokenizer, teacher_tokenizer, config.max_length, config.max_prompt_length)[0] \
        if config.probe_interval else []
    if config.probe_interval and not dev_examples:
        raise InputError(f"--probe_interval: none of the first {probe.BATCH} dev rows has a response token within --max_length {config.max_length}")

    print(f"{config.method}: {config.teacher or 'no teacher'} → {config.student}, {count(student)} parameters, "
          f"{len(examples)} rows, {total_steps} steps on {device}, into {out_dir}" + (f", from step {start_step}" if start_step else ""))

    @functools.lru_cache(maxsize=1)
    def epoch_batches(epoch: int):
        return make_batches(examples, config.batch_size, seed=config.seed * 1_000_003 + epoch)

    def prepare(step: int):
        """A step's examples and, for each forward pass, its tensors."""
        first = (step % steps_per_epoch) * config.grad_accum
        parts = epoch_batches(step // steps_per_epoch)[first:first + config.grad_accum]
        align_on = config.align_on if config.alignment.startswith("chunk") else None
        micro_batches = [collate(part, *pads, align_on) | (mined.tensors(part) if mined else {}) |
                         ({"teacher_hidden": states.grid(part, teacher.embed.weight.dtype)} if states else {}) for part in parts]
        if device == "cuda":
            micro_batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in micro_batches]
        return [example for part in parts for example in part], micro_batches

    peak = peak_flops(device, dtype)
    bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
    started = time.perf_counter()
    for step, (step_examples, micro_batches) in ahead(prepare, range(start_step, total_steps)):
        n = {side: sum(int((b[f"{side}_labels"] != -100).sum()) for b in micro_batches) for side in ("student", "teacher")}

        student.train()
        sums: dict[str, torch.Tensor] = {}      # over the step's tokens
        for batch in micro_batches:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with autocast():
                parts = distill(config, batch, student, teacher, projectors, discriminator, step)
                loss = total(config, parts, n)
            loss.backward()
            for name, value in {**parts, "loss": loss.detach() * n["student"]}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak_lr"], step, config.warmup_steps, total_steps)
        learners = [p for module in (student, projectors) if module is not None for p in module.parameters()]
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(learners, config.clip_grad)
        totals = dict(zip(sums, torch.stack([value.float() for value in sums.values()]).tolist()))      # the GPU is waited for here only
        grad_norm = totals.pop("grad_norm")
        if not math.isfinite(totals["loss"] + grad_norm):
            bar.close()
            raise InputError(f"step {step + 1}: the loss is {totals['loss']} and its gradient's norm {grad_norm}; the step was not "
                             f"taken. Try a lower --lr, or a higher --warmup_steps; {out_dir / 'last'} holds the last checkpoint")
        if discriminator is not None:       # the adversary's gradient must not shorten the student's
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds, started = time.perf_counter() - started, time.perf_counter()
        tokens = sum(len(e.student.ids) for e in step_examples)
        flops = step_flops(config, student, teacher, step_examples, cached=states is not None) / seconds
        of_teacher = ("s2t_acc", "adversary_key_loss", "adversary_key_acc")
        record = {"step": step + 1, **{name: value / n["teacher" if name in of_teacher else "student"] for name, value in totals.items()},
                  "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / seconds,
                  "tflops": flops / 1e12, "mfu": flops / peak, "seconds": seconds}
        bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=f"{tokens / seconds:.0f}", mfu=f"{100 * flops / peak:.0f}%", refresh=False)
        bar.update()

        done = step + 1 == total_steps
        if (step + 1) % eval_interval == 0 or done:
            record["dev_rouge_l"] = score(student, student_tokenizer, "dev", "scoring dev")
            tqdm.write(f"step {step + 1:>6}   loss {record['loss']:.4f}   dev ROUGE-L {record['dev_rouge_l']:.2f}")
        if config.probe_interval and ((step + 1) % config.probe_interval == 0 or done):
            record |= look()
        append_line(out_dir / "metrics.jsonl", record)
        state = {"step": step + 1, "data": config.data, "method": config.method, "best_dev_rouge_l": max(best, record.get("dev_rouge_l", -1.0))}
        if record.get("dev_rouge_l", -1.0) > best:
            best = record["dev_rouge_l"]
            save_checkpoint(out_dir / "best", student, projectors, discriminator, None, state)
        if (step + 1) % (config.save_interval or eval_interval) == 0 or done:
            save_checkpoint(out_dir / "last", student, projectors, discriminator, optimizer, state)
        if "dev_rouge_l" in record or "probe_mass" in record:
            started = time.perf_counter()
    bar.close()

    compared = [("student", load(out_dir / "best", device=device), student_tokenizer)]
    if teacher is not None and not config.cache_teacher:
        compared.insert(0, ("teacher", teacher, teacher_tokenizer))
    results = {name: {split: score(model, tokenizer, split, f"scoring the {name} on {split}") for split in scored} for name, model, tokenizer in compared}
    with hub.atomic_write(out_dir / "results.json") as file:
        json.dump(results, file, indent=2)
    print_table(config, results, {split: f"{split} ({len(scored[split])} of {len(rows[split])} rows)" for split in scored})
    print(f"pictures:          {', '.join(map(str, leave_pictures(config, files['dev'], folders)))}")
    if config.alignment != "none":
        print(f"look closer:       python probe.py {shlex.quote(str(out_dir))}")


# ----------------------------------------------------------------------------------------------------- around the loop

def ahead(prepare, steps: range):
    """(step, prepare(step)) for every step, where the next one is prepared in another thread while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = None
        for step in steps:
            current = following or pool.submit(prepare, step)
            following = pool.submit(prepare, step + 1) if step + 1 in steps else None
            yield step, current.result()


def count(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M"


def append_line(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= step]
    with hub.atomic_write(path) as file:
        file.writelines(lines)


def recommend_sft(config: Config, teacher) -> None:
    if not hub.same_data(config.data, hub.trained_on(teacher.source)):
        print(f"note: the teacher was not fine-tuned on {config.data} by this script, as the papers do first:\n"
              f"      python train.py --method sft --student {config.teacher} --data {config.data} --lr 2e-5 --epochs 3 --out_dir out/teacher\n"
              f"      and then --teacher out/teacher")


def print_table(config: Config, results: dict[str, dict[str, float]], columns: dict[str, str]) -> None:
    """results: "teacher" and "student" → split → ROUGE-L × 100; columns: split → its heading. Then the commands that go on."""
    print(f"\n{'ROUGE-L, greedy':<32}" + "".join(f"{column:>26}" for column in columns.values()))
    for name, scores in results.items():
        print(f"{name + ' ' + getattr(config, name):<32.32}" + "".join(f"{score:26.2f}" for score in scores.values()))
    if config.cache_teacher:
        print(f"\nthe teacher was not loaded; its score:  python eval_rouge.py {shlex.quote(config.teacher)} --data {shlex.quote(config.data)}")
    more = {"toy": toy.SETS, "dolly": ("dolly", "self-inst", "vicuna", "sinst", "uinst")}.get(
        config.data, [config.data if "test" in columns else str(hub.data_file(config.data, "dev"))])
    print("\nscore it further:  python eval_rouge.py " + shlex.join([config.out_dir, "--data", *more, "--max_length", str(config.max_length),
                                                                     "--max_prompt_length", str(config.max_prompt_length)]))
    print(f"talk to it:        python sample.py {shlex.quote(config.out_dir)} \"your instruction\"")


def leave_pictures(config: Config, dev_file: Path, folders: dict[str, Path]) -> list[Path]:
    """Draw the run's curves and, where there is attention, what the best checkpoint's looks like on a dev row."""
    out_dir = Path(config.out_dir)
    drawn = [probe.draw_curves(out_dir)]
    if config.alignment != "none":
        run = probe.load_run(config.out_dir, str(folders["teacher"]))
        if samples := probe.look(run, dev_file, probe.BATCH):
            drawn.insert(0, probe.draw(run, probe.readable(samples), out_dir / "heatmap.png"))
    return drawn


if __name__ == "__main__":
    hub.run(main)
