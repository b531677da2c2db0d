"""A row as the text that a model reads: in its own chat template, in Alpaca's, or as it stands.

    text = prompt_text(row, "chat", template)

Only responses are aligned, so teacher and student may each read the prompt in their own words.
"""

from dataclasses import replace
from functools import partial

from data import ALPACA_END, Row, alpaca_prompt

FORMATS = ("auto", "chat", "alpaca", "raw")


def prompt_text(row: Row, prompt_format: str, template=None) -> str:
    """What stands before the answer.

    chat: the model's template (hub/chat_template.py). alpaca: Alpaca's template, but for prompts
    that end like it. raw: the prompt, or the instruction and its input, and nothing else.
    auto: what the row gives: Alpaca's template around instructions, raw prompts."""
    task = f"{row.prompt}\n\n{row.input}" if row.input else row.prompt
    if prompt_format == "chat":
        return template.render([*row.earlier, {"role": "user", "content": task}])
    if prompt_format == "auto":
        prompt_format = "alpaca" if row.is_instruction else "raw"
    earlier = "".join(f"{turn['content']}\n\n" for turn in row.earlier)
    if prompt_format == "raw" or task.rstrip().endswith(ALPACA_END):
        return earlier + task
    return earlier + alpaca_prompt(row.prompt, row.input)


def own_format(rows: list[Row]) -> str:
    """What "auto" is for these rows; "auto" itself where they are of both kinds."""
    kinds = {row.is_instruction for row in rows}
    if len(kinds) > 1:
        return "auto"
    return "alpaca" if True in kinds else "raw"


def fit_prompt(row: Row, fits) -> Row:
    """The row whose prompt fits. Left out, as far as needed: the oldest turns, the end of the
    input, then of the system's text and the prompt the end of the one and the beginning of the
    other, the longer first. fits(row) says whether all models can take it."""
    while not fits(row) and any(turn["role"] != "system" for turn in row.earlier):
        oldest = next(i for i, turn in enumerate(row.earlier) if turn["role"] != "system")
        rest = row.earlier[oldest + 1 :]
        while rest and rest[0]["role"] == "assistant":  # an answer goes with its question
            rest = rest[1:]
        row = replace(row, earlier=row.earlier[:oldest] + rest)
    if row.input and not fits(row):
        row = longest(len(row.input), partial(with_input, row), fits)
    system = "".join(turn["content"] for turn in row.earlier)
    cuts = [(len(row.prompt), with_end_of_prompt)]
    if system:
        cuts.append((len(system), with_system))
    for size, shortened in sorted(cuts, key=lambda cut: -cut[0]):
        if not fits(row):
            row = longest(size, partial(shortened, row), fits)
    return row


def with_input(row: Row, length: int) -> Row:
    return replace(row, input=row.input[:length])


def with_system(row: Row, length: int) -> Row:
    system = "".join(turn["content"] for turn in row.earlier)[:length]
    return replace(row, earlier=[{"role": "system", "content": system}] if system else [])


def with_end_of_prompt(row: Row, length: int) -> Row:
    return replace(row, prompt=row.prompt[len(row.prompt) - length :])


def longest(size: int, shortened, fits) -> Row:
    """shortened(n) with the largest n below size that fits; shortened(0) where none does."""
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        if fits(shortened(middle)):
            low = middle
        else:
            high = middle
    return shortened(low)
