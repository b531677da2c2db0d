"""Answers, token by token: a batch of prompts goes on until every row has ended.

    new = generate(decoder, ids, mask, 256, eos_id=eos)          # left-padded prompts (B, T) → new ids (B, N)
    for ids in stream(decoder, …):                               # the same, a (B,) tensor at a time

Keys and values of what was read are kept (KVCache), so that a step reads one token a row; rows that have ended are let
go of when they are half of all. With `compile_steps` (--compile) every step is the same computation over a FixedCache,
which torch.compile makes few kernels of, and CUDA graphs one launch."""
import math

import torch
import torch.nn.functional as F

from model import Decoder, computed_in

ROOM = 128          # a FixedCache's capacity is a multiple of it: every size is compiled once
LOOK = 16           # fixed steps from one look at whether every row has ended, for which a GPU must be waited for

class KVCache:
    """Keys and values of the tokens seen so far: a layer's lie in one (B, kv_heads, capacity, head_dim) buffer."""

    def __init__(self, capacity: int):
        self.capacity, self.layers = capacity, []       # [keys, values] of each layer
        self.length = 0                                 # tokens stored before the current forward pass

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if layer == len(self.layers):
            self.layers.append([x.new_zeros(*x.shape[:2], self.capacity, x.size(3)) for x in (k, v)])
        end = self.length + k.size(2)
        for stored, new in zip(self.layers[layer], (k, v)):
            stored[:, :, self.length:end] = new
        return [stored[:, :, :end] for stored in self.layers[layer]]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.layers = [[stored[rows] for stored in layer] for layer in self.layers]

class FixedCache:
    """What a KVCache holds, for steps that are all alike. The new token's place is a tensor, `at` (1,); keys and values
    are read to the capacity, under a mask. seen: (B, capacity), false on padding; window: of sliding attention."""

    def __init__(self, cache: KVCache, seen: torch.Tensor, window: int | None):
        self.layers, self.seen, self.window = cache.layers, seen, window or cache.capacity
        self.at = torch.full((1,), cache.length, device=seen.device)
        self.keys = torch.arange(cache.capacity, device=seen.device)
        for written in (self.at, self.seen, *(stored for layer in self.layers for stored in layer)):
            torch._dynamo.mark_static_address(written)          # a CUDA graph reads and writes where they lie

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        for stored, new in zip(self.layers[layer], (k, v)):
            stored.index_copy_(2, self.at, new)
        return self.layers[layer]

    def masks(self) -> dict[bool, torch.Tensor]:
        """As Decoder.masks gives them, (B, 1, 1, capacity)."""
        full = self.seen & (self.keys <= self.at)
        sliding = full & (self.keys > self.at - self.window)
        return {False: full[:, None, None], True: sliding[:, None, None]}

def generate(decoder: Decoder, ids, mask, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, eos_id=None,
             generator=None) -> torch.Tensor:
    """Continue LEFT-padded prompts (B, T), mask (B, T) true on real tokens → new ids (B, N), N ≤ max_new_tokens.
    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability, top_k (0 = all) the k
    likeliest. A row ends at its first eos_id and is filled up with it. `generator` makes sampling repeatable. Ends
    early at the model's last position; raises ValueError where the prompt alone exceeds it."""
    steps = list(stream(decoder, ids, mask, max_new_tokens, temperature, top_p, top_k, eos_id, generator))
    return torch.stack(steps, 1) if steps else ids.new_empty(ids.size(0), 0)

@torch.no_grad()
def stream(decoder: Decoder, ids, mask, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, eos_id=None,
           generator=None):
    """Yield one (B,) tensor of new ids a step, as `generate` returns them; ends when every row has ended."""
    if ids.size(1) > (positions := decoder.config.max_positions):
        raise ValueError(f"{ids.size(1)} tokens, but this model has {positions} positions")
    end, mask = min(ids.size(1) + max_new_tokens, positions), None if mask is None or mask.all() else mask.bool()
    training, steps = decoder.training, _steps if decoder.fixed_step is None else _fixed_steps
    decoder.eval()
    try:
        yield from steps(decoder, ids, mask, end, (temperature, top_p, top_k, generator), eos_id)
    finally:
        decoder.train(training)

def _steps(decoder, ids, mask, end, sampling, eos_id):
    cache, alive = KVCache(end), torch.arange(ids.size(0), device=ids.device)           # rows that are computed
    over, output = torch.zeros_like(alive).bool(), ids.new_full((ids.size(0),), 0 if eos_id is None else eos_id)
    new, positions = ids, decoder.positions(ids, mask).expand_as(ids)
    seen = None if mask is None else F.pad(mask, (0, end - ids.size(1)), value=True)
    bias = _bias(decoder, seen)
    for length in range(ids.size(1), end):
        hidden = decoder.step(new, positions, _step_masks(decoder, seen, bias, new.size(1), length), cache)
        cache.length = length
        chosen, over = _choose(decoder, hidden, over, sampling, eos_id)
        yield output.index_copy(0, alive, chosen)
        left = len(over) if eos_id is None else len(over) - int(over.sum())
        if not left:
            break
        if 2 * left <= len(over):           # rows that have ended are only let go of when they are half of all
            keep = (~over).nonzero().squeeze(1)
            cache.keep_rows(keep)
            alive, over, chosen, positions = (x[keep] for x in (alive, over, chosen, positions))
            seen, bias = (None if x is None else x[keep] for x in (seen, bias))
        new, positions = chosen[:, None], positions[:, -1:] + 1

def _choose(decoder, hidden, over, sampling, eos_id) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of every row, EOS where it is over, and which rows are over now: (B,) each."""
    chosen = choose_tokens(decoder.logits(hidden).float(), *sampling)
    if eos_id is None:
        return chosen, over
    chosen = chosen.masked_fill(over, eos_id)
    return chosen, chosen == eos_id

def _bias(decoder, seen: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to one new token's scores: (B, 1, 1, capacity), −∞ on padding; None where there is none. Made once,
    in the type that attention computes in."""
    if seen is None:
        return None
    dtype = computed_in(decoder.embed.weight)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)[:, None, None]

def _step_masks(decoder, seen, bias, queries: int, length: int) -> dict[bool, torch.Tensor | None]:
    """Decoder.masks of a prompt, or of one new token, which needs none but where rows are padded or a window slides."""
    window = decoder.config.sliding_window
    if queries > 1 or window is not None and length > window and any(decoder.config.sliding_layers):
        return decoder.masks(None if seen is None else seen[:, :length], queries, length, decoder.embed.weight.device)
    return dict.fromkeys((False, True), None if bias is None else bias[..., :length])

def choose_tokens(logits, temperature, top_p, top_k, generator) -> torch.Tensor:
    """Choose one token a row: logits (B, V) → ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p      # the first token past the mass still counts
        logits = ordered.masked_fill(beyond, float("-inf")).gather(-1, index.argsort(-1))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

# ---------------------------------------------------------------------------------------------------------- compiled
def compile_steps(decoder: Decoder) -> None:
    """From now on stream() compiles a step, on a GPU as a CUDA graph; the first of every size takes its time."""
    def step(new, positions, cache):
        hidden = decoder.step(new, positions, cache.masks(), cache)
        cache.at.add_(1)
        return hidden
    graphs = decoder.embed.weight.device.type == "cuda"
    decoder.fixed_step, decoder.fixed = torch.compile(step, mode="reduce-overhead" if graphs else None), {}

def _fixed_steps(decoder, ids, mask, end, sampling, eos_id):
    """_steps where no row is let go of, and the GPU is waited for only now and then. The FixedCache stays for the next
    prompts of its size, whose graph is there."""
    (rows, length), cache = ids.shape, KVCache(-(-end // ROOM) * ROOM)
    size = rows, cache.capacity, computed_in(decoder.embed.weight), ids.device
    if fixed := decoder.fixed.get(size):
        cache.layers = fixed.layers
    positions = decoder.positions(ids, mask).expand_as(ids)
    hidden = decoder.step(ids, positions, decoder.masks(mask, length, length, ids.device), cache)
    cache.length = length
    seen = torch.ones(rows, cache.capacity, dtype=torch.bool, device=ids.device)
    if mask is not None:
        seen[:, :length] = mask
    if fixed is None:
        fixed = FixedCache(cache, seen, decoder.config.sliding_window)
        decoder.fixed = {size: fixed}           # the one before goes
    else:
        fixed.seen.copy_(seen)
        fixed.at.fill_(length)
    over = torch.zeros_like(ids[:, 0]).bool()
    for place in range(length, end):
        chosen, over = _choose(decoder, hidden, over, sampling, eos_id)
        yield chosen
        if place + 1 == end or eos_id is not None and (place - length) % LOOK == 0 and over.all():
            break
        positions = positions[:, -1:] + 1
        hidden = decoder.fixed_step(chosen[:, None], positions, fixed)
