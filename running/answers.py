"""A model answers the prompts of some rows: the student where it is scored, and to be judged by the teacher with
--on_policy; the teacher for SeqKD.

SeqKD (sequence-level distillation, Kim & Rush, arXiv 1606.07947): the teacher answers the training prompts and the
student learns its answers by cross-entropy. They are greedy (the paper's beam search with one beam); one that reached
the length limit is kept as it is. They are written beside the data, in a file of rows that names the teacher; a second
file names the settings, and a change of any of them makes another pair of files. Writing them can be interrupted and
goes on from there."""
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from files import hub
from files.config import InputError
from files.rows import Row, read_rows
from model import Decoder
from running import parallel
from running.generation import generate
from running.run_folder import Interrupted
from tokenize_align import Example, Tokenizer, encode_prompt, encode_rows, left_pad

def rows_that_fit(decoder: Decoder, max_length: int) -> int:
    """Rows of max_length tokens that can be answered together: on a GPU as many as take half of its free memory with
    keys, values, what a layer computes of a prompt, and logits; on a CPU, which gains nothing by more, 32."""
    if decoder.embed.weight.device.type != "cuda":
        return 32
    shape, size = decoder.config, decoder.embed.weight.element_size()
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    a_row = max_length * size * (cached + 4 * shape.hidden_size + 3 * shape.intermediate_size) + 16 * shape.vocab_size
    return max(1, torch.cuda.mem_get_info()[0] // 2 // a_row)

def answer(decoder: Decoder, tokenizer: Tokenizer, prompts: list[list[int]], new_tokens: int, temperature: float,
           generator) -> list[tuple[str, bool]]:
    """One batch of prompts, token ids → each one's answer and whether it ended before the limit, new_tokens."""
    (ids, mask), eos, device = left_pad(prompts, tokenizer.eos_id), tokenizer.eos_id, decoder.embed.weight.device
    new = generate(decoder, ids.to(device), mask.to(device), new_tokens, temperature, eos_id=eos, generator=generator)
    return [(tokenizer.decode(tokens[:tokens.index(eos)] if eos in tokens else tokens), eos in tokens)
            for tokens in new.tolist()]

def answer_batches(decoder: Decoder, tokenizer: Tokenizer, rows: list[Row], max_length: int, max_prompt_length: int,
                   batch_size: int, temperature: float, seed: int = 0, desc: str = "answering",
                   done=()) -> Iterator[list[tuple[int, str, bool]]]:
    """Generate answers, prompts of like length together → lists of (the row's number, answer, whether it ended before
    the limit). Limits in tokens; temperature 0 is greedy. done: rows that need no answer."""
    generator = torch.Generator(decoder.embed.weight.device).manual_seed(seed)
    limit = min(max_prompt_length, max_length - 1)
    prompts = [encode_prompt(row.prompt, tokenizer, limit)[0] or [tokenizer.eos_id] for row in rows]
    new_tokens = max_length - max(map(len, prompts))            # what the longest prompt leaves, for every row
    order = sorted(set(range(len(rows))) - set(done), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(rows), initial=len(rows) - len(order), desc=desc, unit="row", leave=False,
              dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start:start + batch_size]
            answers = answer(decoder, tokenizer, [prompts[i] for i in part], new_tokens, temperature, generator)
            yield [(i, text.strip(), ended) for i, (text, ended) in zip(part, answers)]
            bar.update(len(part))

def answer_rows(decoder: Decoder, tokenizer: Tokenizer, rows: list[Row], max_length: int, max_prompt_length: int,
                batch_size: int = 32, temperature: float = 1.0, seed: int = 0, desc: str = "answering",
                at_once=contextlib.nullcontext) -> list[str]:
    """An answer to every row's prompt, in the rows' order; the same seed and batch size give the same answers.
    Every process of torchrun answers its share of the rows and gets all answers. at_once: a context in which
    Interrupted may be raised, and then is in every process; not of a sharded model, whose processes stay in step."""
    first, every = parallel.share(decoder)
    others = set(range(len(rows))) - set(range(first, len(rows), every))
    answers: dict[int, str] | None = {}
    try:
        with contextlib.nullcontext() if parallel.is_sharded(decoder) else at_once():
            for batch in answer_batches(decoder, tokenizer, rows, max_length, max_prompt_length, batch_size,
                                        temperature, seed + 1_000_003 * first, desc, others):
                answers |= {i: text for i, text, _ in batch}
    except Interrupted:
        answers = None
    parts = parallel.gather(answers)
    if None in parts:
        raise Interrupted
    answers = {i: text for part in parts for i, text in part.items()}
    return [answers[i] for i in range(len(rows))]

def own_answers(student: Decoder, tokenizers, examples: list[Example], rows: list[Row], max_length: int,
                max_prompt_length: int, generator) -> tuple[list[Example], dict[int, str]]:
    """On-policy distillation (GKD, arXiv 2306.13649): the examples with answers that the student samples, at
    temperature 1 and until EOS or max_length, in place of the data's, cut anew by both tokenizers. No gradient goes
    through the sampling. → examples with the numbers −1, −2, … in place of rows', and their answers' texts."""
    prompts = [example.student.ids[:example.student.prompt_length] for example in examples]
    texts, _ = zip(*answer(student, tokenizers[0], prompts, max_length - max(map(len, prompts)), 1.0, generator))
    answered = [Row(rows[example.row].prompt, [text]) for example, text in zip(examples, texts)]
    cut, _, _ = encode_rows(answered, *tokenizers, max_length, max_prompt_length)
    return [replace(example, row=-1 - example.row) for example in cut], {-1 - i: text for i, text in enumerate(texts)}

def tell_cut_prompts(name: str, rows: list[Row], tokenizer: Tokenizer, limit: int) -> None:
    """Say how many prompts of a set exceed the limit, in tokens, where any does."""
    if cut := sum(encode_prompt(row.prompt, tokenizer, limit)[1] for row in rows):
        print(f"{name}: {cut} of {len(rows)} prompts cut to {limit} tokens")

# ------------------------------------------------------------------------------------------------------------- SeqKD
def teacher_rows(rows: list[Row], data_file: Path, name: str, teacher: Decoder, tokenizer: Tokenizer, max_length: int,
                 max_prompt_length: int, batch_size: int) -> list[Row]:
    """The rows of data_file with the teacher's answers in place of theirs, without those it has no answer to. name: the
    teacher's, for the file; limits in its tokens. Raises InputError where the teacher answers nothing at all."""
    settings = {"teacher_sha256": hub.fingerprint(teacher.source), "data_sha256": hub.fingerprint(data_file),
                "max_length": max_length, "max_prompt_length": max_prompt_length, "temperature": 0.0}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    path = data_file.with_name(f"{data_file.stem}-by-{hub.label(Path(name).name)}-{key}.jsonl")
    found = _read_answers(path) if parallel.is_first() and path.exists() else None
    kept, counts = parallel.gather(found)[0] or (None, None)            # the first process's disk decides
    if kept is None:
        answers = _answer_all(path, rows, teacher, tokenizer, max_length, max_prompt_length, batch_size)
        kept = [Row(rows[i].prompt, [answers[i][0]]) for i in range(len(rows)) if answers[i][0].strip()]
        if not kept:
            raise InputError(f"--teacher {name}: gave an empty answer to every prompt of {data_file}")
        counts = {"rows": len(rows), "empty_answers": len(rows) - len(kept),
                  "unended_answers": sum(not ended for _, ended in answers.values())}
        if parallel.is_first():
            with hub.atomic_write(path.with_suffix(".json")) as file:
                json.dump({"teacher": name, **settings, **counts}, file, indent=2)
            with hub.atomic_write(path) as file:
                file.writelines(json.dumps({"prompt": row.prompt, "output": row.outputs[0]}, ensure_ascii=False) + "\n"
                                for row in kept)
        parallel.barrier()
        for partial in _partials(path):
            partial.unlink(missing_ok=True)
    print(f"the teacher's answers: {path} ({len(rows)} prompts, {counts['empty_answers']} empty answers left out, "
          f"{counts['unended_answers']} cut at {max_length} tokens)")
    return kept

def _read_answers(path: Path) -> tuple[list[Row], dict[str, int]] | None:
    """The rows that an earlier run wrote, and their counts; None where they are not whole, which is told."""
    try:
        kept, counts = read_rows(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if counts["unended_answers"] <= counts["rows"] == len(kept) + counts["empty_answers"]:
            return kept, counts
    except (InputError, OSError, ValueError, KeyError, TypeError):
        pass                                            # told of below
    print(f"{path}: damaged, made anew")
    return None

def _partials(path: Path) -> list[Path]:
    """Where processes, of this start or one before, keep their answers until all are there."""
    every = sorted(path.parent.glob(f"{path.stem}.partial*"))
    return [partial for partial in every if partial.suffix.startswith(".partial")]     # none that is being written

def _answer_all(path: Path, rows, teacher, tokenizer, max_length, max_prompt_length, batch_size) -> dict[int, tuple]:
    """Every row's answer, and whether it ended. The processes share the rows and exchange the answers; those that stand
    in a partial file, a line each, are not asked for again."""
    own, answers = path.with_suffix(f".partial{parallel.rank() or ''}"), {}
    for partial in _partials(path):
        lines = partial.read_text(encoding="utf-8").splitlines(True)
        lines = [line for line in lines if line.endswith("]\n")]            # the last one may have been cut
        try:
            answers |= {i: (text, ended) for i, text, ended in map(json.loads, lines)}
        except (ValueError, TypeError) as error:
            raise InputError(f"{partial}: damaged ({error}); delete it to ask the teacher anew") from error
        if partial == own:
            with hub.atomic_write(own) as file:
                file.writelines(lines)
    known = {i for part in parallel.gather(set(answers)) for i in part}
    todo = [i for i in range(len(rows)) if i not in known]
    done = set(range(len(rows))) - set(todo[parallel.rank()::parallel.world()])
    with open(own, "a", encoding="utf-8") as file:
        for batch in answer_batches(teacher, tokenizer, rows, max_length, max_prompt_length, batch_size,
                                    temperature=0.0, desc="the teacher answers the training prompts", done=done):
            file.writelines(json.dumps(line) + "\n" for line in batch)
            file.flush()
            answers |= {i: (text, ended) for i, text, ended in batch}
    return {i: answer for part in parallel.gather(answers) for i, answer in part.items()}
