"""The teacher answers training prompts. All of them, greedily: SeqKD (Kim & Rush, arXiv 1606.07947,
whose beam search has one beam here). Or those that have no answer, sampled, so that the student
reads more than the teacher's likeliest words. An answer that reached the length limit is kept,
without EOS.

The answers are lines of JSON in a folder beside the data, which is named after the teacher and all
that they depend on. An interrupted run continues where it stopped, and later runs ask no more."""

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path

from data import Row, fingerprint_of_rows
from hub.download import fingerprint_of_model
from hub.model_config import ModelConfig
from runtime.config import InputError
from runtime.distributed import barrier, is_first, print_first, rank
from runtime.files import file_label, one_at_a_time
from runtime.generation import MAX_NEW_TOKENS, answer_batches, share_of

# Of sampled answers. At 1 a small teacher loses the thread: of a Qwen's functions half were broken.
TEMPERATURE = 0.7
AT_ONCE = 32, 128  # prompts, at least and at most
CACHE_BYTES = 2**31  # their keys and values


def teacher_rows(
    config, all_rows: list[Row], folder: Path, teacher, tokenizer, every: bool
) -> list[Row]:
    """The rows with the teacher's answers, in place of theirs (every) or where they have none,
    without those it leaves empty. Limits are in its tokens; the answers are kept in a folder in
    `folder`. Raises InputError where all answers are empty."""
    rows = [row for row in all_rows if every or not row.outputs]
    limits = config.max_length, config.max_prompt_length
    temperature = 0.0 if every else TEMPERATURE
    made_of = (
        fingerprint_of_model(teacher.source),
        fingerprint_of_rows(rows),
        *limits,
        tokenizer.prompt_format,
        temperature,
    )
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    folder = folder / f"train-by-{file_label(Path(config.teacher).name)}-{key}"
    folder.mkdir(exist_ok=True)
    lock = one_at_a_time(folder / "lock") if is_first() else contextlib.nullcontext()
    with lock:  # a run that begins meanwhile waits, and then has the same answers
        barrier()
        known = read_answers(folder)
        barrier()  # all processes have read the same
        missing = [i for i in range(len(rows)) if i not in known]
        mine = [missing[k] for k in share_of(teacher, len(missing))]
        with open(folder / f"answers-{rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write("\n")  # the line before may have been cut by a kill
            for batch in answer_batches(
                teacher,
                tokenizer,
                rows,
                mine,
                *limits,
                batch_size=prompts_at_once(teacher, config.max_prompt_length + MAX_NEW_TOKENS),
                temperature=temperature,
                desc="the teacher answers the training prompts",
            ):
                file.writelines(json.dumps(line) + "\n" for line in batch)
                file.flush()
        barrier()
        answers = read_answers(folder)
    answered = []
    for i, row in enumerate(rows):
        text, ended = answers[i]
        if text.strip():
            answered.append(replace(row, outputs=[text], ended=ended))
    if not answered:
        raise InputError(
            f"--teacher {config.teacher}: gave an empty answer to every prompt of {config.data}"
        )
    print_first(
        f"the teacher's answers: {folder} ({len(rows)} prompts, "
        f"{len(rows) - len(answered)} empty answers left out)"
    )
    return answered + [row for row in all_rows if row.outputs and not every]


def prompts_at_once(teacher, length: int) -> int:
    """How many prompts, each of this length with its answer, are answered together: as many as
    CACHE_BYTES hold the keys and values of, within AT_ONCE. The more, the faster: a step reads all
    weights, for one row or for many."""
    shape = teacher.config
    if not isinstance(shape, ModelConfig):
        return AT_ONCE[0]  # transformers' own, whose keys and values are not known
    bytes_per_number = teacher.embed.weight.element_size()
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bytes_per_number
    return min(AT_ONCE[1], max(AT_ONCE[0], CACHE_BYTES // (per_token * length)))


def read_answers(folder: Path) -> dict[int, tuple[str, bool]]:
    """row → answer, and whether it ended by itself; from all processes' files."""
    answers = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row, answer, ended = json.loads(line)
            except ValueError:
                continue  # empty, or cut by a kill
            answers[row] = answer, ended
    return answers
