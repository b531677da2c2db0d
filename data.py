"""Data: names to JSON-lines files, and their lines to rows.

rows = read_rows(data_file("dolly", "train"))       # or a folder with train.jsonl and dev.jsonl
"""

import hashlib
import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from runtime.config import InputError
from runtime.files import DATA_DIR, atomic_path

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

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass
class Row:
    """A prompt and its answers: the first is trained on, all are references for scoring.

    truth: the probabilities of all answers, where they are known. ended: false where the answer was
    cut, so that no EOS follows it."""

    prompt: str
    outputs: list[str]
    truth: dict[str, float] | None = None
    ended: bool = True


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """An instruction, and an input where there is one, in Alpaca's template."""
    template = ALPACA_WITH_INPUT if input else ALPACA
    return template.format(instruction=instruction, input=input)


def read_rows(path: Path) -> list[Row]:
    """Read JSON lines with `prompt` and `output` (a string or a list of strings), or with
    `instruction`, `input` and `output`, which go through Alpaca's template.

    Raises InputError that names file, line and what was found."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_read_row(f"{path}:{number}", line))
    if not rows:
        raise InputError(f"{path}: no rows in this file")
    return rows


def _read_row(place: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(
            f"{place}: must be a JSON object with prompt and output, found "
            f"{type(fields).__name__}"
        )
    if fields.get("prompt") is not None:
        prompt = _text(place, "prompt", fields["prompt"])
    elif "instruction" in fields:
        instruction = _text(place, "instruction", fields["instruction"])
        prompt = alpaca_prompt(instruction, fields.get("input") or "")
    else:
        raise InputError(f'{place}: no "prompt" and no "instruction" (found: {", ".join(fields)})')
    outputs = fields.get("output")
    if isinstance(outputs, list):
        outputs = [output for output in outputs if str(output).strip()]  # blank ones are left out
    else:
        outputs = [outputs]
    if not outputs:
        raise InputError(f'{place}: "output" is empty')
    outputs = [_text(place, "output", output) for output in outputs]
    return Row(prompt, outputs, fields.get("truth"))


def _text(place: str, name: str, value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f'{place}: "{name}" must be a string that is not empty, found ' f"{value!r:.60}"
        )
    return value


def data_file(name: str, split: str, required: bool = True) -> Path | None:
    """The JSON-lines file of a split ("train", "dev" or "test").

    name: a set of the papers (downloaded once), one of the toy's, a folder, or a .jsonl file to be
    scored. Raises InputError where there is none; with required=False a folder without this split
    gives None."""
    if (name, split) in DATASETS:
        return _download(name, split)
    if name in PAPER_SETS:
        raise InputError(f"--data {name}: this set has no {split} split, it is for scoring only")
    path = Path(name)
    if name.startswith("toy") and (DATA_DIR / "toy" / name).is_dir():
        path = DATA_DIR / "toy" / name
    if path.is_file():
        if split != "test":
            raise InputError(
                f"--data {name}: a file can be scored; training wants a folder with "
                "train.jsonl and dev.jsonl"
            )
        return path
    if not path.is_dir():
        raise InputError(
            f"--data {name}: no such file or folder, and not one of toy, "
            f"{', '.join(PAPER_SETS)}"
        )
    if not (path / f"{split}.jsonl").is_file():
        if not required:
            return None
        raise InputError(
            f"{path}: no {split}.jsonl in this folder (it holds train.jsonl, "
            "dev.jsonl and, to be scored, test.jsonl)"
        )
    return path / f"{split}.jsonl"


def _download(name: str, split: str) -> Path:
    remote, blob_id = DATASETS[name, split]
    path = DATA_DIR / name / f"{split}.jsonl"
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
    if other is None or name == other:
        return name == other
    paths = []
    for value in (name, other):
        path = Path(value).resolve()
        paths.append(path.parent if path.is_file() else path)
    return paths[0] == paths[1]


def trained_on(folder: Path) -> str | None:
    """The data a checkpoint of train.py was trained on; None for any other model."""
    path = folder / "training.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["data"]
