"""Answers, token by token: a batch of prompts is continued until every row has ended.

new = generate(decoder, ids, mask, 256, eos_ids=[2])    # left-padded prompts (B, T) → (B, N)
for ids in stream(decoder, …):                          # the same, one (B,) tensor at a time
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from data import Row
from runtime.distributed import gather_rows, rank, world_size
from runtime.progress import Progress
from tokenize_align import Tokenizer, encode_prompt, left_pad

MAX_NEW_TOKENS = 256  # of every answer, as in the papers


class KVCache:
    """Keys and values of the tokens read so far, so that a step reads one token per row."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # tokens stored before the current forward pass
        self.layers = []  # keys and values, (B, kv_heads, capacity, head_dim) each
        self.of_library = None  # a cache of transformers (runtime/transformers_model.py)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        if layer == len(self.layers):
            shape = (*k.shape[:2], self.capacity, k.size(3))
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        keys, values = self.layers[layer]
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        if self.of_library is not None:
            self.of_library.batch_select_indices(rows)


def generate(decoder, ids, mask, max_new_tokens, **how) -> torch.Tensor:
    """Continue LEFT-padded prompts (B, T), mask (B, T) true on real tokens → new ids (B, N).

    how: as in stream(). A row ends at the first of eos_ids and is filled up with eos_ids[0]."""
    steps = list(stream(decoder, ids, mask, max_new_tokens, **how))
    return torch.stack(steps, 1) if steps else ids.new_empty(ids.size(0), 0)


@torch.no_grad()
def stream(
    decoder,
    ids,
    mask,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    eos_ids=(),
    generator=None,
    no_repeat_ngram=0,
):
    """Yield one (B,) tensor of new ids per step, as generate() returns them.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability;
    no_repeat_ngram N lets no row, prompt included, have the same N tokens twice. Ends early at the
    model's last position; raises ValueError where the prompt alone exceeds it."""
    rows, length = ids.shape
    positions = decoder.config.max_positions
    if length > positions:
        raise ValueError(f"{length} tokens, but this model has {positions} positions")
    end = min(length + max_new_tokens, positions)
    mask = None if mask.all() else F.pad(mask.bool(), (0, end - length), value=True)
    cache = KVCache(end)
    running = torch.arange(rows, device=ids.device)  # the rows that are still computed
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    filler = eos_ids[0] if eos_ids else 0
    ends = torch.tensor(eos_ids, dtype=torch.long, device=ids.device)
    output = ids.new_full((rows,), filler)
    training = decoder.training
    decoder.eval()
    new = ids
    while length < end:
        seen = None if mask is None else mask[:, :length]
        with torch.compiler.set_stance("force_eager"):  # --compile: each length would be compiled
            hidden = decoder(new, seen, cache)[:, -1]
        cache.length = length
        logits = decoder.logits(hidden).float()
        if 0 < no_repeat_ngram <= ids.size(1):
            forbid_repeats(logits, ids, no_repeat_ngram)
        chosen = choose_tokens(logits, temperature, top_p, generator)
        chosen = chosen.masked_fill(ended, filler)
        ended = torch.isin(chosen, ends)
        yield output.index_copy(0, running, chosen)
        num_ended = int(ended.sum())
        if num_ended == len(ended):
            break
        if 2 * num_ended >= len(ended):  # drop them; each time copies the cache
            left = (~ended).nonzero().squeeze(1)
            cache.keep_rows(left)
            running, ended, chosen, ids = running[left], ended[left], chosen[left], ids[left]
            mask = None if mask is None else mask[left]
        new = chosen[:, None]
        ids = torch.cat([ids, new], 1)
        length += 1
    decoder.train(training)


def forbid_repeats(logits: torch.Tensor, ids: torch.Tensor, size: int) -> None:
    """Set the logits (B, V) of tokens to −∞ that would end a sequence of `size` tokens that ids
    (B, T) have already: transformers' no_repeat_ngram_size."""
    windows = ids.unfold(1, size, 1)  # (B, T − size + 1, size)
    last = ids[:, ids.size(1) - size + 1 :]
    repeats = (windows[:, :, :-1] == last[:, None]).all(-1)
    rows, places = repeats.nonzero(as_tuple=True)
    logits[rows, windows[rows, places, -1]] = float("-inf")


def choose_tokens(logits, temperature, top_p, generator=None) -> torch.Tensor:
    """(B, V) → the next token of each row, (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # of all likelier tokens together
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        logits = ordered.gather(-1, index.argsort(-1))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def answer(
    decoder,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    **how,
) -> list[tuple[str, bool]]:
    """One batch of prompts, token ids → each one's answer, and whether it ended by itself.

    how: as in stream()."""
    ends, device = tokenizer.eos_ids, decoder.embed.weight.device
    ids, mask = left_pad(prompts, tokenizer.eos_id)
    new = generate(decoder, ids.to(device), mask.to(device), max_new_tokens, eos_ids=ends, **how)
    answers = []
    for tokens in new.tolist():
        length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append((tokenizer.decode(tokens[:length]), length < len(tokens)))
    return answers


def answer_batches(
    decoder,
    tokenizer: Tokenizer,
    rows: list[Row],
    numbers: list[int],
    max_length: int,
    max_prompt_length: int,
    batch_size: int = 32,
    seed: int = 0,
    desc: str = "answering",
    **how,
) -> Iterator[list[tuple[int, str, bool]]]:
    """Answer the rows with these numbers, prompts of like length together → lists of (number,
    answer, whether it ended by itself). An answer has at most MAX_NEW_TOKENS tokens, and at most
    max_length. how: temperature and more of stream()."""
    generator = torch.Generator(decoder.embed.weight.device).manual_seed(seed)
    limit = min(max_prompt_length, max_length - 1)
    prompts = {
        i: encode_prompt(rows[i], tokenizer, limit)[0] or [tokenizer.eos_id] for i in numbers
    }
    max_new_tokens = min(MAX_NEW_TOKENS, max_length)
    order = sorted(numbers, key=lambda i: -len(prompts[i]))
    progress = Progress(len(order), desc, "row")
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        answers = answer(
            decoder,
            tokenizer,
            [prompts[i] for i in part],
            max_new_tokens,
            generator=generator,
            **how,
        )
        yield [(i, text, ended) for i, (text, ended) in zip(part, answers)]
        progress.update(len(part))
    progress.close()


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
    *limits: int,
    seed: int = 0,
    **how,
) -> list[str]:
    """An answer to every row's prompt, in the rows' order. torchrun's processes share the rows; the
    same seed, batch size and number of processes give the same answers. limits and how: as in
    answer_batches()."""
    mine = share_of(decoder, len(rows))
    seed += 1_000_003 * min(mine, default=0)
    answers = {}
    for batch in answer_batches(decoder, tokenizer, rows, mine, *limits, seed=seed, **how):
        answers |= {i: text for i, text, _ in batch}
    return gather_rows(answers)
