"""Answers, token by token: a batch of prompts is continued until every row has ended.

new = generate(decoder, ids, mask, 256, eos_id=eos)     # left-padded prompts (B, T) → (B, N)
for ids in stream(decoder, …):                          # the same, one (B,) tensor at a time
"""

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of the tokens read so far, so that a step reads one token per row."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # tokens stored before the current forward pass
        self.layers = []  # keys and values, (B, kv_heads, capacity, head_dim) each

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


def generate(decoder, ids, mask, max_new_tokens, **how) -> torch.Tensor:
    """Continue LEFT-padded prompts (B, T), mask (B, T) true on real tokens → new ids (B, N).

    how: as in stream(). A row ends at its first eos_id and is filled up with it."""
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
    eos_id=None,
    generator=None,
):
    """Yield one (B,) tensor of new ids per step, as generate() returns them.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability. Ends
    early at the model's last position; raises ValueError where
    the prompt alone exceeds it."""
    rows, length = ids.shape
    positions = decoder.config.max_positions
    if length > positions:
        raise ValueError(f"{length} tokens, but this model has {positions} positions")
    end = min(length + max_new_tokens, positions)
    if mask is not None:
        mask = None if mask.all() else F.pad(mask.bool(), (0, end - length), value=True)
    cache = KVCache(end)
    running = torch.arange(rows, device=ids.device)  # the rows that are still computed
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    output = ids.new_full((rows,), 0 if eos_id is None else eos_id)
    training = decoder.training
    decoder.eval()
    new = ids
    while length < end:
        seen = None if mask is None else mask[:, :length]
        with torch.compiler.set_stance("force_eager"):  # --compile: each length would be compiled
            hidden = decoder(new, seen, cache)[:, -1]
        cache.length = length
        logits = decoder.logits(hidden).float()
        chosen = choose_tokens(logits, temperature, top_p, generator)
        if eos_id is not None:
            chosen = chosen.masked_fill(ended, eos_id)
            ended = chosen == eos_id
        yield output.index_copy(0, running, chosen)
        num_ended = int(ended.sum())
        if num_ended == len(ended):
            break
        if 2 * num_ended >= len(ended):  # drop them; each time copies the cache
            left = (~ended).nonzero().squeeze(1)
            cache.keep_rows(left)
            running, ended, chosen = running[left], ended[left], chosen[left]
            mask = None if mask is None else mask[left]
        new = chosen[:, None]
        length += 1
    decoder.train(training)


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
