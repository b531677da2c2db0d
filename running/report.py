"""What a run says: its first line, a step's record, the table, the commands that go on, and how it leaves."""
import contextlib
import json
import math
import shlex
import signal
import sys

import toy
from files import hub
from files.config import InputError
from running import parallel
from running.flops import step_flops

# means over the data's labels, and over the teacher's tokens; the others are over the student's
OF_DATA = ("nll_loss", "accuracy")
OF_TEACHER = ("s2t_acc", "teacher_acc", "adversary_key_loss", "adversary_key_acc")

def recommend_sft(config, teacher) -> None:
    """Say so where the teacher has not learned the data."""
    if config.teacher != "toy" and not hub.same_data(config.data, hub.trained_on(teacher.source)):
        print(f"note: the teacher was not fine-tuned on {config.data} by this script, as the papers do first:\n"
              f"      python train.py --method sft --student {config.teacher} --data {config.data} --lr 2e-5 --epochs "
              "3 --out_dir out/teacher\n"
              "      and then --teacher out/teacher")

def announce(config, run) -> None:
    """The run in one line."""
    parameters = sum(p.numel() for p in run.student.parameters())
    start = f", from step {run.state['step']}" if run.state["step"] else ""
    print(f"{config.method}: {config.teacher or 'no teacher'} → {config.student}, {parameters / 1e6:.1f}M parameters, "
          f"{len(run.examples)} rows, {run.total_steps} steps on {run.device}, into {run.out_dir}{start}")

def bad_step(config, record: dict, loss: float, norms: list[float]) -> str:
    """What is said of a step that is not taken. norms: of the gradient of the learners and, if any, the adversary."""
    norm = " and ".join(map(str, norms))
    whose = ", of the teacher’s answers" if config.method == "seqkd" else ""
    return (f"step {record['step']}: the loss is {loss} and the norm of its gradient {norm}; the step is not "
            f"taken. Its rows, from 0{whose}: {', '.join(map(str, record['skipped_rows']))}")

def step_record(config, run, totals: dict[str, float], grad_norm: float, lr: float, examples, n: dict[str, int],
                seconds: float, peak: float) -> dict:
    """A step's line of metrics.jsonl, but for its number: means over tokens of what was summed in totals; what is not
    finite is left out. peak: FLOP/s of all processes. Of a step in which the student answers for itself, the tokens of
    its answers stand in place of the operations."""
    tokens = sum(len(example.student.ids) for example in examples)
    n_l = n.get("labels", n["student"])
    values = {name: value / (n["teacher"] if name in OF_TEACHER else n_l if name in OF_DATA else n["student"])
              for name, value in totals.items()}
    values["grad_norm"] = grad_norm
    if "labels" in n:
        values["answer_tokens"] = n["student"]
    else:
        rate = step_flops(config, run.student, run.teacher, examples, cached=run.states is not None) / seconds
        values |= {"tflops": rate / 1e12, "mfu": rate / peak}
    if "t2s_acc" in values:
        values["leak"] = values["t2s_acc"] - values["teacher_acc"]          # above 0, z_t2s has seen what it predicts
    return {name: value for name, value in values.items() if math.isfinite(value)} | {
        "lr": lr, "tokens_per_second": tokens / seconds, "seconds": seconds}

def show(bar, record: dict) -> None:
    """A step more on the progress bar."""
    mfu = {"mfu": f"{100 * record['mfu']:.0f}%"} if "mfu" in record else {}
    bar.set_postfix(loss=f"{record.get('loss', math.nan):.3f}", tok_s=f"{record['tokens_per_second']:.0f}", **mfu,
                    refresh=False)
    bar.update()

@contextlib.contextmanager
def memory_told(config, run):
    """Around all of a run's computing: where memory does not suffice, say for what, and what needs less of it."""
    try:
        yield
    except Exception as error:
        if not hub.is_out_of_memory(error):
            raise
        shapes = " and ".join(f"{rows} × {tokens} {name.removesuffix('_ids')} tokens"
                              for name, (rows, tokens) in run.shapes.items())
        less = [f"--batch_size {config.batch_size // 2} --grad_accum {2 * config.grad_accum}"] * (config.batch_size > 1)
        less += ["--gradient_checkpointing"] * (not config.gradient_checkpointing)
        less += ["--cache_teacher"] * bool(config.teacher and config.method != "seqkd"
                                           and not (config.cache_teacher or config.on_policy))
        less += ["--lora_rank 64"] * (not config.lora_rank)
        raise InputError(f"out of memory on {run.device} in step {run.state.get('step', 0) + 1} with {shapes}; less is "
                         f"needed with {', '.join(less) or 'a shorter --max_length'}. {run.out_dir / 'last'}, where it "
                         "is there, is whole") from error

def leave(config, number: int, step: int, total_steps: int) -> None:
    """Exit as a program does that a signal ended, and say how to go on."""
    torchrun = "torchrun … " if parallel.world() > 1 else "python "
    # torchrun ends all processes when the first one leaves, which may still be saving
    parallel.barrier()
    if parallel.is_first():
        name = signal.Signals(number).name if number else "a signal"
        print(f"\nstopped by {name} after step {step} of {total_steps}, which is saved; go on with:\n"
              f"  {torchrun}train.py --out_dir {shlex.quote(config.out_dir)} --resume", flush=True)
    sys.exit(128 + (number or signal.SIGTERM))

def scores(of: dict[str, float]) -> str:
    return f"{of['bits_per_byte']:.3f} bits a byte, ROUGE-L {of['rouge_l']:.2f}"

def print_results(config, run, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table, then the commands that go on. results: model → split → its scores."""
    columns = {split: f"{split} ({len(rows)} of {len(run.rows[split])} rows)" for split, rows in run.scored.items()}
    print(f"\n{'bits a byte, ROUGE-L (greedy)':<32}" + "".join(f"{column:>26}" for column in columns.values()))
    for name, of in results.items():
        name = f"{name} {getattr(config, name, '')}"
        print(f"{name:<32.32}" + "".join(f"{x['bits_per_byte']:18.3f}{x['rouge_l']:8.2f}" for x in of.values()))
    teacher = str(toy.folder("teacher")) if config.teacher == "toy" else config.teacher
    teacher, data, out_dir = map(shlex.quote, (teacher, config.data, config.out_dir))
    if config.cache_teacher:
        print(f"\nthe teacher was not loaded; its score:  python eval_rouge.py {teacher} --data {data}")
    more = {"toy": toy.SETS, "dolly": hub.PAPER_SETS}.get(
        config.data, [config.data if "test" in columns else str(run.files["dev"])])
    print(f"\nscore it further:  python eval_rouge.py {out_dir} --data {shlex.join(more)} "
          f"--max_length {config.max_length} --max_prompt_length {config.max_prompt_length}")
    print(f"talk to it:        python sample.py {out_dir} \"your instruction\"")

def write_results(run, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """A run's last word: where results.json is there, everything else is."""
    with hub.atomic_write(run.out_dir / "results.json") as file:
        json.dump(results, file, indent=2)
