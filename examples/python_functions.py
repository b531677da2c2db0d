"""The data of docs/results.md: functions of the standard library of the Python that runs this.

    python -m examples.python_functions data/code                # 3.11: 2,615, 303 and 504 rows
    python -m examples.python_functions data/code-50 --labels 50
    python -m examples.python_functions data/code-50-prompts-400 --labels 50 --prompts 50 400

A row's prompt is a signature and its docstring, the output the rest of the function. A function has
a docstring, no decorator, a body of 40 to 600 characters and a prompt of at most 601; no module is
in two of train, dev and test."""

import ast
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from runtime.config import InputError, flag, parse, run_script

# Tests, tables, and what is not of the library.
LEFT_OUT = {
    "__pycache__",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@dataclass
class Config:
    out_dir: str = flag("", "A folder.")
    labels: int = flag(
        0, "How many training rows keep their output, from the first on; 0: all.", minimum=0
    )
    prompts: list[int] = flag(
        [0, 0],
        "50 400: the prompts of training rows 50 to 399, counted from 0, are added without output.",
    )


def functions_of(source: str) -> list[tuple[str, str]]:
    """(signature and docstring, body) of every function that is kept, without its indentation."""
    found, lines = [], source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        if len(node.body) < 2 or not ast.get_docstring(node):
            continue
        docstring_end = node.body[0].end_lineno
        prompt = unindented(lines[node.lineno - 1 : docstring_end], node.col_offset) + "\n"
        body = unindented(lines[docstring_end : node.end_lineno], node.col_offset).strip("\n")
        if 40 <= len(body) <= 600 and len(prompt) <= 601:
            found.append((prompt, body))
    return found


def unindented(lines: list[str], width: int) -> str:
    """Lines that are less indented, as in a long string, stay as they are."""
    return "\n".join(line if line[:width].strip() else line[width:] for line in lines)


def rows_of_library() -> dict[str, list[dict]]:
    """{"train": rows, "dev": rows, "test": rows}; a body that comes twice is kept once."""
    library, of_file, seen = Path(sysconfig.get_paths()["stdlib"]), {}, set()
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.parts):
            continue
        try:
            functions = functions_of(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for prompt, body in functions:
            if body not in seen:
                seen.add(body)
                of_file.setdefault(path, []).append({"prompt": prompt, "output": body})
    files = sorted(of_file)
    random.Random(0).shuffle(files)
    sixth, quarter = len(files) // 6, len(files) // 4
    parts = {"train": files[quarter:], "dev": files[sixth:quarter], "test": files[:sixth]}
    rows = {}
    for name, part in parts.items():
        rows[name] = [row for path in sorted(part) for row in of_file[path]]
        random.Random(1).shuffle(rows[name])
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv, positional=("out_dir",))
    if not config.out_dir or len(config.prompts) != 2:
        raise InputError("name a folder; --prompts are two numbers, as in 50 400")
    rows = rows_of_library()
    prompts = [{"prompt": row["prompt"]} for row in rows["train"][slice(*config.prompts)]]
    rows["train"] = rows["train"][: config.labels or None] + prompts
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(part)} rows")


if __name__ == "__main__":
    run_script(main)
