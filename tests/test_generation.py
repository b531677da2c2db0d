"""Answers, token by token."""

import pytest
import torch

import model
from data import Row, read_rows
from runtime import generation, teacher_answers
from runtime.generation import KVCache, answer_rows, choose_tokens, generate
from tests.helpers import reference_model
from tokenize_align import load_tokenizer


def test_sampling():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)

    def draw(temperature=1.0, top_p=1.0):
        generator = torch.Generator().manual_seed(0)
        chosen = choose_tokens(logits, temperature, top_p, generator)
        return torch.bincount(chosen, minlength=4) / 4000

    assert (draw() - logits[0].softmax(-1)).abs().max() < 0.03
    assert (draw(temperature=2.0) - (logits[0] / 2).softmax(-1)).abs().max() < 0.03
    assert draw(top_p=0.7)[2:].sum() == 0 and draw(top_p=0.7)[1] > 0.2  # 0.64 alone is not enough
    assert draw(top_p=0.6)[0] == 1 and draw(temperature=0)[0] == 1


def test_rows_end_at_eos_and_leave(tmp_path):
    reference_model("gpt2", tmp_path)
    decoder, ids = model.load(tmp_path), torch.randint(3, 97, (6, 5))
    mask = torch.ones_like(ids)
    free = generate(decoder, ids, mask, 12, temperature=0)
    eos = int(free[0, 3])
    other = next(i for i in range(97) if i not in free)
    ended = generate(decoder, ids, mask, 12, temperature=0, eos_ids=[other, eos])
    for row, whole in zip(ended.tolist(), free.tolist()):
        cut = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert row[: len(cut)] == cut[: len(row)] and set(row[len(cut) :]) <= {other}
    assert generate(decoder, ids, mask, 999, temperature=0).size(1) == 64 - 5  # the last position
    with pytest.raises(ValueError, match="64 positions"):
        generate(decoder, torch.zeros(1, 65, dtype=torch.long), torch.ones(1, 65), 1)


def test_a_batch_answers_as_each_row_would(world):
    decoder, tokenizer = model.load(world / "teacher"), load_tokenizer(world / "teacher")
    rows = read_rows(world / "data/train.jsonl")[:9]
    together = answer_rows(decoder, tokenizer, rows, 60, 40, 4, temperature=0.0)
    for row, text in zip(rows, together):
        assert answer_rows(decoder, tokenizer, [row], 60, 40, 1, temperature=0.0)[0] == text
    seeds = [answer_rows(decoder, tokenizer, rows, 60, 40, 4, seed=seed) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_answers_keep_their_spaces(world, monkeypatch):
    """Code begins with them."""
    decoder, tokenizer = model.load(world / "teacher"), load_tokenizer(world / "teacher")
    body = "    return x\n"
    new = torch.tensor([tokenizer.encode(body) + [tokenizer.eos_id]])
    monkeypatch.setattr(generation, "generate", lambda *rest, **how: new)
    assert answer_rows(decoder, tokenizer, [Row("def f(x):\n", [])], 60, 40) == [body]


def test_prompts_are_answered_at_once_as_their_keys_and_values_fit(world, monkeypatch):
    decoder, cache = model.load(world / "teacher"), KVCache(10)
    with torch.no_grad():
        decoder(torch.zeros(40, 10, dtype=torch.long), cache=cache)
    sizes = [tensor.nbytes for layer in cache.layers for tensor in layer]
    monkeypatch.setattr(teacher_answers, "CACHE_BYTES", sum(sizes))
    assert teacher_answers.prompts_at_once(decoder, 10) == 40
    assert teacher_answers.prompts_at_once(decoder, 11) == 36
    assert teacher_answers.prompts_at_once(decoder, 1) == 128
    assert teacher_answers.prompts_at_once(decoder, 100) == 32
