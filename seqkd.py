"""Sequence-level distillation (Kim & Rush, arXiv 1606.07947): the teacher answers the training prompts, the student learns
its answers by cross-entropy.

The answers are greedy (the paper's beam search with one beam); one that reached the length limit is kept as it is. They are
written beside the data, in a file of rows that names the teacher; a second file names the settings, and a change of any of
them makes another pair of files. Writing them can be interrupted at any time and goes on from there.
"""
import hashlib
import json
from pathlib import Path

import hub
from eval_rouge import answer_batches
from hub import InputError
from model import Decoder
from tokenize_align import Row, Tokenizer, read_rows


def teacher_rows(rows: list[Row], data_file: Path, name: str, teacher: Decoder, tokenizer: Tokenizer, max_length: int, max_prompt_length: int,
                 batch_size: int) -> list[Row]:
    """The rows, which stand in data_file, with the teacher's answer in place of theirs; without those it has no answer to.

    name: the teacher's, for the file. max_length: prompt and answer in the teacher's tokens. Raises InputError where the
    teacher answers nothing at all.
    """
    settings = {"teacher_sha256": hub.fingerprint(teacher.source), "data_sha256": hub.fingerprint(data_file),
                "max_length": max_length, "max_prompt_length": max_prompt_length, "temperature": 0.0}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    path = data_file.with_name(f"{data_file.stem}-by-{hub.label(Path(name).name)}-{key}.jsonl")
    if not path.exists():
        answers = _answer_all(path.with_suffix(".partial"), rows, teacher, tokenizer, max_length, max_prompt_length, batch_size)
        kept = [{"prompt": rows[i].prompt, "output": answers[i][0]} for i in range(len(rows)) if answers[i][0]]
        if not kept:
            raise InputError(f"--teacher {name}: gave an empty answer to every prompt of {data_file}")
        with hub.atomic_write(path.with_suffix(".json")) as file:
            unended = sum(not ended for _, ended in answers.values())
            json.dump({"teacher": name, **settings, "rows": len(rows), "empty_answers": len(rows) - len(kept), "unended_answers": unended}, file, indent=2)
        with hub.atomic_write(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        path.with_suffix(".partial").unlink(missing_ok=True)
    counts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    print(f"the teacher's answers: {path} ({len(rows)} prompts, {counts['empty_answers']} empty answers left out, "
          f"{counts['unended_answers']} cut at {max_length} tokens)")
    return read_rows(path)


def _answer_all(partial: Path, rows, teacher, tokenizer, max_length, max_prompt_length, batch_size) -> dict[int, tuple[str, bool]]:
    """Every row's answer, and whether it ended; those that stand in `partial`, a line each, are not asked for again."""
    answers = {}
    if partial.exists():
        lines = [line for line in partial.read_text(encoding="utf-8").splitlines(True) if line.endswith("]\n")]      # the last may have been cut
        try:
            answers = {i: (text, ended) for i, text, ended in map(json.loads, lines)}
        except (ValueError, TypeError) as error:
            raise InputError(f"{partial}: damaged ({error}); delete it to ask the teacher anew") from error
        with hub.atomic_write(partial) as file:
            file.writelines(lines)
    with open(partial, "a", encoding="utf-8") as file:
        for batch in answer_batches(teacher, tokenizer, rows, max_length, max_prompt_length, batch_size, temperature=0.0,
                                    desc="the teacher answers the training prompts", done=answers):
            file.writelines(json.dumps(answer) + "\n" for answer in batch)
            file.flush()
            answers |= {i: (text, ended) for i, text, ended in batch}
    return answers
