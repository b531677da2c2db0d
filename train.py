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
import contextlib
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
import hub
import parallel
import probe
import toy
from cache import TeacherStates, cached_rows
from checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from config import flag, parse
from distill import METHODS, Options, check_options, distill, make_modules, total
from eval_rouge import answer, rouge_l, tell_cut_prompts
from flops import peak_flops, step_flops
from hub import InputError
from lora import add_lora, load_adapter
from model import load
from projector_init import init_from_shared, shared_tokens
from run_folder import Interrupted, Stop, append_line, check_out_dir, keep_metrics, locked, newest_run, saved_config, start_run
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
    ga_lr: float = flag(1e-3, "the same for the adversary; 0 leaves it as it was drawn, as in the release", at_least=0)
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
    gradient_checkpointing: bool = flag(False, "compute the student's layers again for their gradients in place of keeping what they computed")
    lora_rank: int = flag(0, "train matrices of this rank beside the student's frozen ones, see lora.py (0: train all; the paper: 256)", at_least=0)
    lora_alpha: float = flag(8.0, "α, their weight is α / rank (a number)", at_least=0)
    lora_dropout: float = flag(0.1, "share of their inputs that is dropped", at_least=0, at_most=1)
    num_threads: int = flag(0, "CPU threads (0: PyTorch's choice)", at_least=0, at_most=1024)
    shard_student: bool = flag(False, "with torchrun: each process keeps a part of every layer of the student")
    shard_teacher: bool = flag(False, "the same for the teacher")
    resume: bool = flag(False, "go on with the run in --out_dir; its own settings are taken")
    overwrite: bool = flag(False, "delete the run in --out_dir first")


# Other defaults where the student is the toy. Chosen so that a run takes about two minutes on two cores.
TOY = dict(epochs=45, lr=3e-3, projector_lr=3e-3, warmup_steps=20, max_length=128, max_prompt_length=100, eval_interval=225, probe_interval=45)
BAD_STEPS = 3           # in a row, and the run stops


# ------------------------------------------------------------------------------------------------- the command line

def read_config(argv: list[str] | None = None) -> Config:
    """The flags, with the toy's defaults for the toy and, on --resume, the settings of the run."""
    def presets(given):
        if given.get("resume") and given.get("overwrite"):
            raise InputError("--resume goes on with a run and --overwrite deletes it: pass one of them")
        if given.get("resume"):
            return saved_config(Config, Path(given.get("out_dir") or newest_run(Config(**given))), given)
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
    if config.method in ("sft", "seqkd") and (config.cache_teacher or config.shard_teacher):
        raise InputError(f"--cache_teacher, --shard_teacher: --method {config.method} does not run the teacher while it trains")
    if config.alignment == "none" and config.probe_interval:
        raise InputError(f"--probe_interval: --method {config.method} has no attention to look at")
    if config.lora_rank and config.student_init == "random":
        raise InputError("--lora_rank: keeps the student's weights as they are, so they cannot be random (--student_init random)")
    for field in ("lora_alpha", "lora_dropout"):
        if not config.lora_rank and getattr(config, field) != getattr(Config, field):
            raise InputError(f"--{field}: without --lora_rank it has no use")
    if config.compile and (config.shard_student or config.shard_teacher or config.gradient_checkpointing):
        raise InputError("--compile: not together with --shard_student, --shard_teacher or --gradient_checkpointing")
    if config.cache_teacher and config.shard_teacher:
        raise InputError("--cache_teacher trains without the teacher's layers, of which --shard_teacher keeps a part: pass one of them")
    if config.method == "sft" and config.teacher:
        raise InputError("--method sft has no teacher: pass the model that learns as --student, and no --teacher")
    return config


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
        parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.started())
        train(read_config(), stack)


def train(config: Config, stack: contextlib.ExitStack) -> None:
    """One run, from the flags to the table. stack: what is to be let go of at the end."""
    several = parallel.world()
    if config.grad_accum % several:
        rows = config.batch_size * config.grad_accum
        raise InputError(f"--grad_accum {config.grad_accum}: must be a multiple of the {several} processes, among which a step's forward passes are dealt "
                         f"out; a step of {rows} rows is --batch_size {max(1, rows // several)} --grad_accum {several}")
    if (config.shard_student or config.shard_teacher) and several == 1:
        raise InputError("--shard_student, --shard_teacher: parts for several processes; start with torchrun --nproc_per_node=N train.py …")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device, dtype = hub.pick_device(config.device, config.dtype)
    variable, compiler = ("CXX", "g++") if device == "cpu" else ("CC", "gcc")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise InputError(f"--compile: torch.compile needs a compiler ({compiler}, or the one that {variable} names), and there is none")
    autocast = functools.partial(hub.autocast, device, dtype)
    with parallel.first_goes_first():
        toy.write_data_for([config.data])
    files = {split: hub.data_file(config.data, split, required=split != "test") for split in ("train", "dev", "test")}
    rows = {split: read_rows(file) for split, file in files.items() if file}

    sides = [side for side in ("student", "teacher") if getattr(config, side)]
    folders = {side: toy.folder(side) if getattr(config, side) == "toy" else Path(getattr(config, side)) for side in sides}
    out_dir = check_out_dir(config, [*(file for file in files.values() if file), *folders.values()])
    with parallel.first_goes_first():
        toy.prepare([side for side in sides if getattr(config, side) == "toy"], ["--device", config.device, "--num_threads", str(config.num_threads)])
    last = None
    if config.resume:
        if parallel.is_first():
            stack.enter_context(locked(out_dir))
            last = last_checkpoint(out_dir)
        last = parallel.gather(last)[0]

    torch.manual_seed(config.seed)
    student_tokenizer = load_tokenizer(folders["student"])
    with_lora = config.lora_rank > 0
    student = load(last if last and not with_lora else folders["student"], init="pretrained" if last else config.student_init,
                   device="cpu" if config.shard_student else device)
    student.checkpointing = config.gradient_checkpointing
    if with_lora:
        add_lora(student, config.lora_rank, config.lora_alpha, config.lora_dropout)
        if last:
            load_adapter(last / "adapter", student)
    teacher = teacher_tokenizer = projectors = discriminator = None
    if config.method != "sft":
        teacher = load(folders["teacher"], dtype=dtype, device="cpu" if config.shard_teacher else device, layers=not config.cache_teacher).requires_grad_(False)
        teacher_tokenizer = load_tokenizer(folders["teacher"])
        recommend_sft(config, teacher)
    check_pair(config, student, teacher, student_tokenizer, teacher_tokenizer)
    if config.method.startswith(("dskd", "dwa_kd")):
        projectors, discriminator = (module and module.to(device) for module in make_modules(config, student.config.hidden_size, teacher.config.hidden_size))
        if config.projector_init == "shared" and not last:
            init_from_shared(projectors, student, teacher, shared_tokens(student_tokenizer, teacher_tokenizer))
    if discriminator is not None:
        discriminator.requires_grad_(config.ga_lr > 0)
    if config.method == "seqkd":
        with autocast(), parallel.first_goes_first():
            rows["train"] = teacher_rows(rows["train"], files["train"], config.teacher, teacher, teacher_tokenizer, config.max_length, config.max_prompt_length, config.batch_size)
    one_tokenizer = config.method in ("sft", "seqkd") or same_vocabulary(student_tokenizer, teacher_tokenizer)
    with parallel.first_goes_first():
        mined = baselines.MinED(student_tokenizer, teacher_tokenizer, hub.DATA_DIR) if config.method == "mined" else None
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
        with autocast(), parallel.first_goes_first():
            states = TeacherStates(files["train"], config.teacher, teacher.source, examples, teacher.config.hidden_size, getattr(torch, config.cache_dtype), dtype)
            if not states.complete:
                states.fill(load(teacher.source, dtype=dtype, device=device), config.batch_size, pads[1], device)
    if config.compile:
        for decoder in (student, teacher):
            if decoder is not None:
                decoder.compile(dynamic=True)

    if not config.resume and parallel.is_first():
        out_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(out_dir))
        start_run(config, out_dir)
    parallel.equal_weights(student, projectors, discriminator)
    if config.shard_student:
        parallel.shard(student, device)
    if config.shard_teacher:
        parallel.shard(teacher, device)
    if parallel.rank():
        torch.manual_seed(config.seed + 1_000_003 * parallel.rank())        # dropout differs between processes
    optimizer = torch.optim.AdamW(parameter_groups(config, student, projectors, discriminator), betas=(0.9, 0.999), fused=not config.shard_student)
    steps_per_epoch = math.ceil(len(examples) / (config.batch_size * config.grad_accum))
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    eval_interval = config.eval_interval or steps_per_epoch
    state = {"step": 0, "best_dev_rouge_l": -1.0, "bad_steps": 0}
    if last:
        state = load_checkpoint(last, projectors, discriminator, optimizer)
    start_step, best, bad_steps, unfinished = state["step"], state["best_dev_rouge_l"], state["bad_steps"], state.get("unfinished")
    if parallel.is_first():
        keep_metrics(out_dir / "metrics.jsonl", start_step - (unfinished is not None))

    scored = {split: rows[split][:config.eval_num or None] for split in ("dev", "test") if split in rows}
    tell_cut_prompts(f"{config.data}, dev", scored["dev"], student_tokenizer, config.max_prompt_length)

    def load_in_parts(folder: Path, sharded: bool):
        model = load(folder, device="cpu" if sharded else device)
        if sharded:
            parallel.shard(model, device)
        return model

    def score(model, tokenizer, split: str, desc: str) -> float:
        """ROUGE-L × 100 of a model's greedy answers, the mean over the scored rows of a split. Interrupted by a signal."""
        with autocast():
            answers = answer(model, tokenizer, scored[split], config.max_length, config.max_prompt_length, temperature=0.0, desc=desc, at_once=stop.at_once)
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
        return make_batches(examples, config.batch_size * config.grad_accum, seed=config.seed * 1_000_003 + epoch)

    def prepare(step: int):
        """A step's examples and, for each of this process's forward passes, its tensors and its weight: 0 where there is
        nothing left for this process, which then goes through the motions so that the others need not wait."""
        whole = epoch_batches(step // steps_per_epoch)[step % steps_per_epoch]
        parts = [part for part in (whole[k::config.grad_accum] for k in range(config.grad_accum)) if part]
        mine = range(parallel.rank(), math.ceil(len(parts) / several) * several, several)
        weights, parts = [float(k < len(parts)) for k in mine], [parts[k % len(parts)] for k in mine]
        align_on = config.align_on if config.alignment.startswith("chunk") else None
        micro_batches = [collate(part, *pads, align_on) | (mined.tensors(part) if mined else {}) |
                         ({"teacher_hidden": states.grid(part, teacher.embed.weight.dtype)} if states else {}) for part in parts]
        if device == "cuda":
            micro_batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in micro_batches]
        return whole, list(zip(micro_batches, weights))

    def save_last(state: dict) -> None:
        if parallel.is_first():
            hub.flush(out_dir / "metrics.jsonl")
        save_checkpoint(out_dir / "last", student, projectors, discriminator, optimizer, state)

    def finish(record: dict, bad_steps: int) -> None:
        """After a step: score and look where that is due, write its line, and save."""
        nonlocal best
        step, done = record["step"], record["step"] == total_steps
        state = {"step": step, "data": config.data, "method": config.method, "student": config.student, "best_dev_rouge_l": best, "bad_steps": bad_steps}
        if step % eval_interval == 0 or done:
            try:
                record["dev_rouge_l"] = score(student, student_tokenizer, "dev", "scoring dev")
            except Interrupted:
                save_last(state | {"unfinished": record})
                leave(config, stop.signal, step, total_steps)
            tqdm.write(f"step {step:>6}   loss {record.get('loss', math.nan):.4f}   dev ROUGE-L {record['dev_rouge_l']:.2f}")
        if config.probe_interval and (step % config.probe_interval == 0 or done):
            record |= {name: value for name, value in look().items() if math.isfinite(value)}
        if parallel.is_first():
            append_line(out_dir / "metrics.jsonl", record)
        if record.get("dev_rouge_l", -1.0) > best:
            best = state["best_dev_rouge_l"] = record["dev_rouge_l"]
            save_checkpoint(out_dir / "best", student, projectors, discriminator, None, state)
        due = step % (config.save_interval or eval_interval) == 0 and not bad_steps or done           # while steps fail, the checkpoints before stay
        if due:
            save_last(state)
        if parallel.add(torch.tensor(stop.signal)).item():             # all processes leave after the same step
            if not due:
                save_last(state)
            leave(config, stop.signal, step, total_steps)

    stop = Stop()
    stack.callback(stop.close)
    if unfinished:
        finish(unfinished, bad_steps)
    peak = peak_flops(device, dtype) * several
    bar = stack.enter_context(tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True))
    started = time.perf_counter()
    for step, (step_examples, micro_batches) in ahead(prepare, range(start_step, total_steps)):
        n = {side: sum(getattr(example, side).valid for example in step_examples) for side in ("student", "teacher")}      # of all processes

        student.train()
        sums: dict[str, torch.Tensor] = {}      # over the step's tokens
        for batch, weight in micro_batches:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with autocast():
                parts = distill(config, batch, student, teacher, projectors, discriminator, step)
                loss = weight * total(config, parts, n)
            loss.backward()
            for name, value in {**{name: weight * value.detach() for name, value in parts.items()}, "loss": loss.detach() * n["student"]}.items():
                sums[name] = sums.get(name, 0) + value
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak_lr"], step, config.warmup_steps, total_steps)
        learners, adversaries = ([p for module in modules if module is not None for p in module.parameters() if p.requires_grad] for modules in ((student, projectors), (discriminator,)))
        parallel.add_gradients(learners + adversaries)
        norms = [parallel.clip_gradients(learners, config.clip_grad)]
        if adversaries:                     # its gradient must not shorten the student's
            norms.append(parallel.clip_gradients(adversaries, config.clip_grad))
        numbers = torch.cat([parallel.add(torch.stack([value.float() for value in sums.values()])), torch.stack(norms).float()]).tolist()
        totals, grad_norm = dict(zip(sums, numbers)), numbers[len(sums)]                     # the GPU is waited for here only
        record = {"step": step + 1}
        if math.isfinite(totals["loss"] + sum(numbers[len(sums):])):
            optimizer.step()
            bad_steps = 0
        else:
            bad_steps += 1
            record["skipped_rows"] = sorted(example.row for example in step_examples)
            tqdm.write(f"step {step + 1}: the loss is {totals['loss'] / n['student']} and the norm of its gradient {grad_norm}; the step is not taken. "
                       f"Its rows, from 0{', of the teacher’s answers' if config.method == 'seqkd' else ''}: {', '.join(map(str, record['skipped_rows']))}")
        optimizer.zero_grad(set_to_none=True)

        seconds, started = time.perf_counter() - started, time.perf_counter()
        tokens = sum(len(e.student.ids) for e in step_examples)
        flops = step_flops(config, student, teacher, step_examples, cached=states is not None) / seconds
        of_teacher = ("s2t_acc", "adversary_key_loss", "adversary_key_acc")
        values = {name: value / n["teacher" if name in of_teacher else "student"] for name, value in totals.items()} | {"grad_norm": grad_norm}
        record |= {name: value for name, value in values.items() if math.isfinite(value)}
        record |= {"lr": optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / seconds, "tflops": flops / 1e12, "mfu": flops / peak, "seconds": seconds}
        bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{tokens / seconds:.0f}", mfu=f"{100 * flops / peak:.0f}%", refresh=False)
        bar.update()
        if bad_steps == BAD_STEPS:
            if parallel.is_first():
                append_line(out_dir / "metrics.jsonl", record)
            raise InputError(f"{BAD_STEPS} steps in a row, up to step {step + 1}, had a loss or gradient that is not finite. {out_dir / 'last'} holds the last good "
                             "checkpoint, where there was one; try a lower --lr, a longer --warmup_steps or --dtype float32 in a new run")
        finish(record, bad_steps)
        if "dev_rouge_l" in record or "probe_mass" in record:
            started = time.perf_counter()
    bar.close()
    parallel.barrier()          # the first process may still be writing the last checkpoint

    compared = [("student", load_in_parts(out_dir / "best", config.shard_student), student_tokenizer)]
    if teacher is not None and not config.cache_teacher:
        compared.insert(0, ("teacher", teacher, teacher_tokenizer))
    try:
        results = {name: {split: score(model, tokenizer, split, f"scoring the {name} on {split}") for split in scored} for name, model, tokenizer in compared}
    except Interrupted:
        leave(config, stop.signal, total_steps, total_steps)
    stop.close()
    if not parallel.is_first():
        return
    with hub.atomic_write(out_dir / "results.json") as file:
        json.dump(results, file, indent=2)
    print_table(config, results, {split: f"{split} ({len(scored[split])} of {len(rows[split])} rows)" for split in scored})
    try:
        print(f"pictures:          {', '.join(map(str, leave_pictures(config, files['dev'], folders)))}")
    except Exception as error:          # the run is finished and saved: it must not fail for a picture
        print(f"pictures:          could not be drawn ({' '.join(repr(error).split()):.200})")
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


def leave(config: Config, number: int, step: int, total_steps: int) -> None:
    """Exit as a program does that a signal ended, and say how to go on."""
    torchrun = "torchrun … " if parallel.world() > 1 else "python "
    parallel.barrier()                  # torchrun ends all processes when the first one leaves, which may still be saving
    if parallel.is_first():
        print(f"\nstopped by {signal.Signals(number).name if number else 'a signal'} after step {step} of {total_steps}, which is saved; go on with:\n"
              f"  {torchrun}train.py --out_dir {shlex.quote(config.out_dir)} --resume", flush=True)
    sys.exit(128 + (number or signal.SIGTERM))


def count(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M"


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
