"""Data: names to files, and the lines of files to rows.

rows = read_split("dolly", "train")         # or a folder with train.jsonl, a file, a hub id
"""

import csv
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config import InputError, did_you_mean
from runtime.distributed import print_first
from runtime.files import atomic_path, data_dir, file_label

# The data of the DSKD papers: (set, split) → path in the release's repository, git blob id.
RELEASE = "https://raw.githubusercontent.com/stellaevat/DSKD-KQ/375154c/"
DATASETS = {
    ("dolly", "train"): ("data/dolly/train.jsonl", "cb845750fffdd98b6c04d81b1798e5ec72835607"),
    ("dolly", "dev"): ("data/dolly/dev.jsonl", "d956f00cb476aa985b02f4a3ebfd43cd6e17225c"),
    ("dolly", "test"): ("data/dolly/test.jsonl", "f3d75af7b273550bc0ff340faffe17c8c31733d3"),
    ("self-inst", "test"): (
        "data/self-inst/test.jsonl",
        "8231f707b86745176db46d2117397476d25d80af",
    ),
    ("vicuna", "test"): ("data/vicuna/test.jsonl", "2fcc9c233a9a0987bc5200c4020092f5fa578e56"),
    ("sinst", "test"): ("data/sinst/11_/test.jsonl", "91ce2bd1332fadea8efcf20300d4a1e3ada3ae21"),
    ("uinst", "test"): ("data/uinst/11_/test.jsonl", "104739f507d121d7ddf689bf428f348291b50f25"),
}
PAPER_SETS = ("dolly", "self-inst", "vicuna", "sinst", "uinst")
TOY_SETS = ("toy", "toy-phrasings", "toy-kinds", "toy-asides")  # toy.py writes them

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}
DEV_SHARE, LARGEST_DEV = 0.05, 500  # of the training rows, where there is no dev split

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_END = "### Response:"

# What a row may be called in other projects → what it is called here.
PROMPTS = ("prompt", "question", "instruction")
INPUTS = ("input", "context")
MAY_BE_BLANK = (*INPUTS, "system")
OUTPUTS = ("output", "response", "completion", "answer")
ROLES = dict(human="user", gpt="assistant", user="user", assistant="assistant", system="system")
VALID_ROW = '{"prompt": "Name a river.", "output": "The Rhine."}'


@dataclass
class Row:
    """A prompt and its answers: the first is trained on, all are references for scoring. Without
    one the teacher answers.

    prompt: a text, or an instruction that wants a template around it (is_instruction). input: the
    text that it is about. earlier: the turns before it, [{"role", "content"}], system, user and
    assistant. truth: the probabilities of all answers, where they are known. ended: false where the
    answer was cut, so that no EOS follows it."""

    prompt: str
    outputs: list[str]
    truth: dict[str, float] | None = None
    ended: bool = True
    input: str = ""
    earlier: list[dict] = field(default_factory=list)
    is_instruction: bool = False


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """An instruction, and an input where there is one, in Alpaca's template."""
    template = ALPACA_WITH_INPUT if input else ALPACA
    return template.format(instruction=instruction, input=input)


# --------------------------------------------------------------------------------- files → rows


def read_rows(path: Path, answered: bool = True) -> list[Row]:
    """Read .jsonl, .json, .csv or .parquet. A row has one of

        prompt, question or instruction (with input or context), output, response, completion or
        answer: a string, or a list of references; system and history
        messages: [{"role", "content"}, …] or conversations: [{"from", "value"}, …], of which the
        last, the assistant's, is the answer

    Rows whose answer is empty are left out, with a note. answered: whether all must have one.
    Raises InputError that names file, line and what was found."""
    path = Path(path)
    rows, empty = [], []
    for number, fields in READERS.get(path.suffix, _read_jsonl)(path):
        row = read_row(f"{path}:{number}", fields, answered)
        if row is None:
            empty.append(number)
        else:
            rows.append(row)
    if empty:
        print_first(
            f"note: {path}: {len(empty)} of {len(rows) + len(empty)} rows have an empty answer and "
            f"are left out, the first in line {empty[0]}"
        )
    if not rows:
        raise InputError(f"{path}: no rows in this file")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error


def _read_jsonl(path: Path):
    """→ (line, fields) of every row; so do the other readers."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error})") from error


def _read_json(path: Path):
    """A list of rows, alone or as "data"; or lines of JSON under the wrong name."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # behind a whole row
            yield from _read_jsonl(path)
            return
        raise InputError(f"{path}:{error.lineno}: not JSON ({error})") from error
    if isinstance(content, dict):
        content = content.get("data", [content])
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a list of rows, found {content!r:.60}")
    yield from enumerate(content, 1)


def _read_csv(path: Path):
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    for fields in reader:
        number = reader.line_num  # a cell may have several lines; the row's last
        if None in fields:
            raise InputError(f"{path}:{number}: has more columns than the first line names")
        yield number, fields


def _read_parquet(path: Path):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: needs a library:  pip install pyarrow") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ValueError as error:  # the library's own
        raise InputError(f"{path}: not a parquet file ({error})") from error
    yield from enumerate(rows, 1)


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_row(place: str, fields, answered: bool = True) -> Row | None:
    """A row from its fields; None where the answer is empty. place: what errors name."""
    if not isinstance(fields, dict):
        raise InputError(
            f"{place}: must be an object like {VALID_ROW}, found {type(fields).__name__}"
        )
    fields = {
        name: value
        for name, value in fields.items()
        if value is not None and not (name in MAY_BE_BLANK and _is_blank(value))
    }
    conversation = fields.get("messages") or fields.get("conversations")
    if conversation is None and isinstance(fields.get("prompt"), list):
        completion = fields.get("completion", [])
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        conversation = [*fields["prompt"], *completion]
    if conversation is not None:
        turns, outputs = _turns(place, conversation), []
        if turns and turns[-1]["role"] == "assistant":
            outputs = [turns.pop()["content"]]
        if not turns or turns[-1]["role"] != "user" or (answered and not outputs):
            raise InputError(
                f"{place}: a conversation needs a question and an answer: the last turns must be "
                "the user's and the assistant's"
            )
        *earlier, question = turns
        if "system" in fields:
            text = _text(place, "system", fields["system"])
            earlier = [{"role": "system", "content": text}, *earlier]
        if outputs and _is_blank(outputs[0]):
            return None
        prompt = _text(place, "content", question["content"])
        return Row(prompt, outputs, earlier=earlier, is_instruction=True)

    prompt_name = next((name for name in PROMPTS if name in fields), None)
    output_name = next((name for name in OUTPUTS if name in fields), None)
    if prompt_name is None or (output_name is None and answered):
        raise InputError(
            f"{place}: no {'prompt' if prompt_name is None else 'output'} (found: "
            f"{', '.join(fields)}); a row is, for example, {VALID_ROW}"
        )
    row = Row(_text(place, prompt_name, fields[prompt_name]), [])
    if output_name is not None:
        row.outputs = _answers(place, output_name, fields[output_name])
    row.is_instruction = prompt_name != "prompt"
    if isinstance(fields.get("truth"), dict):  # the toy's; of others' data it may be anything
        row.truth = fields["truth"]
    inputs = [_text(place, name, fields[name]) for name in INPUTS if name in fields]
    row.input = "\n\n".join(inputs)
    instruction = fields.get("instruction", "")
    instruction = "" if _is_blank(instruction) else _text(place, "instruction", instruction)
    if prompt_name == "prompt" and row.prompt == alpaca_prompt(instruction, row.input):
        # The papers' data give both; other templates want the instruction.
        row.prompt, row.is_instruction = instruction, True
    elif prompt_name == "prompt" and stands_in(row.input, row.prompt):
        row.input = ""
    elif prompt_name == "question" and instruction:
        row.prompt, row.input = instruction, "\n\n".join([row.prompt, *inputs])
    if prompt_name == "prompt" and not row.is_instruction and instruction not in row.prompt:
        raise InputError(f"{place}: the prompt does not hold the instruction; give one of the two")
    if "system" in fields:
        row.earlier.append({"role": "system", "content": _text(place, "system", fields["system"])})
    row.earlier += _history(place, fields.get("history", []))
    if output_name is not None and not row.outputs:
        return None
    return row


def stands_in(text: str, prompt: str) -> bool:
    """Whether an input is a part of the prompt already: on lines of its own, or as whole words, if
    it is too long to be there by accident."""
    text = text.strip()
    if f"\n{text}\n" in f"\n{prompt}\n":
        return True
    whole_words = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt)
    return whole_words is not None and len(text) > 4


def _is_blank(value) -> bool:
    return isinstance(value, str) and not value.strip()


def _history(place: str, history) -> list[dict]:
    """Earlier turns: [[question, answer], …], or turns as in messages."""
    if not isinstance(history, list):
        raise InputError(f"{place}: history must be a list of turns, found {history!r:.60}")
    if history and all(isinstance(turn, dict) for turn in history):
        return _turns(place, history)
    turns = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{place}: history must be [question, answer] pairs, found {pair!r:.60}"
            )
        for role, content in zip(("user", "assistant"), pair):
            turns.append({"role": role, "content": _text(place, "history", content)})
    return turns


def _turns(place: str, conversation) -> list[dict]:
    """messages and conversations, as [{"role", "content"}, …]."""
    if isinstance(conversation, str):  # a column of a CSV file
        try:
            conversation = json.loads(conversation)
        except ValueError as error:
            raise InputError(f"{place}: the conversation is not JSON ({error})") from error
    turns = []
    for turn in conversation if isinstance(conversation, list) else [conversation]:
        if not isinstance(turn, dict):
            raise InputError(f"{place}: a turn must be an object, found {turn!r:.60}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"{place}: a turn must have a role (system, user or assistant) and a text as its "
                f"content, found {turn!r:.80}"
            )
        if ROLES[role] != "system" or not _is_blank(content):
            turns.append({"role": ROLES[role], "content": _whole(place, "content", content)})
    return turns


def _text(place: str, name: str, value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f'{place}: "{name}" must be a string that is not empty, found {value!r:.60}'
        )
    return _whole(place, name, value)


def _whole(place: str, name: str, text: str) -> str:
    """Raises InputError for half a character, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f'{place}: "{name}" holds half a character ({error})') from error
    return text


def _answers(place: str, name: str, value) -> list[str]:
    """The references that are not blank."""
    outputs = value if isinstance(value, list) else [value]
    for output in outputs:
        if not isinstance(output, str):
            raise InputError(f'{place}: "{name}" must be text, found {output!r:.60}')
    return [_whole(place, name, output) for output in outputs if output.strip()]


# ------------------------------------------------------------------------------- names → files


def data_files(name: str, split: str, required: bool = True) -> list[Path]:
    """The files of a split ("train", "dev" or "test").

    name: a set of the papers (downloaded once), one of the toy's, a folder, a file, or the id of a
    data set on the hub. A file is the training rows, or what is scored. Raises InputError where
    there is none; with required=False a folder without this split gives []."""
    if (name, split) in DATASETS:
        return [_download(name, split)]
    if name in PAPER_SETS:
        raise InputError(f"--data {name}: this set has no {split} split, it is for scoring only")
    path = Path(name)
    if name.startswith("toy") and (data_dir() / "toy" / name).is_dir():
        path = data_dir() / "toy" / name
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"--data {name}: is none of {', '.join(READERS)}")
        return [path] if split != "dev" else []
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        path = _download_from_hub(name)
    if not path.is_dir():
        raise InputError(
            f"--data {name}: no such file or folder, and not one of toy, "
            f"{', '.join(PAPER_SETS)}{did_you_mean(name, ('toy', *PAPER_SETS))}"
        )
    all_files = [file for file in (*path.glob("*"), *path.glob("data/*")) if file.suffix in READERS]
    for split_name in SPLIT_NAMES[split]:
        for suffix in READERS:  # the same rows may be there in two formats
            files = [file for file in all_files if file.suffix == suffix]
            whole = [file for file in files if file.stem == split_name]
            shards = [f for f in files if re.match(rf"{split_name}-\d+-of-\d+", f.stem)]
            shards += path.glob(f"{split_name}/*{suffix}")
            if whole or shards:
                return whole[:1] or sorted(shards)
    others = (*SPLIT_NAMES["dev"], *SPLIT_NAMES["test"])
    if split == "train" and len(all_files) == 1 and not all_files[0].name.startswith(others):
        return all_files
    if required:
        names = [str(f.relative_to(path)) for f in path.rglob("*") if f.suffix in READERS]
        raise InputError(
            f"{path}: no {split}.jsonl in this folder (nor .json, .csv or .parquet), but "
            f"{', '.join(sorted(names)[:5]) or 'no data file'}. It should hold train.jsonl, "
            "dev.jsonl and, to be scored, test.jsonl; a folder in it works as --data, too"
        )
    return []


def read_split(name: str, split: str, required: bool = True) -> list[Row]:
    """The rows of a split. Raises InputError where there is none; with required=False []."""
    files = data_files(name, split, required)
    return [row for file in files for row in read_rows(file, answered=split != "train")]


def read_splits(name: str, seed: int) -> dict[str, list[Row]]:
    """The rows of train, dev and, where a folder has it, test. A dev split that is missing is drawn
    from the training rows, and so said."""
    rows = {"train": read_split(name, "train")}
    for split in ("dev", "test"):
        if split == "test" and Path(name).is_file():
            continue
        found = read_split(name, split, required=False)
        if found:
            rows[split] = found
    if "dev" not in rows:
        answered = [i for i, row in enumerate(rows["train"]) if row.outputs]
        count = min(LARGEST_DEV, math.ceil(DEV_SHARE * len(answered)))
        if count == len(answered):
            raise InputError(
                f"--data {name}: no dev split, and too few rows with an answer to draw one "
                f"({len(answered)}; an answer is called {', '.join(OUTPUTS)})"
            )
        chosen = set(random.Random(seed).sample(answered, count))
        rows["dev"] = [row for i, row in enumerate(rows["train"]) if i in chosen]
        rows["train"] = [row for i, row in enumerate(rows["train"]) if i not in chosen]
        print_first(
            f"--data {name}: no dev split, so {count} training rows, drawn by --seed, are it"
        )
    return rows


def cache_folder(name: str) -> Path:
    """Where what is computed from a data set is kept: beside the data, where one may write there
    and no --cache_dir is given."""
    folder = data_files(name, "train")[0].parent
    if "NANODSKD_CACHE" in os.environ or not os.access(folder, os.W_OK):
        folder = data_dir() / "computed" / file_label(str(folder.resolve()))
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint_of_rows(rows: list[Row]) -> str:
    """SHA-256 of all that they hold."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()


@functools.cache
def _download_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"*{suffix}" for suffix in READERS]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client's own errors, httpx's and the system's
        raise InputError(
            f"--data {name}: no such folder, and the hub has no such data set or cannot be reached "
            f"({type(error).__name__})"
        ) from error


def _download(name: str, split: str) -> Path:
    remote, blob_id = DATASETS[name, split]
    path = data_dir() / name / f"{split}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {RELEASE}{remote}")
    with atomic_path(path) as temporary:
        try:
            urllib.request.urlretrieve(RELEASE + remote, temporary)
        except OSError as error:
            raise InputError(
                f"--data {name}: cannot download {RELEASE}{remote} ({error}); a "
                f"folder with {split}.jsonl works in place of a name"
            ) from error
        if git_blob_id(temporary) != blob_id:
            raise InputError(
                f"{RELEASE}{remote}: the download is cut or was changed (its git blob "
                f"id is not {blob_id}); try again"
            )
    return path


def git_blob_id(path: Path) -> str:
    """The id git gives a file's content: SHA-1 of "blob <size>\\0" and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def same_data(name: str, other: str | None) -> bool:
    """Whether two values of --data mean the same set; a file belongs to its folder's set."""

    def folder(value):
        path = Path(value).resolve()
        return path.parent if path.is_file() else path

    return name == other or other is not None and folder(name) == folder(other)


def trained_on(folder: Path) -> str | None:
    """The data a checkpoint of train.py was trained on; None for any other model."""
    path = folder / "training.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["data"]
