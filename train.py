"""Distil a teacher into a student that cuts text into other tokens.

    python train.py                                             # the toy: minutes, no download
    python train.py --teacher qwen --student gpt2               # the papers' pair, on Dolly; a GPU
    python train.py --teacher DIR --student DIR --data DIR --method byte_kd
    python train.py --method sft --student qwen                 # fine-tune the teacher first
    python train.py --out_dir out/NAME --resume                 # continue an interrupted run
    torchrun --nproc_per_node=8 train.py --batch_size 4 --grad_accum 8 --teacher …   # 8 GPUs

    total = (1 − α) · CE + α · KD + λ_GA · GA + λ_DTW · DTW     # methods/__init__.py: Objective

Defaults are near the papers'; a method, and the toy, may have others (methods/, toy.py)."""

import collections
import dataclasses
import json
import math
import os
import shlex
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import runtime.config  # first, so that Ctrl-C while starting is one line
import torch

from data import cache_folder, fingerprint_of_rows, read_splits, same_data, trained_on
from discriminator import ADVERSARIES
from eval_rouge import has_rouge_words, scores_of
from hub.download import check_name, fingerprint_of_model, hub_id, model_folder
from hub.model_config import ARCHITECTURES, read_fields
from methods import METHOD_OPTIONS, Method, Objective, find_method, method_file
from methods.divergences import DIVERGENCES
from model import load
from prompts import FORMATS, own_format
from runtime import distributed
from runtime.checkpoint import (
    FREE,
    Stop,
    append_metrics,
    best_scores,
    last_checkpoint,
    load_modules,
    load_optimizer,
    lock_run,
    read_metrics,
    refuse_changed,
    refuse_used,
    rewind_metrics,
    save_checkpoint,
    saved_settings,
    start_run,
    write_settings,
)
from runtime.config import InputError, checked, flag, given_flags, run_script
from runtime.distributed import autocast, keep_memory, pick_device, print_first
from runtime.files import atomic_write, fingerprint
from runtime.model_card import how_to_load, question_for, write_model_card
from runtime.progress import Progress
from runtime.report import check_report_to, make_reporter
from tokenize_align import (
    Example,
    collate,
    encode_rows,
    load_tokenizer,
    make_batches,
    same_vocabulary,
)

MAX_BAD_STEPS = 3  # in a row, and the run ends
MEMORY_INTERVAL = 20  # steps after which freed memory goes back to the system
SCORING_SEEDS = (10, 20, 30)  # of --select sampled
FEW = 0.02  # a larger share of rows that are cut is warned of


@dataclass
class Config:
    teacher: str = flag("", "A name, hub id or folder. Without both models: the toy's.", "models")
    student: str = flag("", "A name, hub id or folder.")
    student_init: str = flag(
        "pretrained", "The student's first weights.", choices=("pretrained", "random")
    )

    data: str = flag(
        "",
        "A set's name, a folder with train.jsonl and dev.jsonl, a file, or a hub id. Without it: "
        "dolly, or the toy's own.",
        "data",
    )
    prompt_format: str = flag(
        "auto",
        "How prompts are put. chat: in the model's own template; alpaca: in Alpaca's; raw: as they "
        "stand; auto: as the model was trained here, else chat where it has a template, else as "
        "the row says.",
        choices=FORMATS,
    )
    teacher_prompt_format: str = flag("", "The same for the teacher alone.", choices=("", *FORMATS))
    student_prompt_format: str = flag("", "The same for the student alone.", choices=("", *FORMATS))
    max_length: int = flag(512, "Tokens that prompt, response and EOS are cut to.", minimum=2)
    max_prompt_length: int = flag(256, "Tokens that prompts are cut to.", minimum=1)

    method: str = flag(
        "dskd_cma_ga",
        "A file of methods/, or the path of one of yours; of the toy byte_kd. Each may have other "
        "defaults than those below.",
        "method",
    )
    kd_rate: float = flag(0.5, "α, the share of distillation.", minimum=0, maximum=1)
    temperature: float = flag(2.0, "T of the divergences, τ of alm.", minimum=1e-3)
    divergence: str = flag(
        "forward_kl", "Distance between target and student.", choices=DIVERGENCES
    )
    adversary: str = flag("none", "What makes queries look like keys.", choices=ADVERSARIES)
    ga_weight: float = flag(0.1, "λ_GA, the weight of the adversary's term.", minimum=0)
    dtw_weight: float = flag(0.0, "λ_DTW, the weight of the soft-DTW terms.", minimum=0)
    projector_init: str = flag(
        "random",
        "The projectors' first weights; shared: by the tokens that both vocabularies have.",
        choices=("random", "shared"),
    )
    on_policy: float = flag(
        0.0, "Share of steps in which the student answers itself.", minimum=0, maximum=1
    )

    epochs: int = flag(20, "Passes over the training data.", "optimization", minimum=1)
    max_steps: int = flag(0, "Optimizer steps; 0: as --epochs says.", minimum=0)
    batch_size: int = flag(8, "Rows per forward pass, of about equal length.", minimum=1)
    grad_accum: int = flag(4, "Forward passes per step, of all processes together.", minimum=1)
    lr: float = flag(5e-4, "Peak learning rate; a cosine takes it to 1e-7.", minimum=0)
    projector_lr: float = flag(1e-3, "The same for the projectors.", minimum=0)
    ga_lr: float = flag(1e-3, "The same for the adversary; 0: it stays as drawn.", minimum=0)
    warmup_steps: int = flag(0, "Steps of linear warm-up.", minimum=0)
    weight_decay: float = flag(0.01, "AdamW's weight decay of matrices.", minimum=0)
    clip_grad: float = flag(1.0, "Gradients are clipped to this norm.", minimum=1e-6)
    lora_rank: int = flag(0, "Rank of LoRA matrices; 0: all weights learn.", minimum=0)
    lora_alpha: float = flag(8.0, "LoRA's scale is lora_alpha / lora_rank.", minimum=0)
    seed: int = flag(1, "Of first weights, the rows' order and dropout.", minimum=0)

    out_dir: str = flag("", "A new folder. Without it: one under out/.", "evaluation and saving")
    resume: bool = flag(
        False,
        "Continue the run in --out_dir, with its settings; a larger --epochs or --max_steps makes "
        "a finished run longer.",
    )
    cache_dir: str = flag(
        "",
        "Where the toy, downloads and the teacher's states and answers are kept. Without it: "
        "data/, and beside the data.",
    )
    eval_interval: int = flag(0, "Steps between scorings of dev; 0: an epoch.", minimum=0)
    eval_num: int = flag(100, "Rows of dev and test that are scored; 0: all.", minimum=0)
    select: str = flag(
        "rouge",
        "The dev score that chooses the best checkpoint: ROUGE-L of greedy or of sampled answers, "
        "or bits per byte.",
        choices=("rouge", "sampled", "bits"),
    )
    answers: bool = flag(
        False, "Score ROUGE-L of answers with --select bits too, which takes longer."
    )
    save_interval: int = flag(0, "Steps between checkpoints; 0: at every scoring.", minimum=0)
    report_to: str = flag("", "Where metrics.jsonl goes too.", choices=("", "tensorboard", "wandb"))

    device: str = flag("auto", "Where to train.", "machine", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "auto: bfloat16 on GPUs that have it, else float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = flag(False, "torch.compile both models.")
    gradient_checkpointing: bool = flag(False, "Recompute the student's layers: less memory.")
    cache_teacher: bool = flag(False, "Write what is read of the teacher to disk, once.")
    shard: str = flag(
        "none",
        "Models whose layers are spread over torchrun's processes.",
        choices=("none", "student", "teacher", "both"),
    )


def read_settings(argv: list[str] | None = None) -> Config:
    """The command line, over the method's defaults, the toy's for the toy; or a run's settings on
    --resume. Raises InputError for what does not go together."""
    given = given_flags(Config, __doc__, argv)
    for name in ("teacher", "student", "data"):  # the run's folder may be read from elsewhere
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    if given.get("method", "").endswith(".py"):
        given["method"] = str(Path(given["method"]).resolve())
    if given.get("cache_dir"):
        given["cache_dir"] = str(Path(given["cache_dir"]).resolve())
    if given.get("resume"):
        config = resumed_settings(given)
    else:
        config = new_settings(given)
    method = find_method(config.method)
    if "epochs" in given and config.max_steps:
        raise InputError(f"--epochs: has no use beside --max_steps {config.max_steps}")
    if config.teacher and not method.needs_teacher:
        raise InputError(f"--method {config.method} has no teacher: the --student learns alone")
    if method.needs_teacher and not config.teacher:
        raise InputError(f"--method {config.method} needs a --teacher")
    if not config.student:
        raise InputError("--teacher without --student: name the student too")
    for name in METHOD_OPTIONS:
        if name in given and name not in method.uses:
            raise InputError(
                f"--{name}: --method {config.method} does not use it (it uses: "
                f"{', '.join(method.uses) or 'none of the kind'})"
            )
    for name in ("ga_weight", "ga_lr"):
        if name in given and config.adversary == "none":
            raise InputError(f"--{name}: there is no --adversary")
    if "lora_alpha" in given and not config.lora_rank:
        raise InputError("--lora_alpha: has no use without --lora_rank")
    if config.lora_rank and config.student_init == "random":
        raise InputError("--lora_rank: keeps the student's weights, so they cannot be random")
    if config.cache_teacher and config.shard in ("teacher", "both"):
        raise InputError("--cache_teacher: leaves no teacher's layers that --shard could spread")
    if config.on_policy and (config.cache_teacher or config.shard != "none"):
        raise InputError(
            "--on_policy: the student's answers are new in every step, so it works "
            "neither with --cache_teacher nor with --shard"
        )
    if config.compile and (config.shard != "none" or config.gradient_checkpointing):
        raise InputError("--compile: works neither with --shard nor --gradient_checkpointing")
    return config


def new_settings(given: dict) -> Config:
    is_toy = given.get("student", "toy") == "toy" and given.get("teacher", "toy") == "toy"
    if is_toy and not given.get("data", "toy").startswith("toy"):
        raise InputError(f"--data {given['data']}: name a --student, and a --teacher, for it")
    defaults = {"data": "dolly"}
    if is_toy:
        import toy

        defaults = {"student": "toy", "data": "toy"} | toy.TRAINING
    name = given.get("method", defaults.get("method", Config.method))
    method = find_method(name)
    if is_toy and method.needs_teacher:
        defaults["teacher"] = "toy"
    defaults |= method.defaults
    return checked(Config, defaults | given)


def resumed_settings(given: dict) -> Config:
    if "out_dir" not in given:
        raise InputError("--resume: name the run's --out_dir")
    saved = saved_settings(Path(given["out_dir"]))
    fields = Config.__dataclass_fields__
    unknown = sorted(saved.keys() - fields.keys())
    if unknown:
        raise InputError(
            f"--resume: the run was made by another version of train.py, which had "
            f"--{', --'.join(unknown)}"
        )
    for name, value in given.items():
        if name not in FREE and value != saved.get(name):
            raise InputError(
                f"--resume: the run has --{name} {saved.get(name)}, not {value}; leave it out"
            )
    return checked(Config, saved | {name: given[name] for name in FREE if name in given})


def main(argv: list[str] | None = None) -> None:
    # ------------------------------------------------------------------------------------- set up
    config = read_settings(argv)
    if config.cache_dir:
        os.environ["NANODSKD_CACHE"] = config.cache_dir
    method = find_method(config.method)
    device, dtype = pick_device(config.device, config.dtype)
    config.dtype = str(dtype).removeprefix("torch.")
    distributed.init(device)
    world_size = distributed.world_size()
    if config.grad_accum % world_size:
        raise InputError(
            f"--grad_accum {config.grad_accum}: must be a multiple of the "
            f"{world_size} processes"
        )
    if config.shard != "none" and world_size == 1:
        raise InputError("--shard: start with torchrun --nproc_per_node=N train.py …")
    if device == "cpu":
        keep_memory()
    check_report_to(config.report_to)
    for name in (config.teacher, config.student):
        if name and name != "toy":
            check_name(name)
    if config.out_dir and distributed.is_first():
        if config.resume:
            lock_run(Path(config.out_dir))
        else:
            refuse_used(Path(config.out_dir))

    # data: rows of train, dev and, where there is one, test
    if "toy" in (config.student, config.teacher) or config.data.startswith("toy"):
        import toy

        with distributed.first_goes_first():
            toy.prepare_for(config)
    with distributed.first_goes_first():
        rows = read_splits(config.data, config.seed)
    scored = {
        split: rows[split][: config.eval_num or None] for split in ("dev", "test") if split in rows
    }
    num_unanswered = sum(not row.outputs for row in rows["train"])
    if num_unanswered:
        print_first(f"note: {config.data}: {num_unanswered} training rows have no answer")
    if num_unanswered and not method.needs_teacher:
        raise InputError(
            f"--data {config.data}: {num_unanswered} training rows have no output, and --method "
            f"{config.method} has no teacher that answers them"
        )
    select = config.select
    if select != "bits" and not has_rouge_words(scored["dev"]):
        print_first(
            "note: ROUGE-L counts words of a-z and 0-9, and no dev answer has one; so bits per "
            "byte choose the best"
        )
        select = "bits"
    scoring_seeds = SCORING_SEEDS if select == "sampled" else ()
    with_answers = config.answers or select != "bits"

    # models: the student, the frozen teacher, and what learns beside the student
    torch.manual_seed(config.seed)
    checkpoint = None
    if config.resume:
        with distributed.first_goes_first():
            checkpoint = last_checkpoint(Path(config.out_dir))
    student, student_tokenizer = load_student(config, checkpoint, device, dtype)
    if student_tokenizer.prompt_format == "auto":
        student_tokenizer.prompt_format = own_format(rows["train"])
    teacher, teacher_tokenizer = None, student_tokenizer
    if method.needs_teacher:
        keep_layers = not config.cache_teacher or num_unanswered > 0
        teacher, teacher_tokenizer = load_teacher(config, device, dtype, keep_layers)
    check_pair(config, method, student, teacher, student_tokenizer, teacher_tokenizer)
    if method.one_vocabulary and student_tokenizer.eos_id != teacher_tokenizer.eos_id:
        exchange_ends(teacher, teacher_tokenizer, student_tokenizer)
    modules = {}
    if method.make_modules:
        modules = method.make_modules(config, student.config, teacher.config)
    for module in modules.values():
        module.to(device)
    if config.projector_init == "shared" and not checkpoint:
        from methods.projector_init import init_from_shared, shared_tokens

        pairs = shared_tokens(student_tokenizer, teacher_tokenizer)
        init_from_shared(modules["projectors"], student, teacher, pairs)
    if "adversary" in modules:
        modules["adversary"].requires_grad_(config.ga_lr > 0)

    # examples: the training rows in both tokenizations
    if method.answered_by_teacher or num_unanswered:
        from runtime.teacher_answers import teacher_rows

        with autocast(device, dtype):
            rows["train"] = teacher_rows(
                config,
                rows["train"],
                cache_folder(config.data),
                teacher,
                teacher_tokenizer,
                method.answered_by_teacher,
            )
    trains_with_teacher = method.needs_teacher and not method.answered_by_teacher
    tokenizers = student_tokenizer, student_tokenizer
    if trains_with_teacher:
        tokenizers = student_tokenizer, teacher_tokenizer
    pads = tokenizers[0].eos_id, tokenizers[1].eos_id  # nothing looks at padding
    examples, num_cut, num_dropped = encode_rows(
        rows["train"], *tokenizers, config.max_length, config.max_prompt_length
    )
    num_short = sum(
        rows["train"][e.row].ended
        and (e.student.ids[-1] != tokenizers[0].eos_id or e.teacher.ids[-1] != tokenizers[1].eos_id)
        for e in examples
    )
    if num_cut or num_short or num_dropped:
        few = num_cut + num_short + num_dropped <= FEW * len(rows["train"])
        print_first(
            f"{'note' if few else 'WARNING'}: {config.data}, train, {len(rows['train'])} rows: "
            f"{num_cut} prompts cut to --max_prompt_length {config.max_prompt_length}, {num_short} "
            f"answers to --max_length {config.max_length}, {num_dropped} rows dropped, whose "
            "prompt leaves no room for an answer"
        )
    if not examples:
        raise InputError(
            f"--data {config.data}: no row has a response token within --max_length "
            f"{config.max_length}"
        )
    extras = None
    if method.batch_extras:
        extras = method.batch_extras(*tokenizers, examples)
    states = None
    if config.cache_teacher:
        from runtime.teacher_states import TeacherStates

        folder = cache_folder(config.data)
        states = TeacherStates(config, folder, teacher, examples, dtype, extras)
        with autocast(device, dtype):
            states.fill(teacher if keep_layers else None, config.batch_size, pads[1], device)
        teacher.drop_layers()
        print_first(f"what the teacher says to the training rows: {states.path}")
    if config.compile:
        for decoder in filter(None, (student, teacher)):
            decoder.compile(dynamic=True)

    # what the run is made of: another run of the same settings would go another way
    made_of = {"data": fingerprint_of_rows(rows["train"] + rows["dev"])}
    if teacher is not None:
        made_of["teacher"] = fingerprint_of_model(teacher.source)
    made_of["student"] = fingerprint_of_model(
        student_tokenizer.folder, weights=config.student_init == "pretrained"
    )
    made_of["method"] = fingerprint(method_file(config.method))

    # the optimizer, the run's folder, an earlier checkpoint
    optimizer = torch.optim.AdamW(parameter_groups(config, student, modules), fused=True)
    if distributed.is_first() and not config.resume:
        start_run(config)
    config.out_dir = distributed.gather(config.out_dir)[0]
    out_dir = Path(config.out_dir)
    is_folder = Path(config.student).is_dir()
    state = {
        "step": 0,
        "best_dev_rouge_l": -1.0,
        "best_dev_bits_per_byte": math.inf,
        "data": config.data,
        "method": config.method,
        "student": str(student_tokenizer.folder) if is_folder else hub_id(config.student),
        "prompt_format": student_tokenizer.prompt_format,
        "eos_ids": student_tokenizer.eos_ids,
        "made_of": made_of,
    }
    if distributed.rank():
        torch.manual_seed(config.seed + 1_000_003 * distributed.rank())  # dropout differs
    if checkpoint:
        load_modules(checkpoint, modules)
        load_optimizer(checkpoint, optimizer)
        state = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        refuse_changed(out_dir, state.get("made_of", {}), made_of)
        state |= best_scores(out_dir, state["step"])
    else:
        distributed.broadcast_weights(list(modules.values()))
        if config.shard not in ("student", "both"):
            distributed.broadcast_weights([student])
    first_step = state["step"]
    rows_per_step = config.batch_size * config.grad_accum
    steps_per_epoch = math.ceil(len(examples) / rows_per_step)
    tokens_per_step = sum(len(e.student.response_ids) for e in examples) / steps_per_epoch
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    if total_steps < first_step:
        raise InputError(f"--resume: the run has taken {first_step} steps, more than {total_steps}")
    eval_interval = config.eval_interval or steps_per_epoch

    def is_scored(step):
        return step > 0 and (step % eval_interval == 0 or step == total_steps)

    if config.resume and distributed.is_first():
        rewind_metrics(out_dir, first_step, is_scored(first_step))
        write_settings(config, out_dir)  # --epochs may be another
    save_interval = config.save_interval or eval_interval
    adversary = modules.get("adversary")
    adversary_parameters = trainable(adversary)
    learners = trainable(student, *(m for m in modules.values() if m is not adversary))
    num_parameters = sum(p.numel() for p in trainable(student))
    formats = student_tokenizer.prompt_format
    if teacher is not None:
        formats += f", the teacher's {teacher_tokenizer.prompt_format}"
    print_first(
        f"{config.method}: {config.teacher or 'no teacher'} → {config.student}, "
        f"{num_parameters / 1e6:.1f}M parameters learn, {len(examples)} rows (prompts: {formats}), "
        f"steps {first_step} to {total_steps} on {device}, into {out_dir}"
    )

    # --------------------------------------------------------------------------------------- train
    launcher = "torchrun …" if world_size > 1 else "python"
    script = shlex.quote(sys.argv[0])  # as it was called, from wherever that was
    stop = Stop(
        f"continue with:  {launcher} {script} --out_dir {shlex.quote(str(out_dir.resolve()))} "
        "--resume"
    )

    def score(decoder, tokenizer, split, desc):
        with autocast(device, dtype), stop.at_once():
            return scores_of(
                decoder,
                tokenizer,
                scored[split],
                config.max_length,
                config.max_prompt_length,
                desc,
                scoring_seeds,
                with_answers,
            )

    report = make_reporter(config, out_dir)
    progress = Progress(total_steps, "training", "step", first_step, parts=20)
    recent = collections.deque(maxlen=50)  # losses: a single one says little
    bad_steps = 0
    for step in range(first_step, total_steps + 1):
        # save and score where that is due; what is saved is scored again after an interruption
        finished = step == total_steps
        eval_due = is_scored(step)
        leaving = stop.in_any_process()
        save_due = eval_due or step % save_interval == 0 or leaving
        state["step"] = step
        if save_due and step > first_step and (bad_steps == 0 or leaving):
            save_checkpoint(out_dir / "last", student, modules, optimizer, state)
        if leaving:
            distributed.barrier()  # the first process has saved
            stop.leave()
        if eval_due:
            scores = score(student, student_tokenizer, "dev", "scoring dev")
            print_first(f"step {step:>6}   dev: {in_words(scores)}")
            record = {"step": step} | {f"dev_{k}": v for k, v in scores.items()}
            append_metrics(out_dir, record)
            report(record)
            best = {name: state[f"best_dev_{name}"] for name in scores}
            if goodness(scores, select) > goodness(best, select):
                state |= {f"best_dev_{name}": value for name, value in scores.items()}
                save_checkpoint(out_dir / "best", student, modules, None, state)
        if step % MEMORY_INTERVAL == 0:
            distributed.give_memory_back()
        if finished:
            break

        # the step's rows, of all processes, and how many tokens they have
        started = time.perf_counter()
        epoch, number = divmod(step, steps_per_epoch)
        if number == 0 or step == first_step:
            batches = make_batches(examples, rows_per_step, config.seed * 1_000_003 + epoch)
        step_examples = batches[number]
        num_student_tokens = sum(len(e.student.response_ids) for e in step_examples)
        num_teacher_tokens = sum(len(e.teacher.response_ids) for e in step_examples)
        step_weight = num_student_tokens / tokens_per_step  # a token weighs the same in every step
        objective = Objective(config, step, num_student_tokens, num_teacher_tokens)
        passes = [
            (method.loss, objective, part, weight)
            for part, weight in forward_passes(config, step_examples)
        ]
        if config.on_policy:
            from runtime.on_policy import is_on_policy, on_policy_passes

            if is_on_policy(config, step):
                with autocast(device, dtype):
                    passes = on_policy_passes(config, passes, student, tokenizers, rows["train"])

        # forward and backward
        student.train()
        sums = {}
        for loss_function, of_pass, part, weight in passes:
            batch = {name: tensor.to(device) for name, tensor in collate(part, *pads).items()}
            if extras:
                batch |= extras(part, device)
            if states:
                batch[states.kept.name] = states.of(part).to(device)
            with autocast(device, dtype):
                loss, terms = loss_function(batch, student, teacher, modules, of_pass)
            (step_weight * weight * loss).backward()
            for name, value in (terms | {"loss": loss.detach()}).items():
                sums[name] = sums.get(name, 0) + weight * value.float()

        # the update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak_lr"], step, config.warmup_steps, total_steps)
        norms = []
        for parameters in filter(None, (learners, adversary_parameters)):
            norms.append(sum_and_clip_gradients(parameters, config.clip_grad))
        totals = distributed.all_reduce(torch.stack(list(sums.values()))).tolist()
        norms = torch.stack(norms).tolist()
        record = dict(zip(sums, totals)) | {"grad_norm": norms[0]}
        if all(map(math.isfinite, totals + norms)):
            optimizer.step()
            bad_steps = 0
        else:
            bad_steps += 1
            skipped = sorted(example.row for example in step_examples)
            print_first(
                f"step {step + 1}: the loss is {record['loss']}, its gradient's norm "
                f"{record['grad_norm']}; the step is not taken. Its rows, counted from 0 among "
                f"those that are trained on: {skipped}"
            )
            record = {"skipped_rows": skipped}
        optimizer.zero_grad(set_to_none=True)

        # the log
        seconds = time.perf_counter() - started
        num_tokens = sum(len(example.student.ids) for example in step_examples)
        record = {
            "step": step + 1,
            **record,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_second": num_tokens / seconds,
            "seconds": seconds,
        }
        append_metrics(out_dir, record)
        report(record)
        if "loss" in record:
            recent.append(record["loss"])
        mean_loss = sum(recent) / max(1, len(recent))
        progress.update(
            1,
            f"loss {mean_loss:.3f} (mean of {len(recent)} steps), "
            f"{record['tokens_per_second']:,.0f} tokens/s",
        )
        if bad_steps == MAX_BAD_STEPS:
            raise InputError(
                f"{MAX_BAD_STEPS} steps in a row, up to step {step + 1}, had a loss "
                "or gradient that is not finite; try a lower --lr, a longer "
                f"--warmup_steps or --dtype float32 in a new run. {out_dir / 'last'} "
                "holds the last good checkpoint, where there was one"
            )
    progress.close()
    distributed.barrier()  # best/ is there

    # ------------------------------------------------------------------------- score and conclude
    optimizer = modules = adversary = student = learners = adversary_parameters = loss = None
    best = {name: state[f"best_dev_{name}"] for name in scores}
    print_first(f"best on dev: {out_dir / 'best'} ({in_words(best)}); now the models are scored")
    results = {}
    for name, decoder, tokenizer in models_to_score(
        config, out_dir, teacher, teacher_tokenizer, student_tokenizer, device, dtype
    ):
        results[name] = {
            split: score(decoder, tokenizer, split, f"{name}: {split}") for split in scored
        }
        teacher = decoder = None  # memory for the next
    if distributed.is_first():
        answers = "sampled" if scoring_seeds else "greedy"
        prompt_format = student_tokenizer.prompt_format
        with atomic_write(out_dir / "results.json") as file:
            json.dump(results, file, indent=2)
        print_results(config, results, rows, scored, out_dir, prompt_format, answers)


# ------------------------------------------------------------------------------------------ models


def folder_of(config, side: str, weights: bool = True) -> Path:
    """The folder of the "student" or the "teacher", downloaded where it must be."""
    name = getattr(config, side)
    if name == "toy":
        import toy

        return toy.model_folder(side)
    with distributed.first_goes_first():
        return model_folder(name, weights)


def load_decoder(config, side: str, folder, dtype, device, change=None, **how):
    """model.load, or with --shard its sharded form. change: a function of the decoder that is
    called before it is sharded. how: load's other arguments."""
    if config.shard in (side, "both"):
        from runtime.sharding import load_sharded

        return load_sharded(folder, dtype, device, change, **how)
    decoder = load(folder, dtype=dtype, device=device, **how)
    if change:
        change(decoder)
    return decoder


def load_student(config, checkpoint, device, dtype):
    """The student, as the checkpoint to resume from has it, and its tokenizer."""
    folder = folder_of(config, "student", weights=config.student_init == "pretrained")
    _, architecture = read_fields(folder / "config.json")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"--student {config.student}: its architecture, {architecture}, is not written here, "
            "so it can only teach"
        )
    if config.lora_rank:
        from runtime import lora

        def change(decoder):
            lora.add_lora(decoder, config.lora_rank, config.lora_alpha)
            if checkpoint and not decoder.embed.weight.is_meta:
                lora.load_adapter(checkpoint / "adapter", decoder)

        if config.shard in ("student", "both"):
            dtype = torch.float32  # FSDP wants one type in a layer, and LoRA's is float32
        student = load_decoder(config, "student", folder, dtype, device, change)
    elif checkpoint:
        student = load_decoder(config, "student", checkpoint, torch.float32, device)
    else:
        student = load_decoder(
            config, "student", folder, torch.float32, device, init=config.student_init
        )
    student.gradient_checkpointing = config.gradient_checkpointing
    return student, load_tokenizer(folder, config.student_prompt_format or config.prompt_format)


def load_teacher(config, device, dtype, layers: bool):
    """The frozen teacher and its tokenizer."""
    folder = folder_of(config, "teacher")
    _, architecture = read_fields(folder / "config.json")
    if not config.resume and architecture in ARCHITECTURES:
        learned = trained_on(folder)
        if learned is None:
            print_first(
                f"note: the teacher was not fine-tuned on {config.data} by this script, as the "
                "papers do first:  python train.py --method sft --student "
                f"{shlex.quote(config.teacher)} --data {shlex.quote(config.data)} --lr 2e-5 "
                "--epochs 3 --out_dir out/teacher"
            )
        elif not same_data(config.data, learned):
            print_first(f"note: the teacher was fine-tuned on {learned}, not on {config.data}")
    teacher = load_decoder(config, "teacher", folder, dtype, device, layers=layers)
    tokenizer = load_tokenizer(folder, config.teacher_prompt_format or config.prompt_format)
    return teacher.requires_grad_(False), tokenizer


def check_pair(
    config, method: Method, student, teacher, student_tokenizer, teacher_tokenizer
) -> None:
    """Raise InputError where models, tokenizers, limits and method do not go together."""
    sides = [(f"--student {config.student}", student, student_tokenizer)]
    if teacher is not None:
        sides.append((f"--teacher {config.teacher}", teacher, teacher_tokenizer))
    for name, decoder, tokenizer in sides:
        if tokenizer.vocab_size > decoder.config.vocab_size:
            raise InputError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
                f"vocabulary only {decoder.config.vocab_size}"
            )
        if config.max_length > decoder.config.max_positions:
            raise InputError(
                f"--max_length {config.max_length}: {name} has only "
                f"{decoder.config.max_positions} positions; pass --max_length "
                f"{decoder.config.max_positions} or less"
            )
    if method.one_vocabulary and not same_vocabulary(student_tokenizer, teacher_tokenizer):
        raise InputError(
            f"--method {config.method}: needs one vocabulary, but the tokenizers of "
            f"{config.teacher} and {config.student} are different, or in different files' forms"
        )


@torch.no_grad()
def exchange_ends(teacher, teacher_tokenizer, student_tokenizer) -> None:
    """Rename what ends the teacher's answers, so that in one vocabulary EOS meets EOS: its logits
    of its own EOS and of the student's change places."""
    ours, theirs = student_tokenizer.eos_id, teacher_tokenizer.eos_id
    if ours >= len(teacher.head.weight):
        raise InputError(f"the teacher's vocabulary lacks the student's end token {ours}")
    weight = teacher.head.weight.detach().clone()
    weight[[ours, theirs]] = weight[[theirs, ours]]
    teacher.head.weight = torch.nn.Parameter(weight, requires_grad=False)
    teacher_tokenizer.eos_id = ours
    teacher_tokenizer.eos_ids = [ours]


# ------------------------------------------------------------------------------------ optimization


def trainable(*modules) -> list[torch.Tensor]:
    return [
        p
        for module in modules
        if module is not None
        for p in module.parameters()
        if p.requires_grad
    ]


def parameter_groups(config, student, modules: dict) -> list[dict]:
    """AdamW's groups: each module's matrices (decayed) and its vectors (not). `names` are the
    parameters' in checkpoints."""
    learning_rates = {"student": config.lr, "adversary": config.ga_lr}
    groups = {}
    for module_name, module in {"student": student, **modules}.items():
        lr = learning_rates.get(module_name, config.projector_lr)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            # One kernel updates a group: sharded and whole tensors are kept apart.
            key = module_name, decay, type(parameter)
            if key not in groups:
                groups[key] = dict(params=[], names=[], lr=lr, peak_lr=lr, weight_decay=decay)
            groups[key]["params"].append(parameter)
            groups[key]["names"].append(f"{module_name}.{name}")
    return list(groups.values())


def learning_rate(peak: float, step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to 1e-7 at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    lowest = min(peak, 1e-7)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


def forward_passes(config, examples: list[Example]) -> list[tuple[list[Example], float]]:
    """This process's part of a step: rows of a forward pass, and its weight. The rows of a pass are
    about equally long, so that little is padded. The weight is 0 where nothing is left for this
    process, which then takes part only because the others need it."""
    ordered = sorted(examples, key=lambda example: len(example.student.ids))
    size = math.ceil(len(ordered) / config.grad_accum)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    world_size = distributed.world_size()
    mine = range(distributed.rank(), math.ceil(len(parts) / world_size) * world_size, world_size)
    return [(parts[k % len(parts)], float(k < len(parts))) for k in mine]


def sum_and_clip_gradients(parameters: list[torch.Tensor], largest: float) -> torch.Tensor:
    """Sum the gradients over processes and clip them together → their norm before clipping."""
    sharded = [p for p in parameters if hasattr(p, "full_tensor")]  # FSDP has added these
    distributed.all_reduce_gradients([p for p in parameters if not hasattr(p, "full_tensor")])
    if sharded:
        from runtime import sharding

        return sharding.clip_gradients(parameters, largest)
    return torch.nn.utils.clip_grad_norm_(parameters, largest)


def goodness(scores: dict[str, float], select: str) -> tuple[float, ...]:
    """The larger, the better a checkpoint. Bits per byte decide between equal ROUGE-L."""
    if select == "bits":
        return (-scores["bits_per_byte"],)
    return scores["rouge_l"], -scores["bits_per_byte"]


# ------------------------------------------------------------------------------------- conclusions


def models_to_score(config, out_dir, teacher, teacher_tokenizer, student_tokenizer, device, dtype):
    """(name, model, tokenizer) of the rows of the final table, loaded one after the other."""
    if teacher is not None and not config.cache_teacher:
        yield "teacher", teacher, teacher_tokenizer
        teacher = None
    if config.student_init == "pretrained":
        in_type = dtype if config.lora_rank else torch.float32  # as it was trained
        folder = folder_of(config, "student")
        yield "student, before", load_decoder(
            config, "student", folder, in_type, device
        ), student_tokenizer
    if config.student == "toy" and config.method != "sft":
        import toy

        yield "student, after sft", load(toy.model_folder("sft"), device=device), student_tokenizer
    best, _ = load_student(config, out_dir / "best", device, dtype)
    yield "student", best, student_tokenizer


def in_words(scores: dict[str, float]) -> str:
    text = f"{scores['bits_per_byte']:.3f} bits per byte"
    return text + (f", ROUGE-L {scores['rouge_l']:.2f}" if "rouge_l" in scores else "")


def command_of(config) -> str:
    """The command line that gives a run's settings, in a new folder."""
    named = {name: getattr(config, name) for name in ("teacher", "student", "data", "method")}
    usual = new_settings({name: value for name, value in named.items() if value})
    words = ["python", "train.py"]
    for field in dataclasses.fields(Config):
        name, value = field.name, getattr(config, field.name)
        changed = value != getattr(usual, name) or named.get(name)
        if changed and name not in ("out_dir", "resume", "cache_dir"):
            words += [f"--{name}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def print_results(
    config,
    results: dict,
    rows: dict,
    scored: dict,
    out_dir: Path,
    prompt_format: str,
    answers: str,
) -> None:
    """The table, the pictures, the model card, and the commands that come next. answers: how those
    were drawn whose ROUGE-L it is."""
    title = "bits per byte"
    if "rouge_l" in results["student"]["dev"]:
        title += f", ROUGE-L ({answers})"
    print(f"\n{title:<32}", end="")
    for split in scored:
        column = f"{split} ({len(scored[split])} of {len(rows[split])} rows)"
        print(f"{column:>26}", end="")
    for name, by_split in results.items():
        print(f"\n{name:<32}", end="")
        for scores in by_split.values():
            rouge = f"{scores['rouge_l']:8.2f}" if "rouge_l" in scores else " " * 8
            print(f"{scores['bits_per_byte']:18.3f}{rouge}", end="")
    from pictures import runs

    split = "test" if "test" in scored else "dev"
    runs.results(
        out_dir / "results.png",
        f"{out_dir}, {len(scored[split])} rows of {split}",
        {name: by_split[split] for name, by_split in results.items()},
    )
    runs.curves(out_dir / "curves.png", str(out_dir), read_metrics(out_dir))
    num_rows = {split: len(scored[split]) for split in scored}
    write_model_card(out_dir / "best", config, command_of(config), prompt_format, results, num_rows)
    folder = shlex.quote(str(out_dir))
    print("\n")
    if split == "test":
        print(
            f"score it further:  python eval_rouge.py {folder} --data {shlex.quote(config.data)} "
            f"--max_length {config.max_length} --max_prompt_length {config.max_prompt_length}"
        )
    print(
        f'talk to it:        python sample.py {folder} "{question_for(config.data)}"'
        f"\npictures:          {out_dir}/results.png, {out_dir}/curves.png"
    )
    if config.teacher:
        print(f"look closer:       python probe.py {folder}")
    print(f"load {out_dir / 'best'}, the best checkpoint, anywhere ({out_dir / 'best/README.md'}):")
    lines = how_to_load((out_dir / "best").resolve(), prompt_format, config.data)
    print(textwrap.indent(lines, "    "))


if __name__ == "__main__":
    run_script(main)
