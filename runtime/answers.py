"""A model answers the prompts of some rows: a student that is scored, a teacher for SeqKD."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from data import Row
from runtime.distributed import gather, rank, world_size
from runtime.generation import generate
from tokenize_align import Tokenizer, encode_prompt, left_pad


def answer(
    decoder,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    generator=None,
) -> list[str]:
    """One batch of prompts, token ids → each one's answer."""
    eos, device = tokenizer.eos_id, decoder.embed.weight.device
    ids, mask = left_pad(prompts, eos)
    how = dict(temperature=temperature, eos_id=eos, generator=generator)
    new = generate(decoder, ids.to(device), mask.to(device), max_new_tokens, **how)
    answers = []
    for tokens in new.tolist():
        if eos in tokens:
            tokens = tokens[: tokens.index(eos)]
        answers.append(tokenizer.decode(tokens))
    return answers


def answer_batches(
    decoder,
    tokenizer: Tokenizer,
    rows: list[Row],
    numbers: list[int],
    max_length: int,
    max_prompt_length: int,
    batch_size: int,
    temperature: float,
    seed: int = 0,
    desc: str = "answering",
) -> Iterator[list[tuple[int, str]]]:
    """Answer the rows with these numbers, prompts of like length together → lists of (number,
    answer). Limits are in tokens; temperature 0 is greedy."""
    generator = torch.Generator(decoder.embed.weight.device).manual_seed(seed)
    limit = min(max_prompt_length, max_length - 1)
    prompts = [encode_prompt(row.prompt, tokenizer, limit)[0] or [tokenizer.eos_id] for row in rows]
    max_new_tokens = max_length - max(map(len, prompts))  # what the longest prompt leaves
    order = sorted(numbers, key=lambda i: -len(prompts[i]))
    with tqdm(total=len(order), desc=desc, unit="row", leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            answers = answer(
                decoder,
                tokenizer,
                [prompts[i] for i in part],
                max_new_tokens,
                temperature,
                generator,
            )
            yield [(i, text.strip()) for i, text in zip(part, answers)]
            bar.update(len(part))


def share_of(decoder, count: int) -> list[int]:
    """Which of `count` rows this process works on. A sharded model needs all processes in step, so
    that each works on all rows."""
    if any(hasattr(p, "full_tensor") for p in decoder.parameters()):
        return list(range(count))
    return list(range(rank(), count, world_size()))


def answer_rows(
    decoder,
    tokenizer: Tokenizer,
    rows: list[Row],
    max_length: int,
    max_prompt_length: int,
    batch_size: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    desc: str = "answering",
) -> list[str]:
    """An answer to every row's prompt, in the rows' order. torchrun's processes share the rows; the
    same seed, batch size and number of processes give the same answers."""
    mine = share_of(decoder, len(rows))
    answers = {}
    for batch in answer_batches(
        decoder,
        tokenizer,
        rows,
        mine,
        max_length,
        max_prompt_length,
        batch_size,
        temperature,
        seed + 1_000_003 * mine[0] if mine else 0,
        desc,
    ):
        answers |= dict(batch)
    everything = {}
    for part in gather(answers):
        everything |= part
    return [everything[i] for i in range(len(rows))]
