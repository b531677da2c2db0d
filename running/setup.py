"""From settings to a run that is ready for its first step: data, models, caches, the folder, an earlier checkpoint."""
import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import toy
from files import hub
from files.config import InputError
from files.rows import Row, read_rows
from methods import fused, projector_init
from methods.alm import ChunkNumbers
from methods.byte_kd import BytePaths
from methods.mined import MinED, token_strings
from methods.table import WITHOUT_KD, make_modules
from methods.uld import CommonPositions
from model import Decoder, load, shape_of
from running import cache, lora, parallel, report
from running.answers import teacher_rows, tell_cut_prompts
from running.checkpoint import last_checkpoint, load_checkpoint
from running.checks import check_machine, check_pair, same_vocabulary
from running.generation import compile_steps
from running.run_folder import Stop, check_out_dir, keep_metrics, locked, start_run
from tokenize_align import Example, Tokenizer, encode_rows, load_tokenizer

@dataclass
class Run:
    """All that a run has beside its settings."""
    device: str
    dtype: torch.dtype
    out_dir: Path
    files: dict[str, Path]                      # "train", "dev" and, where there is one, "test"
    rows: dict[str, list[Row]]                  # the same
    scored: dict[str, list[Row]]                # of dev and test what --eval_num leaves
    folders: dict[str, Path]                    # "student" and, where there is one, "teacher"
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)
    cut_by: tuple[Tokenizer, ...] = ()          # the two that cut what is learned from; one twice for one vocabulary
    student: Decoder | None = None
    teacher: Decoder | None = None
    projectors: torch.nn.Module | None = None
    adversary: torch.nn.Module | None = None
    last: Path | None = None                    # the checkpoint to go on from
    examples: list[Example] = field(default_factory=list)
    # what else a batch needs to bring the two sides together
    pairing: MinED | BytePaths | ChunkNumbers | CommonPositions | None = None
    states: cache.TeacherStates | None = None
    looked_at: list[Example] = field(default_factory=list)      # dev rows for --probe_interval
    steps_per_epoch: int = 0
    total_steps: int = 0
    state: dict = field(default_factory=dict)   # what training.json holds: step, best_dev_rouge_l, bad_steps …
    stop: Stop | None = None                    # signals
    shapes: dict = field(default_factory=dict)  # of the step's largest forward pass, should memory not suffice for it

    def autocast(self):
        return hub.autocast(self.device, self.dtype)

    @property
    def pads(self) -> tuple[int, int]:
        """What fills up rows, student's and teacher's: EOS, which nothing looks at."""
        return self.tokenizers["student"].eos_id, self.tokenizers.get("teacher", self.tokenizers["student"]).eos_id

def set_up(config, stack: contextlib.ExitStack) -> Run:
    """Everything before the optimizer. stack keeps the folder's lock. config: train.Config; a new run's out_dir is
    filled in. Nothing is written into out_dir before everything else has been found good."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device, dtype = hub.pick_device(config.device, config.dtype)
    if config.resume and dtype != (usual := hub.pick_device(config.device, "auto")[1]):
        print(f"note: going on in {config.dtype}, as the run began; this machine's own choice is {usual}, see --dtype")
    config.dtype = str(dtype).removeprefix("torch.")
    check_machine(config, device)
    if device == "cpu":
        keep_memory()
    run = find_inputs(config, device, dtype)
    if config.resume:
        if parallel.is_first():
            stack.enter_context(locked(run.out_dir))
            run.last = last_checkpoint(run.out_dir)
        run.last = parallel.gather(run.last)[0]
    load_models(config, run)
    load_examples(config, run)
    fused.compiling = config.compile and device == "cuda"
    if config.compile:
        for decoder in filter(None, (run.student, run.teacher)):
            decoder.compile(dynamic=True)
            if device == "cuda":
                compile_steps(decoder)
    if not config.resume and parallel.is_first():
        run.out_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(run.out_dir))
        start_run(config, run.out_dir)
    parallel.equal_weights(None if config.shard_student else run.student, run.projectors, run.adversary)
    if config.shard_student:
        parallel.shard(run.student, device)
    if config.shard_teacher:
        parallel.shard(run.teacher, device)
    if parallel.rank():
        torch.manual_seed(config.seed + 1_000_003 * parallel.rank())        # dropout differs between processes
    run.steps_per_epoch = math.ceil(len(run.examples) / (config.batch_size * config.grad_accum))
    run.total_steps = config.max_steps or config.epochs * run.steps_per_epoch
    return run

def keep_memory() -> None:
    """Let glibc keep what tensors give back, for the next ones. Else it hands large pieces to the system and asks for
    them again, whose pages are cleared anew each time: a fifth of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)      # M_MMAP_MAX: no piece of memory is a mapping of its own
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: nothing goes back

def find_inputs(config, device: str, dtype: torch.dtype) -> Run:
    """Data and model folders, downloaded or made where they are not there yet, and where the run will write."""
    names = {side: getattr(config, side) for side in ("student", "teacher") if getattr(config, side)}
    with parallel.first_goes_first():
        toy.write_data_for([config.data])
        files = {split: hub.data_file(config.data, split, required=split != "test")
                 for split in ("train", "dev", "test")}
        with_weights = {"student": config.student_init == "pretrained", "teacher": True}
        folders = {side: toy.folder(side) if name == "toy" else hub.model_dir(name, with_weights[side])
                   for side, name in names.items()}
    files = {split: file for split, file in files.items() if file}
    rows = {split: read_rows(file) for split, file in files.items()}
    out_dir = check_out_dir(config, [*files.values(), *folders.values()])
    with parallel.first_goes_first():
        toy.prepare_for(config)
    scored = {split: rows[split][:config.eval_num or None] for split in ("dev", "test") if split in rows}
    return Run(device, dtype, out_dir, files, rows, scored, folders)

def load_models(config, run: Run) -> None:
    """The student, the teacher and what learns beside the student. The seed decides all that is drawn."""
    torch.manual_seed(config.seed)
    run.tokenizers["student"] = load_tokenizer(run.folders["student"])
    with_lora = config.lora_rank > 0
    run.student = load_or_receive(run.last if run.last and not with_lora else run.folders["student"],
                                  run.dtype if with_lora and not config.shard_student else torch.float32, run.device,
                                  config.shard_student, init="pretrained" if run.last else config.student_init)
    run.student.checkpointing = config.gradient_checkpointing
    if with_lora:
        lora.add_lora(run.student, config.lora_rank, config.lora_alpha, config.lora_dropout)
        if run.last and not run.student.embed.weight.is_meta:
            lora.load_adapter(run.last / "adapter", run.student)
    if config.method != "sft":
        run.teacher = load_or_receive(run.folders["teacher"], run.dtype, run.device, config.shard_teacher,
                                      layers=not config.cache_teacher).requires_grad_(False)
        run.tokenizers["teacher"] = load_tokenizer(run.folders["teacher"])
        report.recommend_sft(config, run.teacher)
    check_pair(config, run.student, run.teacher, run.tokenizers)
    modules = make_modules(config, run.student, run.teacher)
    run.projectors, run.adversary = (module and module.to(run.device) for module in modules)
    if config.projector_init == "shared" and not run.last and parallel.is_first():
        pairs = projector_init.shared_tokens(run.tokenizers["student"], run.tokenizers["teacher"])
        projector_init.init_from_shared(run.projectors, run.student, run.teacher, pairs)
    if run.adversary is not None:
        run.adversary.requires_grad_(config.ga_lr > 0)

def load_or_receive(folder: Path, dtype: torch.dtype, device: str, sharded: bool, **how) -> Decoder:
    """load(), but of a model that is going to be dealt out (parallel.shard) the first process alone reads the weights,
    into the CPU's memory; the others have its shape. how: load's init or layers."""
    if sharded and not parallel.is_first():
        return shape_of(folder).to(dtype)
    return load(folder, dtype=dtype, device="cpu" if sharded else device, **how)

def load_examples(config, run: Run) -> None:
    """The training rows in both tokenizations, and what is computed once for all of them."""
    student, teacher = run.tokenizers["student"], run.tokenizers.get("teacher")
    if config.method == "seqkd":
        with run.autocast():
            run.rows["train"] = teacher_rows(
                run.rows["train"], run.files["train"], config.teacher, run.teacher, teacher, config.max_length,
                config.max_prompt_length, config.batch_size)
    rows = run.rows["train"]
    one_tokenizer = config.method in WITHOUT_KD or same_vocabulary(student, teacher)
    run.cut_by = student, student if one_tokenizer else teacher
    with parallel.first_goes_first():
        if config.method == "mined":
            strings = token_strings(student, teacher)
            run.pairing = MinED(strings, cache.kept_vocabulary_map(hub.DATA_DIR, strings))
        run.examples, cut, dropped = cache.cached_rows(hub.DATA_DIR / "tokens", rows, *run.cut_by,
                                                       config.max_length, config.max_prompt_length)
    if cut or dropped:
        print(f"{config.data}, train: {cut} of {len(rows)} prompts cut to {config.max_prompt_length} tokens, {dropped} "
              f"rows dropped, because no response token fits into {config.max_length}")
    if not run.examples:
        raise InputError(f"--data {config.data}: no row has a response token within --max_length {config.max_length}")
    limits = config.max_length, config.max_prompt_length
    for split, scored in run.scored.items():
        if not any(encode_rows([row], student, student, *limits)[0] for row in scored):
            raise InputError(f"{run.files[split]}: no row has a response token within --max_length {config.max_length}")
    run.pairing = run.pairing or pairing_of(config, student, teacher, run.examples, rows, run.device)
    if config.cache_teacher:
        run.states = cache.TeacherStates(run.files["train"], config.teacher, run.teacher.source, run.examples,
                                         run.teacher.config.hidden_size, getattr(torch, config.cache_dtype), run.dtype)

        def whole_teacher():
            return load(run.teacher.source, dtype=run.dtype, device=run.device)
        with run.autocast():
            run.states.fill(whole_teacher, config.batch_size, run.pads[1], run.device)

def pairing_of(options, student, teacher, examples: list[Example], rows: list[Row], device: str):
    """What a batch needs beside itself for a method that meets in bytes, chunks or ranks, or None. student, teacher:
    tokenizers."""
    if options.method == "byte_kd" or options.byte_weight:
        return BytePaths(student, teacher, examples, {e.row: rows[e.row].outputs[0] for e in examples}, device)
    if options.method == "alm":
        return ChunkNumbers(device)
    return CommonPositions() if options.method == "uld" else None

def go_on(config, run: Run, optimizer) -> dict | None:
    """Put back what the last checkpoint holds, if there is one → the record of a step taken but not finished."""
    state = {"step": 0, "best_dev_rouge_l": -1.0, "best_dev_bits_per_byte": 1e9, "bad_steps": 0}
    if run.last:
        state |= load_checkpoint(run.last, run.projectors, run.adversary, optimizer)
    unfinished = state.pop("unfinished", None)
    run.state = state | {"data": config.data, "method": config.method, "student": config.student}
    if parallel.is_first():
        keep_metrics(run.out_dir / "metrics.jsonl", state["step"] - (unfinished is not None))
    tell_cut_prompts(f"{config.data}, dev", run.scored["dev"], run.tokenizers["student"], config.max_prompt_length)
    return unfinished

def to_score(config, run: Run) -> Iterator[tuple[str, Decoder]]:
    """(name, model) of all that the final table shows, one after the other: each is gone before the next is loaded. Of
    the toy also what the student was before, and what fine-tuning alone makes of it."""
    if run.teacher is not None and not config.cache_teacher:
        yield "teacher", run.teacher
    run.teacher = None
    if config.student == "toy" and config.method != "sft":
        yield "student, before", load(toy.folder("student"), device=run.device)
        yield "student, after sft", load(toy.folder("sft"), device=run.device)
    yield "student", load_best(config, run)

def load_best(config, run: Run) -> Decoder:
    """The best checkpoint, in parts where the student is, which gives way to it."""
    run.student = run.projectors = run.adversary = None
    if not (run.out_dir / "best").exists():
        raise InputError(f"{run.out_dir / 'best'}: is not there (any more); {run.out_dir / 'last'} is the newest")
    decoder = load_or_receive(run.out_dir / "best", torch.float32, run.device, config.shard_student)
    if config.shard_student:
        parallel.shard(decoder, run.device)
    return decoder
