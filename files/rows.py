"""A data file of JSON lines → rows, each line checked; Alpaca's prompt template."""
import json
from dataclasses import dataclass
from pathlib import Path

from files.config import InputError

LONGEST_LINE = 10_000_000       # characters of a data file
ALPACA_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                     "context. Write a response that appropriately completes the request.\n\n"
                     "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
          "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")

def make_prompt(instruction: str, input: str = "") -> str:
    """Put an instruction, and an input where there is one, into Alpaca's template."""
    return (ALPACA_WITH_INPUT if input else ALPACA).format(instruction=instruction, input=input)

@dataclass
class Row:
    """One line of a data file: a prompt and its answers. The first is trained on, all are references for scoring. Where
    the answers' probabilities are known, `truth` has them."""
    prompt: str
    outputs: list[str]
    truth: dict[str, float] | None = None

def read_rows(path: Path) -> list[Row]:
    """Read JSON lines with `prompt` and `output` (a string, or a list of strings), or with `instruction`, `input` and
    `output`, which go through Alpaca's template. Empty strings in a list of outputs are left out. `truth`, where it is
    there, is an object of answers and their probabilities.
    Raises InputError that names file, line and what was found."""
    rows = []
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"{path}:{number}: {len(line):,} characters in a row, of at most {LONGEST_LINE:,}")
        if line.strip():
            rows.append(_read_row(f"{path}:{number}", line))
    if not rows:
        raise InputError(f"{path}: no rows in this file")
    return rows

def _read_row(place: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{place}: must be a JSON object with prompt and output, found {type(fields).__name__}")
    found = f"(found: {', '.join(fields) or 'nothing'})"
    prompt, output = fields.get("prompt"), fields.get("output")
    if prompt is None and fields.get("instruction") is not None:
        instruction, text = fields["instruction"], fields.get("input") or ""
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f'{place}: "instruction" must be a string that is not empty, found {instruction!r:.60}')
        if not isinstance(text, str):
            raise InputError(f'{place}: "input" must be a string')
        prompt = make_prompt(instruction, text)
    if prompt is None:
        raise InputError(f'{place}: no "prompt" field, nor an "instruction" {found}')
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{place}: "prompt" must be a string that is not empty, found {prompt!r:.60}')
    if output is None:
        raise InputError(f'{place}: no "output" field {found}')
    outputs = [output] if isinstance(output, str) else output
    if not isinstance(outputs, list) or not all(isinstance(o, str) for o in outputs):
        raise InputError(f'{place}: "output" must be a string or a list of strings, found {output!r:.60}')
    outputs = [o for o in outputs if o.strip()]
    if not outputs:
        raise InputError(f'{place}: "output" is empty')
    truth = fields.get("truth")
    if truth is not None and not (isinstance(truth, dict) and truth and all(
            answer and type(p) in (int, float) and 0 < p <= 1 for answer, p in truth.items())):
        raise InputError(f'{place}: "truth" must be an object of answers with probabilities, found {truth!r:.60}')
    try:
        "".join([prompt, *outputs, *(truth or {})]).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair, which is no character ({error.reason})") from error
    return Row(prompt, outputs, truth)
