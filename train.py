"""Distil a teacher into a student that cuts text into other tokens. Reads from top to bottom like the algorithm.

    python train.py                                                       # the toy: minutes on a laptop, no download
    python train.py --teacher qwen --student gpt2                         # the paper's pair, on Dolly; wants a GPU
    python train.py --teacher DIR --student DIR --data DIR --method dwa_kd --adversary gan
    python train.py --method sft --student qwen --out_dir out/teacher     # fine-tune the teacher first
    python train.py --out_dir out/NAME --resume                           # go on after an interruption

    total = (1 − α) · CE + α · KD + λ_GA · GA + λ_DTW · DTW       CE, KD, …: methods/table.py; plainly: methods/plain.py

Every term is a sum over valid tokens divided by their number in the whole optimizer step. The papers' settings are the
defaults; the toy has its own (TRAINING in toy.py)."""
import contextlib
import itertools
import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import probe
from eval_rouge import quick_scores
from files import hub
from files.config import InputError, flag
from methods.table import KD_PARTS, WITHOUT_KD, Options, distill, terms
from running import parallel, report
from running.batches import steps_of
from running.checkpoint import save_checkpoint
from running.checks import read_settings
from running.flops import peak_flops
from running.run_folder import Interrupted, Stop, append_line
from running.setup import Run, go_on, set_up, to_score

BAD_STEPS = 3           # in a row, and the run stops

@dataclass
class Config(Options):
    teacher: str = flag("", "the teacher: name, hub id or folder (toy when no student is given either)")
    student: str = flag("", "the student: name, hub id or folder (toy when no teacher is given either)")
    data: str = flag("", "training data: name, or folder with train.jsonl and dev.jsonl (default: toy or dolly)")
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
    on_policy: float = flag(0.0, "share of the steps in which the teacher judges what the student itself answers",
                            at_least=0, at_most=1)
    eval_interval: int = flag(0, "optimizer steps between scorings of the dev split (0: once an epoch)", at_least=0)
    select: str = flag("rouge", "the best checkpoint: by ROUGE-L, or by bits a byte of dev", choices=("rouge", "bits"))
    eval_num: int = flag(100, "rows of the dev and test splits that are scored (0: all)", at_least=0)
    save_interval: int = flag(0, "optimizer steps between checkpoints (0: at every scoring)", at_least=0)
    probe_interval: int = flag(0, "optimizer steps between looks at the attention, see probe.py (0: never)", at_least=0)
    seed: int = flag(1, "of the first weights, the order of the rows and dropout", at_least=0, at_most=2**40)
    device: str = flag("auto", "where to train", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: float32 on CPU, bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    cache_teacher: bool = flag(False, "write the teacher's hidden states to disk once; train without its layers")
    cache_dtype: str = flag("bfloat16", "their type", choices=("bfloat16", "float32"))
    compile: bool = flag(False, "torch.compile the two decoders and, on a GPU, losses and generation")
    gradient_checkpointing: bool = flag(False, "compute the student's layers again for their gradients; keep nothing")
    lora_rank: int = flag(0, "train matrices of this rank beside the student's frozen ones (0: all; the paper: 256)",
                          at_least=0)
    lora_alpha: float = flag(8.0, "α, their weight is α / rank (a number)", at_least=0)
    lora_dropout: float = flag(0.1, "share of their inputs that is dropped", at_least=0, at_most=1)
    num_threads: int = flag(0, "CPU threads (0: PyTorch's choice)", at_least=0, at_most=1024)
    shard_student: bool = flag(False, "with torchrun: each process keeps a part of every layer of the student")
    shard_teacher: bool = flag(False, "the same for the teacher")
    resume: bool = flag(False, "go on with the run in --out_dir; its own settings are taken")
    overwrite: bool = flag(False, "delete the run in --out_dir first")

def parameter_groups(config: Config, student, projectors, adversary) -> list[dict]:
    """AdamW's groups: each module's matrices (decayed) and its vectors (not); what is sharded apart from what is whole,
    because one kernel takes either. numbers: the parameters' in checkpoints, which know nothing of shards."""
    groups, number = [], itertools.count()
    for module, lr in ((student, config.lr), (projectors, config.projector_lr), (adversary, config.ga_lr)):
        parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        for chosen, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            numbered = list(zip(chosen, number))
            for part in (False, True):
                if some := [(p, k) for p, k in numbered if parallel.is_part(p) == part]:
                    parameters, numbers = zip(*some)
                    groups.append(dict(params=parameters, numbers=numbers, lr=lr, peak_lr=lr, weight_decay=decay))
    return groups

def learning_rate(peak: float, step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine from the peak down to 1e-7 at the last step, total − 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return min(peak, 1e-7) + 0.5 * (1 + math.cos(math.pi * progress)) * max(0.0, peak - 1e-7)

def train(config: Config, stack: contextlib.ExitStack) -> tuple[Config, Run]:
    """One run, up to its last step. stack: what is to be let go of at the end."""
    run = set_up(config, stack)
    stack.enter_context(report.memory_told(config, run))
    student, teacher, projectors, adversary = run.student, run.teacher, run.projectors, run.adversary
    groups = parameter_groups(config, student, projectors, adversary)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    unfinished = go_on(config, run, optimizer)
    probe.choose_rows(config, run)
    report.announce(config, run)
    run.stop = Stop()
    stack.callback(run.stop.close)
    if unfinished:
        finish_step(config, run, optimizer, unfinished)
    critics = [] if adversary is None else [p for p in adversary.parameters() if p.requires_grad]
    learners = [p for module in (student, projectors) if module for p in module.parameters() if p.requires_grad]
    α, λ_GA, λ_DTW = config.kd_rate, config.ga_weight, config.dtw_weight
    if config.method in WITHOUT_KD:
        α = 0.0
    factors = {"nll_loss": 1 - α, **dict.fromkeys(KD_PARTS, α)}        # the heads need them early: methods/heads.py
    peak = peak_flops(run.device, run.dtype) * parallel.world()
    bar = stack.enter_context(tqdm(total=run.total_steps, initial=run.state["step"], unit="step", dynamic_ncols=True))
    started = time.perf_counter()
    for step, examples, n, forward_passes in steps_of(config, run, run.state["step"]):     # n: of all processes
        sums = {}                                                       # over the step's tokens
        student.train()
        for batch, weight, learns in forward_passes:
            batch = {name: x.to(run.device, non_blocking=True) for name, x in batch.items()}
            with run.autocast():
                parts = distill(config, batch, student, teacher, projectors, adversary, step, factors, learns)
                CE, KD, GA, DTW = terms(parts, n)
                loss = (1 - α) * CE + α * KD + λ_GA * GA + λ_DTW * DTW
            (weight * loss).backward()
            for name, value in {**parts, "loss": loss * n["student"]}.items():
                sums[name] = sums.get(name, 0) + weight * value.detach()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak_lr"], step, config.warmup_steps, run.total_steps)
        parallel.add_gradients(learners + critics)
        norms = [parallel.clip_gradients(some, config.clip_grad) for some in (learners, critics) if some]
        totals, norms = parallel.add_up(sums, norms)                    # the GPU is waited for here only
        record = {"step": step + 1}
        if math.isfinite(totals["loss"] + sum(norms)):
            optimizer.step()
            run.state["bad_steps"] = 0
        else:
            run.state["bad_steps"] += 1
            record["skipped_rows"] = sorted(example.row for example in examples)
            tqdm.write(report.bad_step(config, record, totals["loss"] / n["student"], norms))
        optimizer.zero_grad(set_to_none=True)
        record |= report.step_record(config, run, totals, norms[0], optimizer.param_groups[0]["lr"], examples, n,
                                     time.perf_counter() - started, peak)
        report.show(bar, record)
        finish_step(config, run, optimizer, record)
        started = time.perf_counter()
    bar.close()
    parallel.barrier()          # the first process may still be writing the last checkpoint
    return config, run

def finish_step(config: Config, run: Run, optimizer, record: dict) -> None:
    """After a step: score and look where that is due, write its line, save, and leave where a signal asks for it."""
    state, out_dir, modules = run.state, run.out_dir, (run.student, run.projectors, run.adversary)
    step = state["step"] = record["step"]
    done, eval_interval = step == run.total_steps, config.eval_interval or run.steps_per_epoch
    if state["bad_steps"] == BAD_STEPS:
        append_line(out_dir / "metrics.jsonl", record)
        raise InputError(f"{BAD_STEPS} steps in a row, up to step {step}, had a loss or gradient that is not finite. "
                         f"{out_dir / 'last'} holds the last good checkpoint, where there was one; try a lower --lr, a "
                         "longer --warmup_steps or --dtype float32 in a new run")
    if step % eval_interval == 0 or done:
        try:
            scores = score(config, run, "student", run.student, "dev", "scoring dev")
        except Interrupted:
            save_checkpoint(out_dir / "last", *modules, optimizer, state | {"unfinished": record})
            report.leave(config, run.stop.signal, step, run.total_steps)
        record |= {f"dev_{name}": value for name, value in scores.items()}
        tqdm.write(f"step {step:>6}   loss {record.get('loss', math.nan):.4f}   dev: {report.scores(scores)}")
    if config.probe_interval and (step % config.probe_interval == 0 or done):
        record |= probe.numbers_of_run(config, run)
    append_line(out_dir / "metrics.jsonl", record)
    name, sign = ("rouge_l", 1) if config.select == "rouge" else ("bits_per_byte", -1)
    if f"dev_{name}" in record and sign * record[f"dev_{name}"] > sign * state[f"best_dev_{name}"]:
        state |= {f"best_dev_{name}": value for name, value in scores.items()}
        save_checkpoint(out_dir / "best", *modules, None, state)
    due = step % (config.save_interval or eval_interval) == 0 and not state["bad_steps"] or done    # not bad steps
    leaving = parallel.add(torch.tensor(run.stop.signal)).item()             # all processes leave after the same step
    if due or leaving:
        save_checkpoint(out_dir / "last", *modules, optimizer, state)
    if leaving:
        report.leave(config, run.stop.signal, step, run.total_steps)

def score(config: Config, run: Run, side: str, decoder, split: str, desc: str) -> dict[str, float]:
    """ROUGE-L and bits a byte on the scored rows of a split. Raises Interrupted on a signal."""
    with run.autocast():
        return quick_scores(decoder, run.tokenizers[side], run.scored[split], config, desc, run.stop.at_once)

def conclude(config: Config, run: Run) -> None:
    """Score the teacher and the best checkpoint, one after the other, then leave the table and the pictures."""
    results, run.shapes = {}, {}
    try:
        for name, decoder in to_score(config, run):
            side = "teacher" if name == "teacher" else "student"
            results[name] = {split: score(config, run, side, decoder, split, f"{name}: {split}")
                             for split in run.scored}
            decoder = None                                      # memory for the next
    except Interrupted:
        report.leave(config, run.stop.signal, run.total_steps, run.total_steps)
    run.stop.close()
    if parallel.is_first():
        report.print_results(config, run, results)
        probe.leave_pictures(config, run, results)
        report.write_results(run, results)

def main() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.started())
        conclude(*train(read_settings(Config, __doc__), stack))

if __name__ == "__main__":
    hub.run(main)
