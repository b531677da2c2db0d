"""The claims a reader should check, each against something that was not written here.

    pip install -r requirements-test.txt && pytest -q           # this file and tests/
    pytest -q test_all.py -k golden                             # the stored values alone

golden/ holds reference values of the methods' own releases on tiny models (GOLDEN_DIR names another
folder of the same make). Tests on real vocabularies and text find them in NANODSKD_FIXTURES, by
default ../shared, and are skipped where that is not there. tests/ has the rest: files, runs that
are killed, several processes, tools."""

import itertools
import json
import math
import random
import string
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cma
import discriminator
import model
import tokenize_align as ta
from data import Row, read_rows
from eval_rouge import answer_bits, rouge_l
from hub.tokenizer_files import ALPHABET
from methods import alm, blocks, byte_kd, dwa_kd, find_method, method_names, mined, plain
from methods.divergences import DIVERGENCES
from methods.projector_init import init_from_shared
from methods.shared_tokens import ChunksOfBatch
from methods.soft_dtw import dtw_divergences, soft_dtw
from porter import stem
from runtime.generation import generate
from tests.helpers import (
    CONTROL_TEXT,
    FAMILIES,
    FIXTURES,
    GOLDEN,
    HOSTILE,
    TEXTS,
    WAYS,
    chunks,
    close,
    cut_to,
    golden_batch,
    golden_models,
    golden_projectors,
    num_tokens,
    objective,
    on_both_sides,
    options,
    random_models,
    real_vocabularies,
    reference_model,
    small_modules,
    texts,
    two_sides,
)

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
GRADIENTS = load_file(GOLDEN / "expected_grads.safetensors")
BATCHES = ("full", "ragged")
STORED = [("dskd_clp", "forward_kl"), ("dskd_cla", "forward_kl"), ("dwa_kd", ""), ("uld", "")]
STORED += [(method, name) for method in ("kd", "dskd", "dskd_cma") for name in DIVERGENCES]


# ----------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("batch_name", BATCHES)
def test_golden_forward(batch_name):
    batch = golden_batch(batch_name)
    stored = load_file(GOLDEN / f"forward_{batch_name}.safetensors")
    for side, decoder in zip(("student", "teacher"), golden_models()):
        real = batch[f"{side}_mask"].bool()
        computed = []
        decoder.layers[0].mlp.register_forward_pre_hook(lambda _, x: computed.append(x[0].shape))
        hidden = decoder(batch[f"{side}_ids"], real)
        assert computed == [(1, real.sum(), hidden.size(2))]  # no padding
        close(hidden[real].detach(), stored[f"{side}_hidden"][real])
        close(decoder.logits(hidden)[real].detach(), stored[f"{side}_logits"][real])


@pytest.mark.parametrize("method, name", STORED)
@pytest.mark.parametrize("batch_name", BATCHES)
def test_golden_losses_and_gradients(batch_name, method, name, monkeypatch):
    """Every term and every gradient that is stored; DWA-KD's have its ramp at its end."""
    monkeypatch.setattr(dwa_kd, "RAMP_STEPS", 1)
    same = method in ("kd", "dskd")
    batch, (student, teacher) = golden_batch(batch_name, same), golden_models(same)
    modules = {}
    if method not in ("kd", "uld"):
        modules["projectors"] = golden_projectors(method, student, teacher)
    chosen = options(method, **({"divergence": name} if name else {}))
    of_batch = objective(chosen, batch)
    total, terms = find_method(method).loss(batch, student, teacher, modules, of_batch)
    terms |= {"uld_loss": terms["kd_loss"]}

    key = "/".join(filter(None, (batch_name, method, name)))
    stored = {k: v for k, v in EXPECTED[key].items() if "_weight_" not in k}
    for term, value in stored.items():
        if term != "loss":
            close(terms[term], value)
    assert {"nll_loss", "loss"} <= stored.keys()
    close(total.detach(), stored["loss"])
    total.backward()
    gradients = {
        "student.wte": student.embed.weight.grad,
        "student.h.0.attn.c_attn": student.layers[0].attn.c_attn.weight.grad.t(),
    }
    for module, parameter in (
        ("t2s", "t2s"),
        ("s2t", "s2t"),
        ("query", "query"),
        ("dtw_embed_t2s", "dtw_embed"),
    ):
        projector = getattr(modules.get("projectors"), parameter, None)
        if projector is not None:
            gradients[f"{module}.weight"] = projector.weight.grad
    stored = {k.removeprefix(f"{key}/"): v for k, v in GRADIENTS.items() if k.startswith(f"{key}/")}
    assert "student.wte" in stored
    for parameter, gradient in stored.items():
        close(gradients[parameter], gradient)
    given = {parameter for parameter, gradient in gradients.items() if gradient is not None}
    assert given - stored.keys() <= {"student.h.0.attn.c_attn"}


@pytest.mark.parametrize("batch_name", BATCHES)
def test_golden_sft(batch_name):
    batch, (student, _) = golden_batch(batch_name), golden_models()
    _, terms = find_method("sft").loss(batch, student, None, {}, objective(options("sft"), batch))
    for term, value in terms.items():
        close(value, EXPECTED[f"{batch_name}/kd/forward_kl"][term])


@pytest.mark.parametrize("batch_name", BATCHES)
def test_golden_entropy_weights(batch_name):
    """Those of the first example, which the losses above only show mixed together."""
    batch, (student, teacher) = golden_batch(batch_name), golden_models()
    s, t = blocks.student_side(batch, student), blocks.teacher_side(batch, teacher)
    for side, weights in zip((s, t), cma.entropy_weights(s, t)):
        name = "student" if side is s else "teacher"
        stored = torch.tensor(EXPECTED[f"{batch_name}/dwa_kd"][f"{name}_weight_0"])
        close(weights[: side.counts[0]], stored[batch[f"{name}_labels"][0] != -100])
        entropy = torch.distributions.Categorical(logits=F.linear(side.hidden, side.head)).entropy()
        close(blocks.entropies(side.hidden, side.head), entropy.detach())


ADVERSARY_NAMES = {
    "gan": {"highway.linear": "kq_highway1", "linear1": "kq_linear1", "linear2": "kq_linear2"},
    "ct": {
        "highway.linear": "kq_highway1",
        "feature1": "kq_linear3",
        "feature2": "kq_linear4",
        "navigator1": "kq_linear5",
        "navigator2": "kq_linear6",
    },
}


@pytest.mark.parametrize("batch_name, kind", [("full", "gan"), ("ragged", "gan"), ("full", "ct")])
def test_golden_adversary(batch_name, kind):
    """The stored gan calls queries 1 and keys 0, ours is the other way round: C with its last layer
    negated."""
    stored = load_file(GOLDEN / "adversary.safetensors")
    hidden, size = stored["kq_linear1.weight"].shape
    make = {"gan": discriminator.Discriminator, "ct": discriminator.Transport}[kind]
    adversary = make(size, hidden).eval()
    state = {}
    for ours, theirs in ADVERSARY_NAMES[kind].items():
        sign = -1 if ours == "linear2" else 1
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = sign * stored[f"{theirs}.{part}"]
    adversary.load_state_dict(state)
    batch, (student, teacher) = golden_batch(batch_name), golden_models()
    projectors = golden_projectors("dskd_cma", student, teacher)
    s, t = blocks.student_side(batch, student), blocks.teacher_side(batch, teacher)
    aligned = cma.align(s, t, projectors)
    chosen = objective(options("dskd_cma_ga", ga_weight=1.0, adversary=kind), batch)
    loss, _ = discriminator.key_query_loss(
        kind, adversary, aligned.keys, aligned.queries, s, t, chosen
    )
    close(loss.detach(), EXPECTED[f"{batch_name}/adversary/{kind}"]["kq_loss"])
    loss.backward()
    key = f"{batch_name}/adversary/{kind}"
    close(projectors.query.weight.grad, GRADIENTS[f"{key}/query.weight"])
    for ours, theirs in ADVERSARY_NAMES[kind].items():
        sign = -1 if ours == "linear2" else 1
        gradient = adversary.get_parameter(f"{ours}.weight").grad
        close(sign * gradient, GRADIENTS[f"{key}/{theirs}.weight"])


@pytest.mark.parametrize("batch_name", BATCHES)
def test_golden_soft_dtw(batch_name):
    cost = GRADIENTS[f"{batch_name}/soft_dtw/cost"]
    lengths = torch.tensor(cost.shape)[:, None]
    assert len(EXPECTED[f"{batch_name}/soft_dtw"]) == 4
    for gamma, value in EXPECTED[f"{batch_name}/soft_dtw"].items():
        close(soft_dtw(cost[None], *lengths, float(gamma))[0], value)


@pytest.mark.parametrize("batch_name", BATCHES)
def test_the_fast_code_equals_the_plain(batch_name):
    """methods/plain.py and what train.py runs: the same loss, the same gradients of all that
    learns."""
    batch = golden_batch(batch_name)
    results = []
    for fast in (False, True):
        student, teacher = golden_models()
        modules = small_modules("dskd_cma_ga", student, teacher, "gan")
        if fast:
            chosen = options("dskd_cma_ga", kd_rate=0.3, ga_weight=0.7)
            loss, _ = find_method("dskd_cma_ga").loss(
                batch, student, teacher, modules, objective(chosen, batch)
            )
        else:
            loss = plain.dskd_cma_ga(batch, student, teacher, **modules, α=0.3, λ_GA=0.7)
        loss.backward()
        gradients = [p.grad for module in (student, *modules.values()) for p in module.parameters()]
        results.append((loss.detach(), gradients))
    close(results[1][0], results[0][0], 1e-5)
    assert len(results[0][1]) > 30
    for ours, reference in zip(results[1][1], results[0][1]):
        close(ours, reference)


# --------------------------------------------------------------- models against transformers


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_equal_transformers(family, tmp_path):
    """Logits, left padding, greedy text, and what save() writes."""
    reference = reference_model(family, tmp_path / "theirs")
    ours = model.load(tmp_path / "theirs")
    ids, mask = torch.randint(3, 97, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    close(ours.logits(ours(ids)), reference(ids).logits)
    mask[1, :7], mask[2, :3] = 0, 0
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    expected = reference(ids, attention_mask=mask, position_ids=positions).logits
    close(ours.logits(ours(ids, mask))[mask.bool()], expected[mask.bool()])
    how = dict(max_new_tokens=30, do_sample=False, pad_token_id=2, eos_token_id=2)
    for some in (mask, torch.ones_like(mask)):
        greedy = reference.generate(ids, attention_mask=some, **how)[:, 20:]
        assert torch.equal(generate(ours, ids, some, 30, temperature=0, eos_ids=[2]), greedy)
    ids = torch.randint(3, 7, (3, 20))  # few tokens, so that sequences of them repeat
    for size in (1, 2, 3):
        few = reference.generate(ids, attention_mask=mask, **how, no_repeat_ngram_size=size)[:, 20:]
        new = generate(ours, ids, mask, 30, temperature=0, eos_ids=[2], no_repeat_ngram=size)
        assert torch.equal(new, few)
    ours.save(tmp_path / "ours")
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    close(again(ids).logits, reference(ids).logits, 1e-6)


@torch.no_grad()
def test_a_cache_of_several_new_tokens(tmp_path):
    """Ids that continue a cache have the hidden states of the whole row."""
    from runtime.generation import KVCache

    for family in ("gpt2", "mistral"):
        reference_model(family, tmp_path)
        decoder, ids, cache = model.load(tmp_path), torch.randint(3, 97, (2, 12)), KVCache(12)
        first = decoder(ids[:, :7], None, cache)
        cache.length = 7
        close(torch.cat([first, decoder(ids[:, 7:], None, cache)], 1), decoder(ids), 1e-5)


def test_compile_takes_all_layers_at_once():
    """torch.compile breaks where the mask is read, and nowhere behind that."""
    from torch._dynamo.testing import CompileCounter

    decoder, counter = model.load(GOLDEN / "teacher"), CompileCounter()
    decoder.compile(backend=counter, dynamic=True)
    for length in (9, 12):
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, 5:] = False
        decoder(torch.randint(3, 97, (2, length)), mask)
    assert 0 < counter.frame_count <= 4


def test_short_rows_attend_in_float32_on_a_cpu():
    """In bfloat16, attention and its gradients are float32's, rounded once."""
    config = model.read_config(GOLDEN / "teacher" / "config.json")
    attention, found = model.LlamaAttention(config, 0), []
    torch.manual_seed(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    inputs = [torch.randn(2, count, 9, config.head_dim).bfloat16() for count in heads]
    upstream = torch.randn(2, 9, config.num_heads * config.head_dim).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        y = attention.attend(*given, model.Context())
        found.append([y, *torch.autograd.grad(y, given, upstream.to(dtype))])
    for exact, rounded in zip(*found):
        assert torch.equal(rounded, exact.bfloat16())


def test_lora_equals_peft(tmp_path):
    """The adapter that a checkpoint leaves gives, through peft, the logits of ours; so do the
    merged weights."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from runtime import lora

    for family in ("gpt2", "qwen2.5"):
        folder = tmp_path / family
        reference_model(family, folder / "base")
        decoder = model.load(folder / "base")
        lora.add_lora(decoder, 4, 8.0)
        decoder.eval()
        for layer in lora.lora_layers(decoder).values():
            torch.nn.init.normal_(layer.b, std=0.1)
        ids = torch.randint(3, 97, (2, 9))
        ours = decoder.logits(decoder(ids)).detach()
        lora.save_adapter(folder / "adapter", decoder, decoder.state_dict(), str(folder / "base"))
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        close(ours, peft.PeftModel.from_pretrained(base, folder / "adapter")(ids).logits.detach())
        decoder.save(folder / "merged", lora.merged(decoder, decoder.state_dict()))
        merged = model.load(folder / "merged")
        close(merged.logits(merged(ids)).detach(), ours)
    name, layer = next(iter(lora.lora_layers(decoder.bfloat16()).items()))
    layer.b.data *= 1e-3  # small updates are not rounded away
    state = decoder.state_dict()
    change = lora.merged(decoder, state)[f"{name}.weight"] - layer.linear.weight.float()
    close(change.detach(), (layer.scale * layer.b.float() @ layer.a.float()).detach(), 1e-3)


# ------------------------------------------------------------------------------- tokenizers


def reference_tokenizer(name: str):
    """A reference encoder of the tokenizers library, with control tokens read as text."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = FIXTURES / "tokenizers" / name
    if name == "gpt2":
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif name == "qwen1.5":
        transformers = pytest.importorskip("transformers")
        reference = transformers.AutoTokenizer.from_pretrained(folder)._tokenizer
    else:
        reference = sentencepiece_as_bpe(tokenizers, str(folder / "tokenizer.model"))
    reference.encode_special_tokens = True
    return lambda text: reference.encode(text, add_special_tokens=False).ids


def sentencepiece_as_bpe(tokenizers, path: str):
    """The tokenizer.json that Llama 2 and Mistral are published with, made from the pieces."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    order = [
        i
        for i in range(pieces.vocab_size())
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
    ]
    merges = []
    for i in sorted(order, key=lambda i: -pieces.get_score(i)):
        token = pieces.id_to_piece(i)
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(splits, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    bpe = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    reference = tokenizers.Tokenizer(bpe)
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    reference.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    return reference


def spans_that_tile(tokenizer, text: str):
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text) and len(ids) == len(spans)
    if ids:
        assert spans[0][0] == 0 and spans[-1][1] == len(text.encode())
        assert all(a[1] == b[0] and b[0] <= b[1] for a, b in zip(spans, spans[1:]))
    return ids, spans


@real_vocabularies
@pytest.mark.parametrize("name", ("gpt2", "qwen1.5", "llama2", "mistral"))
def test_tokenizers_equal_the_reference(name):
    ours = ta.load_tokenizer(FIXTURES / "tokenizers" / name, "raw")
    reference = reference_tokenizer(name)
    for text in texts():
        ids, spans = spans_that_tile(ours, text)
        if name == "qwen1.5" and text == CONTROL_TEXT:
            continue  # the reference has no switch that reads Qwen's control tokens as text
        assert ids == reference(text), repr(text)
        if name != "qwen1.5" and "▁" not in text:
            assert ours.decode(ids) == text
            space = b"" if name == "gpt2" or not text else b" "
            assert b"".join(map(ours.token_bytes, ids)) == space + text.encode()
    expected = {
        "gpt2": (50257, 50256, None),
        "qwen1.5": (151646, 151643, None),
        "llama2": (32000, 2, 1),
        "mistral": (32000, 2, 1),
    }
    assert (ours.vocab_size, ours.eos_id, ours.bos_id) == expected[name]
    assert ours.decode([ours.eos_id]) == ""


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)


def split_by(pattern: str) -> dict:
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    return dict(type="Sequence", pretokenizers=[split, BYTE_LEVEL | dict(use_regex=False)])


DIGITS = dict(type="Digits", individual_digits=True)
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": dict(type="Sequence", pretokenizers=[DIGITS, BYTE_LEVEL]),
    "llama3": split_by(LLAMA3_SPLIT),
    "qwen": split_by(LLAMA3_SPLIT),
    "words": split_by(r"\p{L}+"),  # leaves out what is between: it is a word of its own
}


def write_byte_level(folder: Path, kind: str) -> dict:
    """A tokenizer.json of the tokenizers library with a few merges."""
    from tokenizers import Tokenizer, models

    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("1", "2")]
    merges += [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("!", "!"), ("Ġ", "1"), ("Ċ", "Ċ")]
    tokens = list(ALPHABET) + [a + b for a, b in merges]
    if kind == "llama3":
        tokens.append("world")  # a word that is a token is taken as it is
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama3")
    content = json.loads(Tokenizer(bpe).to_str())
    eos = dict(id=len(tokens), content="<eos>", special=True, normalized=False)
    eos |= dict(single_word=False, lstrip=False, rstrip=False)
    content |= dict(pre_tokenizer=PRE_TOKENIZERS[kind], added_tokens=[eos])
    content["normalizer"] = {"type": "NFC"} if kind == "qwen" else None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return content


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_split_patterns_come_from_the_file(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_str(json.dumps(write_byte_level(tmp_path, kind)))
    reference.encode_special_tokens = True
    ours = ta.load_tokenizer(tmp_path)
    for text in [*texts(), "hello world 121212 1  2    !!!! <eos>"]:
        assert spans_that_tile(ours, text)[0] == reference.encode(text).ids, repr(text)


def test_nfc_spans_point_into_the_original(tmp_path):
    pytest.importorskip("tokenizers")
    write_byte_level(tmp_path, "qwen")
    tokenizer = ta.load_tokenizer(tmp_path)
    ids, spans = spans_that_tile(tokenizer, "he e\u0301 x")  # é: 2 bytes after NFC, 3 before
    assert [tokenizer.token_bytes(i) for i in ids] == [b"he", b" ", b"\xc3", b"\xa9", b" ", b"x"]
    assert spans == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 8)]


def chunk_mask(a, b) -> torch.Tensor:
    """(len_a, len_b), true where two tokens have the same chunk."""
    numbers_a, numbers_b = ta.chunk_numbers(a, b)
    return torch.tensor(numbers_a)[:, None] == torch.tensor(numbers_b)[None]


def test_chunks():
    # The cuts are 2 and 6, then EOS.
    a, b = [(0, 2), (2, 5), (5, 6), (6, 6)], [(0, 1), (1, 2), (2, 4), (4, 6), (6, 6)]
    expected = [(range(0, 1), range(0, 2)), (range(1, 3), range(2, 4)), (range(3, 4), range(4, 5))]
    assert chunks(a, b) == expected
    mask = [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert chunk_mask(a, b).int().tolist() == mask
    assert ta.chunk_numbers([(0, 2), (2, 4)], [(0, 2)]) == ([0, 1], [0])  # one side is cut


@real_vocabularies
def test_chunks_of_real_vocabularies():
    first, second = (ta.load_tokenizer(FIXTURES / "tokenizers" / n) for n in ("gpt2", "llama2"))
    for text in texts()[:150]:
        a, b = first.encode_with_spans(text)[1], second.encode_with_spans(text)[1]
        mask = torch.zeros(len(a), len(b), dtype=torch.bool)
        if len(a) * len(b) > 10_000 or not text:
            continue
        for of_a, of_b in chunks(a, b):
            mask[of_a.start : of_a.stop, of_b.start : of_b.stop] = True
        assert torch.equal(chunk_mask(a, b), mask)


def test_one_vocabulary_has_one_answer(world):
    """Where the two models read prompts of different lengths, both sides are cut alike."""
    student, teacher = (ta.load_tokenizer(world / "student", f) for f in ("raw", "alpaca"))
    rows = [Row("say it", [text]) for text in TEXTS]
    longest_prompt = len(teacher.prompt_ids(rows[0]))
    examples, _, _ = ta.encode_rows(rows, student, teacher, longest_prompt + 5, 999)
    assert any(example.student.ids[-1] != student.eos_id for example in examples)
    for example in examples:
        assert example.student.response_ids == example.teacher.response_ids


@pytest.mark.parametrize("way", WAYS)
def test_whole_chunks_are_those_that_no_cut_touches(way, world):
    """Wherever either side is cut."""
    touched = 0
    for e in two_sides(world, way)[1]:
        sizes = len(e.student.response_ids), len(e.teacher.response_ids)
        for n_s, n_t in itertools.product(range(1, sizes[0] + 1), range(1, sizes[1] + 1)):
            kept = set(e.student.chunks[:n_s]) & set(e.teacher.chunks[:n_t])
            whole = kept - set(e.student.chunks[n_s:]) - set(e.teacher.chunks[n_t:])
            touched += len(whole) < len(kept)
            part = ta.Example(e.row, e.text, cut_to(e.student, n_s), cut_to(e.teacher, n_t))
            assert set(range(part.num_whole_chunks)) == whole
    assert touched > 20 or way == (0, 0)


def test_examples_and_batches(world):
    rows = read_rows(world / "data/train.jsonl")
    student, teacher = (ta.load_tokenizer(world / side) for side in ("student", "teacher"))
    examples, cut, dropped = ta.encode_rows(rows, student, teacher, 128, 100)
    assert (len(examples), cut, dropped) == (len(rows), 0, 0)
    for row, example in zip(rows, examples):
        for tokenizer, side in ((student, example.student), (teacher, example.teacher)):
            response = tokenizer.encode(row.outputs[0]) + [tokenizer.eos_id]
            assert side.ids == tokenizer.encode(row.prompt) + response
            assert side.spans[-1] == (len(row.outputs[0].encode()),) * 2
    batches = ta.make_batches(examples, 8, seed=1)
    assert sorted(e.row for b in batches for e in b) == list(range(len(rows)))
    assert batches == ta.make_batches(examples, 8, seed=1) != ta.make_batches(examples, 8, seed=2)
    batch = ta.collate(batches[0], 0, 0)
    assert batch["student_ids"].size(1) == max(len(e.student.ids) for e in batches[0]) - 1
    for i, example in enumerate(batches[0]):
        s, labels = example.student, batch["student_labels"][i]
        assert labels[labels != -100].tolist() == s.response_ids
        assert batch["student_ids"][i][: len(s.ids) - 1].tolist() == s.ids[:-1]
    # A text that is cut keeps the chunks of the whole one.
    whole = {e.row: e for e in examples}
    longest = max(len(e.student.ids) for e in examples)
    for e in ta.encode_rows(rows, student, teacher, longest - 2, 100)[0]:
        chunks = whole[e.row].student.chunks
        assert e.student.chunks == chunks[: len(e.student.response_ids)]
    _, cut, _ = ta.encode_rows(rows, student, teacher, 128, 5)
    assert cut == len(rows)
    assert ta.encode_rows(rows, student, teacher, 4, 4)[2] == len(rows)  # only prompt fits


# ----------------------------------------------------------------------------------- scores


def test_rouge_l_equals_rouge_score():
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")
    rng = random.Random(0)
    words = "the cat cats fly flies sat running run runs happily 12 national ÉTÉ don't".split()
    words += ["generalization", "a"]
    sentences = [" ".join(rng.choices(words, k=rng.randint(0, 20))) for _ in range(400)]
    if (FIXTURES / "data").is_dir():
        rows = read_rows(FIXTURES / "data/dolly/train.jsonl")[:100]
        sentences += [row.outputs[0] for row in rows]
    predictions = rng.sample(sentences, len(sentences))
    scorer = scorer_module.RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(sentences, predictions)]
    close(rouge_l(predictions, sentences), expected, 1e-9)
    pairs = list(zip(sentences, reversed(sentences)))
    expected = [
        max(scorer.score(r, p)["rougeL"].fmeasure for r in pair)
        for pair, p in zip(pairs, predictions)
    ]
    close(rouge_l(predictions, [list(pair) for pair in pairs]), expected, 1e-9)


def test_porter_equals_nltk():
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    rng = random.Random(0)
    endings = "s es ies ied ed eed ing ational ization fulness ously ement ion y le ll logi alli"
    words = set()
    for _ in range(20000):
        start = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6)))
        words.add(start + rng.choice(endings.split()) + rng.choice(["", "s", "ed", "ly"]))
    words |= {"sky", "dying", "news", "happy", "enjoy", "by", "flies", "dies", "agreed", "feed"}
    for word in words:
        assert stem(word) == porter.stem(word), word


@pytest.mark.parametrize("side", ("student", "teacher"))
def test_bits_against_transformers(side, world):
    transformers = pytest.importorskip("transformers")
    decoder, tokenizer = model.load(world / side), ta.load_tokenizer(world / side)
    reference = transformers.AutoModelForCausalLM.from_pretrained(world / side).eval()
    rows = read_rows(world / "data/dev.jsonl")
    for row, (bits, size, whole) in zip(rows, answer_bits(decoder, tokenizer, rows, 99, 60)):
        prompt_ids, answer = tokenizer.encode(row.prompt), row.outputs[0]
        ids = torch.tensor([prompt_ids + tokenizer.encode(answer) + [tokenizer.eos_id]])
        log_p = reference(ids).logits.detach()[0, :-1].log_softmax(-1)
        nats = -log_p.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum()
        close(bits, nats / math.log(2), 1e-5)
        assert size == len(answer.encode()) and whole


# ---------------------------------------------------------------------- the methods, defined


def all_paths(s: int, t: int) -> list:
    """Every warping path from (0, 0) to (s − 1, t − 1)."""
    if (s, t) == (1, 1):
        return [[(0, 0)]]
    before = [(s - 1, t), (s, t - 1), (s - 1, t - 1)]
    return [path + [(s - 1, t - 1)] for a, b in before if a and b for path in all_paths(a, b)]


@pytest.mark.parametrize("gamma", (0.05, 1.0, 10.0))
def test_soft_dtw_from_its_definition(gamma):
    """−γ log Σ over paths exp(−cost/γ), and the alignment matrix as the paths' weights; three
    ragged pairs at once."""
    torch.manual_seed(0)
    cost = torch.rand(3, 5, 6, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 1, 3]), torch.tensor([4, 6, 1])
    values = soft_dtw(cost, *lengths, gamma)
    values.sum().backward()
    for k, (s, t) in enumerate(zip(lengths[0].tolist(), lengths[1].tolist())):
        paths = all_paths(s, t)
        costs = torch.stack([sum(cost[k, i, j] for i, j in path) for path in paths]).detach()
        close(values[k].detach(), -gamma * (-costs / gamma).logsumexp(0), 1e-9)
        alignment = torch.zeros(5, 6, dtype=torch.float64)
        for path, weight in zip(paths, (-costs / gamma).softmax(0)):
            for i, j in path:
                alignment[i, j] += weight
        close(cost.grad[k], alignment, 1e-9)
    assert torch.autograd.gradcheck(lambda c: soft_dtw(c, *lengths, gamma), (cost,))


@pytest.mark.parametrize("gamma", (0.01, 1.0))
def test_soft_dtw_is_stable(gamma):
    torch.manual_seed(0)
    cost, lengths = 2 * torch.rand(2, 300, 300), (torch.tensor([300, 200]), torch.tensor([300, 37]))
    results = []
    for dtype in (torch.float32, torch.float64):
        x = cost.to(dtype, copy=True).requires_grad_()
        value = soft_dtw(x, *lengths, gamma)
        value.sum().backward()
        results.append((value.detach(), x.grad))
    close(results[0][0], results[1][0], 1e-5)
    close(results[0][1], results[1][1], 5e-3)
    assert (results[0][1][1, 200:] == 0).all() and (results[0][1][1, :, 37:] == 0).all()


def test_terms_of_dwa_kd():
    """The band as its docstring writes it, cell by cell; the schedules; a sequence is nearer to
    itself than to another."""
    torch.manual_seed(0)
    lengths = torch.tensor([19, 5]), torch.tensor([34, 6])
    attention = torch.randn(2, 19, 34).mul(6)
    outside = torch.arange(34) >= lengths[1][:, None, None]
    attention = attention.masked_fill(outside, -1e5).softmax(-1)
    attention[0, 4] = 0  # nothing is aligned with it
    penalty = dwa_kd.band_penalty(attention, *lengths)
    for k in range(2):
        for i in range(lengths[0][k]):
            row, diagonal = attention[k, i][: lengths[1][k]], i * lengths[1][k] / lengths[0][k]
            centre = 0.7 * sum(j * a for j, a in enumerate(row)) + 0.3 * diagonal
            if (k, i) == (0, 4):
                centre = diagonal
            reach = 5.0 + 2.0 * -sum(a * a.log() for a in row if a > 0)
            for j in range(lengths[1][k]):
                assert penalty[k, i, j] == (1.0 if abs(j - centre) > reach else 0.0)
    assert {0.0, 1.0} == set(penalty.flatten().tolist())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dwa_kd.band_penalty(attention, *lengths), penalty)
    gammas = [dwa_kd.gamma_at(step) for step in (0, 1785, 3570, 9999)]
    assert gammas == [2.0, 1.4, 0.8, 0.8]
    assert (dwa_kd.ramp_at(149), dwa_kd.ramp_at(299), dwa_kd.ramp_at(999)) == (0.5, 1.0, 1.0)
    a, b, counts = torch.randn(2, 9, 4), torch.randn(2, 9, 4), torch.tensor([9, 9])
    same, other = dtw_divergences([(a, a), (a, b)], counts, counts, 1.0)
    assert abs(same) < 1e-4 < 1 < other


def test_mined_vocabulary_and_path():
    def levenshtein(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a):
            new = [i + 1]
            for j, y in enumerate(b):
                new.append(min(new[-1] + 1, row[j + 1] + 1, row[j] + (x != y)))
            row = new
        return row[-1]

    student = ["the", " the", "cat", " cats", "", "xyz", " dog"]
    teacher = [" the", "the", " cat", "cart", "dog", "", "yz", "dogs"]
    assert mined.map_vocabulary(student, teacher).tolist() == [1, 0, 2, 2, 6, -1, 5, 6]
    rng = random.Random(0)
    make = lambda: ["".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(200)]
    student, teacher = make(), make()
    for string_, i in zip(teacher, mined.map_vocabulary(student, teacher).tolist()):
        best = min(levenshtein(string_, other) for other in student)
        assert levenshtein(string_, student[i]) == best
    for s, t in ((1, 1), (1, 7), (9, 4), (30, 40)):
        cost = np.random.default_rng(s).integers(0, 6, (s, t))
        path = mined.shortest_path(cost)
        assert path[0] == (0, 0) and path[-1] == (s - 1, t - 1)
        steps = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(path, path[1:])}
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        # Soft-DTW goes to the cost of the best path as γ goes to 0.
        values = []
        for gamma in (0.1, 0.001):
            exact = torch.tensor(cost[None], dtype=torch.float64)
            values.append(soft_dtw(exact, torch.tensor([s]), torch.tensor([t]), gamma).item())
        hard = sum(cost[cell] for cell in path)
        assert abs(values[1] - hard) < 0.02 * max(hard, 1) and abs(values[0] - hard) < 0.1 * s * t


class Words:
    """A tokenizer of whole words; EOS is token 0."""

    eos_id = 0

    def __init__(self, eos, *tokens):
        self.tokens, self.vocab_size = [eos, *tokens], len(tokens) + 1
        self.id_of = {token.decode(): i for i, token in enumerate(self.tokens)}

    def token_bytes(self, i):
        return self.tokens[i]


def test_mined_pairs_and_loss(monkeypatch):
    """x|the|cat|s meets x|the|ca|ts and x|the|the|cat|s; only one-to-one pairs of equal strings
    count. And the loss from its definition."""
    student = Words(b"<eos>", b"the", b" cat", b"s", b"ab")
    teacher = Words(b"</s>", b" the", b" ca", b"ts", b"cat", b"s", b"abx")

    def sequence(ids):  # a position has read the token before its label
        return ta.Sequence([3, 3, *ids], 2, [], [])

    examples = [
        ta.Example(0, "", sequence([1, 2, 3, 0]), sequence([1, 2, 3, 0])),
        ta.Example(1, "", sequence([1, 2, 3, 0]), sequence([1, 1, 4, 5, 0])),
        ta.Example(2, "", sequence([4, 0]), sequence([6, 0])),
    ]
    aligned = mined.AlignedPairs(student, teacher, examples)
    assert aligned.vocabulary_map.tolist() == [0, 1, 2, 3, 2, 3, 4]
    found = aligned(examples, "cpu")
    pairs = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (6, 7), (7, 8), (8, 9), (9, 10)]
    assert found["pairs"].t().tolist() == [list(pair) for pair in pairs]

    monkeypatch.setattr(mined, "TOP", 3)
    batch, (student, teacher) = golden_batch("ragged"), golden_models()
    torch.manual_seed(0)
    vocabulary_map = torch.randint(-1, 97, (131,))
    batch |= {"pairs": torch.tensor([[0, 2, 5], [1, 2, 4]]), "vocabulary_map": vocabulary_map}
    chosen = options("mined", temperature=1.5)
    total, terms = find_method("mined").loss(batch, student, teacher, {}, objective(chosen, batch))
    s, t = blocks.student_side(batch, student), blocks.teacher_side(batch, teacher)
    expected = 0.0
    for i, j in batch["pairs"].t().tolist():
        p = (F.linear(t.hidden[j], t.head) / 1.5).softmax(-1)
        likeliest = p.argsort(descending=True).tolist()
        likeliest = [k for k in likeliest if vocabulary_map[k] >= 0][:3]
        target = torch.zeros(97)
        for k in likeliest:
            target[vocabulary_map[k]] += p[k] / p[likeliest].sum()
        q_log = (F.linear(s.hidden[i], s.head) / 1.5).log_softmax(-1)
        expected += (torch.special.xlogy(target, target) - target * q_log).sum()
    for i in set(range(len(s.labels))) - {0, 2, 5}:
        expected -= (F.linear(s.hidden[i], s.head) / 1.5).log_softmax(-1)[s.labels[i]]
    close(terms["kd_loss"], expected.detach() / num_tokens(batch, "student"))


def test_conditional_transport_from_its_definition():
    """Ragged examples, one at a time; a mean over all tokens of the batch."""
    torch.manual_seed(0)
    transport = discriminator.Transport(6, 5)
    keys, queries = torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    key_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    query_mask = torch.tensor([[True] * 3, [True, False, False]])
    of_keys, of_queries = discriminator.conditional_transport(
        transport, keys, queries, key_mask, query_mask
    )
    (f_k, n_k), (f_q, n_q) = transport(keys), transport(queries)
    over_keys = over_queries = 0.0
    for b, (t, s) in enumerate(((4, 3), (2, 1))):
        cost, d = torch.cdist(f_k[b, :t], f_q[b, :s]), n_k[b, :t] @ n_q[b, :s].T
        over_queries -= 0.5 * (cost * d.softmax(0)).sum()
        over_keys -= 0.5 * (cost * d.softmax(1)).sum()
    close(of_keys["adversary_key_loss"].sum().detach(), over_keys.detach())
    close(of_queries["adversary_query_loss"].sum().detach(), over_queries.detach())


def test_a_chunk_without_counterpart_takes_nothing():
    """Of a text that is cut on one side: zero weights, and no part in the losses between the
    sides."""
    batch, (student, teacher) = golden_batch("ragged"), golden_models()
    alone = batch["student_chunks"] == batch["student_chunks"].max()
    batch["student_chunks"] = torch.where(alone, 99, batch["student_chunks"])
    s, t = blocks.Side(batch, "student", student), blocks.Side(batch, "teacher", teacher)
    chunks = batch["student_chunks"], batch["teacher_chunks"]
    for method, kind in (("dskd_cla", "chunk_attention"), ("dskd_clp", "chunk_mean")):
        modules = small_modules(method, student, teacher)
        aligned = cma.align(s, t, modules["projectors"], kind, chunks)
        close(s.unpad(aligned.t2s_weights.sum(-1)).detach(), (~alone).float())
        losses = []
        for label in (0, 1):
            labels = batch["student_labels"].flatten().clone()
            labels[s.positions[alone]] = label
            given = batch | {"student_labels": labels.view_as(batch["student_labels"])}
            of_given = objective(options(method), given)
            losses.append(find_method(method).loss(given, student, teacher, modules, of_given)[1])
        assert losses[0]["nll_loss"] != losses[1]["nll_loss"]
        if method == "dskd_clp":  # whose attention does not see the labels
            for name in ("t2s_ce_loss", "t2s_kd_loss", "t2s_acc"):
                close(losses[0][name], losses[1][name], 1e-6)


def masses_by_hand(tokenizer, logits, prefix: bytes):
    """{byte, "EOS" or, for the token that is the prefix, "END": mass}, and the mass of all, token
    by token."""
    p, masses = (logits / 1.3).softmax(-1), {}
    for i in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(i)
        if i in tokenizer.control or not text.startswith(prefix) or not text:
            continue
        outcome = text[len(prefix)] if len(text) > len(prefix) else "END"
        masses[outcome] = masses.get(outcome, 0) + p[i]
    if not prefix:
        masses["EOS"] = p[tokenizer.eos_id]
    masses = {outcome: mass.double() + 1e-12 for outcome, mass in masses.items()}
    return masses, sum(masses.values())


def expected_by_hand(tokenizer, sequence, text: bytes, o: int, hidden, head):
    """{byte, "EOS" or "END": q} at byte o, or None where the tokens end before it."""
    at = standing(tokenizer, sequence, text, o)
    if at is None:
        return None
    masses, whole = masses_by_hand(tokenizer, hidden[at[0]] @ head.t(), at[1])
    q = {c: m / whole for c, m in masses.items()} if whole > 1e-8 else {}
    if at[0] and not at[1]:
        token = tokenizer.token_bytes(sequence.response_ids[at[0] - 1])
        before, whole = masses_by_hand(tokenizer, hidden[at[0] - 1] @ head.t(), token)
        if whole > 1e-8:
            ends = before.pop("END")
            q = {
                c: (before.get(c, 0) + ends * q.get(c, 0)) / whole for c in q.keys() | before.keys()
            }
    return q


def standing(tokenizer, sequence, text: bytes, o: int):
    """The position and the prefix at byte o, or None where the tokens end before it."""
    for k in reversed(range(len(sequence.spans))):
        begin, end = sequence.spans[k]
        own = tokenizer.token_bytes(sequence.response_ids[k])
        if begin == end == o == len(text):
            return k, b""
        if begin <= o < end:
            return k, own[: len(own) - (end - begin) + o - begin]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths, scale", (((99, 99), 1), ((4, 9), 1), ((9, 3), 1), ((99, 99), 9)))
def test_byte_kd_against_every_token(way, lengths, scale, world, monkeypatch):
    """The KL of next bytes and its gradients against a sum over the whole vocabulary, byte by byte;
    also where the two sides are cut at different bytes, and with tokens of hardly any probability.
    """
    monkeypatch.setattr(blocks, "BLOCK", 7)
    tokenizers, examples = two_sides(world, way, lengths)
    student, teacher = random_models(tokenizers, monkeypatch)
    for decoder in (student, teacher):
        decoder.head.weight.data *= scale
    batch = ta.collate(examples, 0, 0)
    chosen = objective(options("byte_kd", temperature=1.3, kd_rate=0.3), batch)
    batch |= byte_kd.BytePaths(*tokenizers, examples)(examples, "cpu")
    total, terms = byte_kd.byte_kd(batch, student, teacher, {}, chosen)
    kept = {"teacher_expects": byte_kd.teacher_bytes(batch, teacher, 1.3)}
    of_kept, _ = byte_kd.byte_kd(batch | kept, student, None, {}, chosen)
    close(of_kept.detach(), total.detach(), 1e-9)

    s, t = blocks.student_side(batch, student), blocks.teacher_side(batch, teacher)
    kd = 0.0
    for example, h_s, h_t in zip(examples, s.hidden.split(s.counts), t.hidden.split(t.counts)):
        text = example.text.encode()
        for o in range(len(text) + 1):
            q_s = expected_by_hand(tokenizers[0], example.student, text, o, h_s, s.head)
            q_t = expected_by_hand(tokenizers[1], example.teacher, text, o, h_t, t.head)
            if q_s is None or q_t is None:
                break
            common = q_s.keys() & q_t.keys() - {"END"}
            shared_s, shared_t = (sum(q[c] for c in common) for q in (q_s, q_t))
            kd = kd + sum(q_t[c] * (q_t[c] / q_s[c]).log() for c in common)
            rest_s, rest_t = (sum(q[c] for c in q.keys() - common) for q in (q_s, q_t))
            if torch.is_tensor(rest_s) and torch.is_tensor(rest_t):
                kd = kd + rest_t * (rest_t / rest_s).log()
            elif common and not torch.is_tensor(rest_s):
                kd = kd - shared_t * (shared_t / shared_s).log()
    n = chosen.num_student_tokens
    exactness = 1e-6 if scale == 1 else 1e-4
    close(terms["kd_loss"], kd.detach() / n, exactness)
    ce = F.cross_entropy(s.hidden @ s.head.t(), s.labels, reduction="sum")
    expected = 0.7 * ce / n + 0.3 * kd / n
    close(total.detach(), expected.detach(), exactness)
    parameters = [student.head.weight, student.embed.weight]
    wanted = torch.autograd.grad(expected, parameters)
    for mine, other in zip(torch.autograd.grad(total, parameters), wanted):
        close(mine, other, exactness)


def test_next_bytes_of_no_mass():
    """A prefix whose tokens have, in float64, no probability at all counts for nothing, and spoils
    nothing."""
    q, other = torch.zeros(3, 258, dtype=torch.double), torch.zeros(3, 258, dtype=torch.double)
    q[1:, 5], q[1:, 7] = 0.25, 0.75
    other[:, 5], other[:, 7] = 0.5, 0.5
    for mine, teacher in ((q, other), (other, q)):
        mine = mine.clone().requires_grad_()
        values = byte_kd.next_byte_kl(mine, teacher)
        (gradient,) = torch.autograd.grad(values.sum(), mine)
        assert values[0] == 0 and values[1] == values[2] > 0
        assert torch.isfinite(gradient).all() and gradient[1].abs().sum() > 0


@real_vocabularies
@pytest.mark.parametrize("names", (("gpt2", "qwen1.5"), ("qwen1.5", "llama2"), ("mistral", "gpt2")))
def test_next_bytes_of_real_vocabularies(names):
    """At every byte of hostile text there is a position that has read no further; the ranges of
    some prefixes hold what a sum over the vocabulary finds."""
    first, second = (ta.load_tokenizer(FIXTURES / "tokenizers" / name) for name in names)
    rows = [text for text in HOSTILE if text.strip() and "▁" not in text and len(text) < 500]
    rows = [Row("p", [text]) for text in rows]
    examples, _, _ = ta.encode_rows(rows, first, second, 999, 99)
    paths = byte_kd.BytePaths(first, second, examples)
    for example in examples:
        text, path = example.text.encode(), paths.paths[example.row]
        assert (path[:, 0].diff() >= 0).all() and len(path) <= len(text) + 1
        if unicodedata.is_normalized("NFC", example.text):
            assert len(path) == len(text) + 1
            starts = torch.tensor([begin for begin, _ in example.student.spans])
            assert (starts[path[:, 0]] <= torch.arange(len(text) + 1)).all()
    p = torch.rand(first.vocab_size, dtype=torch.float64)
    order, _ = paths.student.tensors("cpu")
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), p[order].cumsum(0)])
    for prefix in (b" ", b"a", b"th", "你".encode()[:2]):
        by_hand = torch.zeros(256, dtype=torch.float64)
        for i in range(first.vocab_size):
            own = first.token_bytes(i)
            if i not in first.control and own.startswith(prefix) and len(own) > len(prefix):
                by_hand[own[len(prefix)]] += p[i]
        bounds = paths.student.bounds[paths.student.number(prefix)][:257]
        close(sums[bounds].diff(), by_hand, 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", ((99, 99), (4, 9), (9, 3)))
@pytest.mark.parametrize("temperature", (1.0, 100.0))
def test_alm_against_its_definition(way, lengths, temperature, world, monkeypatch):
    """Chunk by chunk from the text's cuts, values and gradients; in blocks of any size."""
    tokenizers, examples = two_sides(world, way, lengths)
    student, teacher = random_models(tokenizers, monkeypatch)
    batch = ta.collate(examples, 0, 0)
    chosen = objective(options("alm", temperature=temperature), batch)
    batch |= ChunksOfBatch(*tokenizers, examples)(examples, "cpu")
    s, t = blocks.student_side(batch, student), blocks.teacher_side(batch, teacher)
    log_p = []
    for side in (s, t):
        labels = side.labels[:, None]
        of_labels = (side.hidden @ side.head.t()).log_softmax(-1).gather(1, labels).squeeze(1)
        log_p.append(of_labels.split(side.counts))
    kd = 0.0
    for row, e in enumerate(examples):
        for of_s, of_t in chunks(e.student.spans, e.teacher.spans):
            if of_s and of_t and e.student.spans[of_s[-1]][1] == e.teacher.spans[of_t[-1]][1]:
                a = log_p[1][row][list(of_t)].sum().detach() / temperature
                b = log_p[0][row][list(of_s)].sum() / temperature
                rest = (1 - a.exp()) * ((1 - a.exp()).log() - (1 - b.exp()).log())
                kd = kd + temperature * (a.exp() * (a - b) + rest)
    ce = -torch.cat(log_p[0]).sum()
    n, parameters = chosen.num_student_tokens, [student.head.weight, student.embed.weight]
    wanted = torch.autograd.grad(0.5 * ce / n + 0.5 * kd / n, parameters)
    for size in (1, 7, 500):
        monkeypatch.setattr(blocks, "BLOCK", size)
        total, terms = alm.alm(batch, student, teacher, {}, chosen)
        close(terms["kd_loss"], kd.detach() / n, 2e-5)
        for mine, other in zip(torch.autograd.grad(total, parameters), wanted):
            close(mine, other, 1e-4)
    sure = torch.tensor([-1e-7, 0.0, 1e-6], requires_grad=True)  # certain chunks, one rounded
    values = alm.binary_kl(torch.full((3,), -1.0), sure, temperature)
    (gradient,) = torch.autograd.grad(values.sum(), sure)
    assert torch.isfinite(gradient).all() and (gradient[:2] > 0).all()


@pytest.mark.parametrize("shared", [30, 4])  # more tokens than dimensions, and fewer
def test_projectors_from_shared_tokens_are_least_squares(shared):
    torch.manual_seed(3)
    models = []
    for vocabulary, size in ((40, 6), (50, 10)):
        head = torch.nn.Linear(size, vocabulary, bias=False)
        models.append(
            SimpleNamespace(embed=torch.nn.Embedding(vocabulary, size), head=head, hidden_scale=2.0)
        )
    pairs = [(i, i + 5) for i in range(shared)]
    projectors = cma.Projectors(6, 10, query=True)
    init_from_shared(projectors, *models, pairs)
    ids = torch.tensor(pairs).unbind(1)
    heads = [decoder.head.weight.detach()[i].double().numpy() for decoder, i in zip(models, ids)]
    embeds = [decoder.embed.weight.detach()[i].double().numpy() for decoder, i in zip(models, ids)]
    close(projectors.t2s.weight, 2 * np.linalg.pinv(heads[0]) @ heads[1])
    close(projectors.s2t.weight, np.linalg.pinv(heads[1]) @ heads[0])
    half = (np.linalg.pinv(embeds[0]) @ embeds[1]).T / embeds[1].std(ddof=1)
    close(projectors.query.weight, np.block([[half, 0 * half], [0 * half, half]]))
    assert not any(layer.bias.any() for layer in (projectors.t2s, projectors.s2t, projectors.query))


# ------------------------------------------------------------------ what no loss may depend on


def extras_of(method: str, batch) -> dict:
    """What a method needs beside the golden batch."""
    if method == "mined":
        counts = [min(int(s), int(t)) for s, t in zip(*row_counts(batch))]
        starts = [side.cumsum(0) - side for side in row_counts(batch)]
        pairs = [
            (int(starts[0][i]) + k, int(starts[1][i]) + k)
            for i, count in enumerate(counts)
            for k in range(count)
        ]
        torch.manual_seed(0)
        return {"pairs": torch.tensor(pairs).t(), "vocabulary_map": torch.randint(-1, 97, (131,))}
    return {}


def row_counts(batch) -> list[torch.Tensor]:
    return [(batch[f"{side}_labels"] != -100).sum(1) for side in ("student", "teacher")]


def run_method(method: str, batch, adversary: str):
    same = method in ("kd", "dskd")
    student, teacher = golden_models(same)
    if same:
        batch = on_both_sides(batch)
    adversary = options(method).adversary if adversary == "none" else adversary
    modules = small_modules(method, student, teacher, adversary)
    chosen = objective(options(method, adversary=adversary), batch, step=5)
    total, terms = find_method(method).loss(batch, student, teacher, modules, chosen)
    total.backward()
    return total.detach(), terms, student.embed.weight.grad


# Their places in the text come with the examples; the tests of each say the same of them.
IN_THE_TEXT = ("alm", "byte_kd", "dskdv2", "gold", "strict", "xtoken")
INDEPENDENT = [(method, "none") for method in method_names() if method not in IN_THE_TEXT]
INDEPENDENT += [("dwa_kd", "gan"), ("dskd_cla", "ct")]


@pytest.mark.parametrize("method, adversary", INDEPENDENT)
def test_padding_order_and_blocks_change_nothing(method, adversary, monkeypatch):
    batch = golden_batch("ragged")
    parts = ("ids", "mask", "labels")
    tensors = {k: v for k, v in batch.items() if k.endswith(parts) and k != "chunk_mask"}
    chunks = {
        k: v.split(counts.tolist())
        for k, v, counts in zip(
            ("student_chunks", "teacher_chunks"),
            (batch["student_chunks"], batch["teacher_chunks"]),
            row_counts(batch),
        )
    }

    def variant(order, padding):
        result = {}
        for name, x in tensors.items():
            fill = -100 if name.endswith("labels") else 0
            result[name] = F.pad(x[order], (0, padding), value=fill)
        for name, rows in chunks.items():
            result[name] = torch.cat([rows[i] for i in order])
        return result | extras_of(method, result)

    total, terms, gradient = run_method(method, variant([0, 1, 2], 0), adversary)
    for change in ("padded", "no mask", "permuted", "blocks"):
        if change == "blocks":
            monkeypatch.setattr(blocks, "BLOCK", 5)
        order = [2, 0, 1] if change == "permuted" else [0, 1, 2]
        given = variant(order, 9 if change in ("padded", "no mask") else 0)
        if change == "no mask":  # so that padding is computed, too
            del given["student_mask"], given["teacher_mask"]
        other_total, other_terms, other_gradient = run_method(method, given, adversary)
        close(other_total, total, 1e-5)
        close(other_gradient, gradient)
        for name in terms:
            close(other_terms[name], terms[name], 2e-5)


@pytest.mark.parametrize(
    "method",
    [name for name in method_names() if name not in (*IN_THE_TEXT, "mined", "kd", "dskd")],
)
def test_a_step_in_two_parts_is_the_step(method):
    """The rows of a step in two batches: the same total, where nothing is a mean over a batch."""
    batch, (student, teacher) = golden_batch("ragged"), golden_models()
    modules = small_modules(method, student, teacher, options(method).adversary)
    whole = objective(options(method), batch)
    counts = row_counts(batch)
    totals = []
    for rows in ([0, 1, 2], [0], [1, 2]):
        part = {k: batch[k][rows] for k in batch if k.endswith(("ids", "labels"))}
        for k, of_side in zip(("student_chunks", "teacher_chunks"), counts):
            split = batch[k].split(of_side.tolist())
            part[k] = torch.cat([split[i] for i in rows])
        totals.append(find_method(method).loss(part, student, teacher, modules, whole)[0].detach())
    # σ and adversaries' sets are taken over a batch: CMA's parts are near the whole only.
    close(totals[1] + totals[2], totals[0], 1e-5 if method in ("sft", "seqkd", "uld") else 0.2)


def test_heads_run_on_response_positions_only(monkeypatch):
    """No tensor of a step has as many elements as rows × length × vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return result

    torch.manual_seed(0)
    rows, length, vocabulary, size = 4, 60, 5000, 8
    batch = {}
    for side in ("student", "teacher"):
        labels = torch.randint(0, vocabulary, (rows, length))
        batch[f"{side}_ids"] = torch.randint(0, vocabulary, (rows, length))
        batch[f"{side}_labels"] = torch.where(torch.arange(length) < 40, -100, labels)

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(vocabulary, size)
            self.head = torch.nn.Linear(size, vocabulary, bias=False)
            self.config = SimpleNamespace(hidden_size=size)

        def forward(self, ids, mask):
            return self.embed(ids)

    student, teacher = Tiny(), Tiny()
    monkeypatch.setattr(blocks, "BLOCK", 7)
    for method in ("sft", "kd", "dskd_cma"):
        modules = small_modules(method, student, teacher)
        chosen = options(method, divergence="adaptive_kl")
        with Largest() as largest:
            loss, _ = find_method(method).loss(
                batch, student, teacher, modules, objective(chosen, batch)
            )
            loss.backward()
        assert largest.elements == vocabulary * size, f"{method}: larger than a head's weight"


@pytest.mark.parametrize("rows", [7, 1024, 2500])
def test_a_gradient_in_bfloat16_is_added_in_parts(rows):
    torch.manual_seed(0)
    total, gradient = torch.randn(rows, 6), torch.randn(5, rows).bfloat16()
    states = torch.randn(5, 6).bfloat16()
    expected = total + gradient.float().t() @ states.float()
    blocks._add_product(total, gradient, states)
    close(total, expected, 2e-2)
