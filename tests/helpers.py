"""What several test files use."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cma
import model
import tokenize_align as ta
from data import Row, read_rows
from discriminator import Discriminator, Transport
from methods import Objective, find_method
from train import Config

HERE = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("GOLDEN_DIR", HERE / "golden"))
FIXTURES = Path(os.environ.get("NANODSKD_FIXTURES", HERE.parent / "shared"))
real_vocabularies = pytest.mark.skipif(
    not (FIXTURES / "tokenizers").is_dir(), reason=f"no real vocabularies in {FIXTURES}/tokenizers"
)


def close(ours, reference, relative=1e-4):
    ours, reference = torch.as_tensor(ours).double(), torch.as_tensor(reference).double()
    assert ours.shape == reference.shape
    scale = reference.abs().max().clamp(min=1e-6)
    assert (ours - reference).abs().max() / scale <= relative, f"{ours} is not {reference}"


# ------------------------------------------------------------------------------------ losses


def options(method: str, **more) -> Config:
    """The settings of a method, as train.py would have them."""
    return Config(method=method, **(find_method(method).defaults | more))


def num_tokens(batch, side: str) -> int:
    return int((batch[f"{side}_labels"] != -100).sum())


def objective(chosen: Config, batch, step: int = 0) -> Objective:
    """Of a step that is this batch alone."""
    return Objective(chosen, step, num_tokens(batch, "student"), num_tokens(batch, "teacher"))


def packed_chunks(batch) -> dict:
    """student_chunks and teacher_chunks of a stored M: a chunk is named by its first teacher
    position."""
    student_chunks = batch["chunk_mask"].argmax(2)
    teacher_chunks = student_chunks.gather(1, batch["chunk_mask"].argmax(1))
    return {
        "student_chunks": student_chunks[batch["student_labels"] != -100],
        "teacher_chunks": teacher_chunks[batch["teacher_labels"] != -100],
    }


def golden_models(same_vocabulary: bool = False):
    teacher = "teacher_same_vocab" if same_vocabulary else "teacher"
    return model.load(GOLDEN / "student"), model.load(GOLDEN / teacher).requires_grad_(False)


def golden_batch(name: str, same_vocabulary: bool = False) -> dict:
    batch = load_file(GOLDEN / f"batch_{name}.safetensors")
    batch |= packed_chunks(batch)
    return on_both_sides(batch) if same_vocabulary else batch


def on_both_sides(batch: dict) -> dict:
    """What the batch has of the student is the teacher's, too."""
    same = {name: x for name, x in batch.items() if name.startswith("student_")}
    return batch | {name.replace("student", "teacher"): x for name, x in same.items()}


def golden_projectors(method: str, student, teacher) -> cma.Projectors:
    same = method == "dskd"
    projectors = cma.Projectors(
        student.config.hidden_size,
        teacher.config.hidden_size,
        query=not same,
        dtw_embed=method == "dwa_kd",
    )
    name = "projectors_same_vocab" if same else "projectors"
    stored = load_file(GOLDEN / f"{name}.safetensors")
    if method == "dwa_kd":
        for key, tensor in load_file(GOLDEN / "projectors_dwa.safetensors").items():
            stored[key.replace("dtw_embed_t2s", "dtw_embed")] = tensor
    projectors.load_state_dict(stored)
    return projectors


def small_modules(method: str, student, teacher, adversary: str = "none") -> dict:
    """Random modules of a method; a small adversary without dropout."""
    torch.manual_seed(0)
    chosen = find_method(method)
    if not chosen.make_modules:
        return {}
    modules = chosen.make_modules(options(method, adversary="none"), student.config, teacher.config)
    kinds = {"gan": Discriminator, "ct": Transport}
    if adversary in kinds:
        modules["adversary"] = kinds[adversary](2 * teacher.config.hidden_size, 16).eval()
    return modules


# -------------------------------------------------------------------------- two tokenizations

WAYS = ((0, 1), (1, 0), (0, 0))
TEXTS = ["plums", "Mira eats 12 figs.", "héllo 你 🙂", "  two  spaces", "a"]


def cut_to(side: ta.Sequence, n: int) -> ta.Sequence:
    """A side of an example, cut to the first n tokens of its response."""
    first = side.prompt_length
    return ta.Sequence(side.ids[: first + n], first, side.spans[:n], side.chunks[:n])


def two_sides(world, way, lengths=(999, 999), texts=TEXTS):
    """(tokenizers, examples) of some texts, each side cut to a number of response tokens."""
    tokenizers = [ta.load_tokenizer(world / ("student", "teacher")[i]) for i in way]
    examples, _, _ = ta.encode_rows([Row("say it", [text]) for text in texts], *tokenizers, 999, 99)
    for example in examples:
        example.student = cut_to(example.student, lengths[0])
        example.teacher = cut_to(example.teacher, lengths[1])
    return tokenizers, examples


def random_models(tokenizers, monkeypatch):
    """Two models of the tokenizers' vocabularies in float64, with .embed, .head and forward."""

    class Tiny(torch.nn.Module):
        def __init__(self, vocab_size, size):
            super().__init__()
            self.embed = torch.nn.Embedding(vocab_size, size).double()
            self.head = torch.nn.Linear(size, vocab_size + 3, bias=False).double()

        def forward(self, ids, mask):
            return 3 * self.embed(ids)

    torch.manual_seed(0)
    return [Tiny(tokenizer.vocab_size, size) for tokenizer, size in zip(tokenizers, (5, 6))]


def chunks(spans_a, spans_b) -> list[tuple[range, range]]:
    """(tokens of a, tokens of b) of every chunk, from its definition: cut at common boundaries."""
    cuts = {end for _, end in spans_a} & {end for _, end in spans_b}

    def number(span):
        return sum(0 < cut <= span[0] for cut in cuts)

    result = []
    for chunk in sorted({*map(number, spans_a), *map(number, spans_b)}):
        tokens = []
        for spans in (spans_a, spans_b):
            inside = [i for i, span in enumerate(spans) if number(span) == chunk]
            tokens.append(range(inside[0], inside[-1] + 1) if inside else range(0))
        result.append(tuple(tokens))
    return result


# ------------------------------------------------------------------------------------ models

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = "gpt2 llama2 llama3 tinyllama linear smollm2 mistral qwen1.5 qwen2.5 qwen3".split()


def reference_config(family: str):
    import transformers as tf

    llama3 = dict(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
    sliding = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    linear = dict(rope_type="linear", rope_theta=5000.0, factor=2.0)
    if family == "gpt2":
        sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return {
        "llama2": lambda: tf.LlamaConfig(**SIZES),
        "llama3": lambda: tf.LlamaConfig(**SIZES, rope_parameters=llama3, tie_word_embeddings=True),
        "tinyllama": lambda: tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "linear": lambda: tf.LlamaConfig(**SIZES, rope_parameters=linear),
        "smollm2": lambda: tf.LlamaConfig(**SIZES | dict(num_attention_heads=8)),
        "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=5),
        "qwen1.5": lambda: tf.Qwen2Config(**SIZES),
        "qwen2.5": lambda: tf.Qwen2Config(**SIZES, tie_word_embeddings=True, **sliding),
        "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16),
    }[family]()


def reference_model(family: str, folder: Path):
    """A random model of transformers, saved into a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(reference_config(family)).eval()
    for parameter in reference.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    reference.save_pretrained(folder)
    return reference


# ------------------------------------------------------------------------------------- texts

HOSTILE = [
    "",
    "a",
    " ",
    "  ",
    " 12 345  6  x",
    "a  1\n\n 2",
    "Don't I'LL we've",
    "你好，世界 한국어 日本語",
    "👩‍👩‍👧‍👦🏽 🇩🇪",
    "cafe\u0301 \u1100\u1161\u11a8 \u0958 \u212b",
    "x" * 2000,
    " " * 700,
    " \n" * 50,
    "\t\t\r\n\r\n  a",
    "\x00\x01\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff",
    "½ ² Ⅷ ٣",
    "İ ß ǅ",
    "\U0010ffff\ue000",
    "ก็ำ",
    "a\u0323\u0307",
    "\u0307\u0323",
    "'''",
    "!!!??\n\n",
    "<|endoftext|> <s> </s> <|im_start|>",
    "▁▁a ▁b",
]
CONTROL_TEXT = HOSTILE[-2]


def texts() -> list[str]:
    rng = random.Random(0)
    pool = "abcDEF 123\n\t'.,é你🙂\u0301 ſ\xad\u200d\x00▁½"
    result = HOSTILE + ["".join(rng.choices(pool, k=rng.randint(1, 60))) for _ in range(300)]
    if (FIXTURES / "data").is_dir():
        for row in read_rows(FIXTURES / "data/dolly/train.jsonl")[:100]:
            result += [row.prompt + row.input, row.outputs[0]]
    return result


# -------------------------------------------------------------------------------------- runs

QUICK = ["--max_steps", "4", "--save_interval", "1", "--eval_interval", "2", "--eval_num", "2"]


def flags(world: Path, out: Path, *more, method: str = "dskd_cma_ga") -> list[str]:
    """A short run on the small toy."""
    length = [] if "--max_steps" in more or "--epochs" in more else ["--epochs", 2]
    words = [
        *([] if method == "sft" else ["--teacher", world / "teacher"]),
        *("--student", world / "student", "--data", world / "data", "--method", method),
        *("--out_dir", out, "--max_length", 128, "--max_prompt_length", 100),
        *("--batch_size", 8, "--grad_accum", 1),
        *(*length, "--lr", "1e-3", "--eval_num", 4, *more),
    ]
    return [str(word) for word in words]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def assert_same_run(whole: Path, cut: Path) -> None:
    """An interrupted run ends in the bytes of one that nothing disturbed."""
    assert without_times(metrics(whole)) == without_times(metrics(cut))
    files = []
    for folder in (whole, cut):
        found = {
            str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
        }
        files.append({name: found[name] for name in found if not name.endswith((".png", ".md"))})
    assert files[0].keys() == files[1].keys()
    assert {"last/resume.safetensors", "best/model.safetensors"} <= files[0].keys()
    for name in files[0].keys() - {"config.json", "metrics.jsonl"}:
        assert files[0][name] == files[1][name], name


def start(script: str, *argv, torchrun: int = 0, **more):
    """Start a script in a process of its own, or in several of torchrun."""
    command = [sys.executable, str(HERE / script)]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={torchrun}", str(HERE / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [*command, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env=environment,
        **more,
    )


def finish(process, timeout: int = 240) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, out, errors
