"""Runs of train.py: every method learns, an interrupted run continues, bad input is refused."""

import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import model
import probe
import train
from data import Row, read_rows
from methods import method_names
from runtime import generation, teacher_answers, teacher_states
from runtime.config import InputError
from tests.helpers import HERE, QUICK, assert_same_run, close, finish, flags, metrics, start
from tokenize_align import load_tokenizer

TWO_VOCABULARIES = [name for name in method_names() if name not in ("kd", "dskd")]
COMBINATIONS = [(name, []) for name in TWO_VOCABULARIES if name != "xtoken"]
COMBINATIONS += [("xtoken", ["--kd_rate", 0.3])]  # its map keeps it far from a random teacher
COMBINATIONS += [
    ("dwa_kd", ["--adversary", "gan", "--divergence", "adaptive_kl"]),
    ("dskd_cla", ["--adversary", "ct"]),
    ("dskd_cma", ["--projector_init", "shared"]),
]


@pytest.mark.draws
@pytest.mark.parametrize("method, more", COMBINATIONS)
def test_training_lowers_the_loss(method, more, world, tmp_path):
    train.main(flags(world, tmp_path / "run", "--epochs", 4, "--lr", "5e-3", *more, method=method))
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.93 * sum(losses[:6])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["student"].keys() == {"dev", "test"}
    best = model.load(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").vocab_size <= best.config.vocab_size


def test_pictures_of_a_run(quick_run):
    for name in ("results.png", "curves.png"):
        assert (quick_run / name).stat().st_size > 5000


@pytest.mark.parametrize("method", ("kd", "dskd"))
def test_one_vocabulary(method, world, tmp_path):
    argv = flags(world, tmp_path / "run", "--max_steps", 3, method=method)
    with pytest.raises(InputError, match="needs one vocabulary"):
        train.main(argv)
    argv[argv.index("--teacher") + 1] = str(world / "student")
    train.main(argv)
    assert "kd_loss" in metrics(tmp_path / "run")[0]


def test_who_learns(world, tmp_path):
    """All of the student, the projectors and the adversary change from step to step; the teacher's
    files never do. With --ga_lr 0 the adversary stays, and the projector still learns from it."""
    before = (world / "teacher/model.safetensors").read_bytes()
    runs = {"a": ["--max_steps", 1], "b": ["--max_steps", 4]}
    runs |= {"frozen": ["--max_steps", 4, "--ga_lr", 0]}
    runs |= {"off": ["--max_steps", 4, "--ga_lr", 0, "--ga_weight", 0]}
    for name, more in runs.items():
        train.main(flags(world, tmp_path / name, *more))
    weights = {}
    files = {"model": "model", "projectors": "modules/projectors", "adversary": "modules/adversary"}
    for name in runs:
        for part, file in files.items():
            weights[name, part] = load_file(tmp_path / name / "last" / f"{file}.safetensors")
    for part in files:
        a, b = weights["a", part], weights["b", part]
        matrices = [k for k in a if a[k].dim() > 1 and "wpe" not in k]
        assert matrices and not any(torch.equal(a[k], b[k]) for k in matrices), part
    for name, tensor in weights["frozen", "adversary"].items():
        assert torch.equal(tensor, weights["off", "adversary"][name])
    frozen, off = weights["frozen", "projectors"], weights["off", "projectors"]
    assert not torch.equal(frozen["query.weight"], off["query.weight"])
    assert before == (world / "teacher/model.safetensors").read_bytes()


def test_accumulation_equals_one_batch(world, tmp_path):
    """sft: two forward passes of 4 rows make the step that one of 8 makes."""
    for name, sizes in (("a", (8, 1)), ("b", (4, 2))):
        more = ["--batch_size", sizes[0], "--grad_accum", sizes[1], "--max_steps", 3]
        train.main(flags(world, tmp_path / name, *more, method="sft"))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b")):
        for key in ("loss", "grad_norm", "dev_bits_per_byte"):
            if key in a:
                close(a[key], b[key], 1e-5)


def test_seqkd_answers_once_and_continues(world, tmp_path, monkeypatch):
    """The teacher answers every prompt once; killed in between, the rest; it is sft on its greedy
    answers."""
    data = tmp_path / "data"
    shutil.copytree(world / "data", data, ignore=shutil.ignore_patterns("*-by-*"))
    argv = flags(world, tmp_path / "a", "--data", data, "--max_steps", 2, method="seqkd")
    asked = []

    def dies(decoder, ids, *rest, **named):
        if asked:
            raise KeyboardInterrupt
        asked.append(len(ids))
        return real(decoder, ids, *rest, **named)

    real = generation.generate
    monkeypatch.setattr(generation, "generate", dies)
    monkeypatch.setattr(teacher_answers, "AT_ONCE", (32, 32))
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    assert not (tmp_path / "a").exists()
    file = next(data.glob("train-by-teacher-*")) / "answers-0.jsonl"
    file.write_text(file.read_text() + '[40, "half [a]')
    monkeypatch.undo()
    (world / "teacher/rouge.json").write_text("{}")  # says nothing about the model
    train.main(argv)
    (world / "teacher/rouge.json").unlink()
    rows, decoder = read_rows(data / "train.jsonl"), model.load(world / "teacher")
    tokenizer = load_tokenizer(world / "teacher")
    expected = generation.answer_rows(decoder, tokenizer, rows, 128, 100, temperature=0.0)
    lines = [json.loads(x) for x in file.read_text().splitlines() if x.endswith("e]")]
    assert {row: text for row, text, _ in lines} == dict(enumerate(expected))
    assert len(lines) == len(rows)
    ended = {row: whole for row, _, whole in lines}
    assert set(ended.values()) == {False}  # this teacher never ends, so that no answer has EOS
    answered = [
        Row(row.prompt, [text], ended=ended[i])
        for i, (row, text) in enumerate(zip(rows, expected))
        if text
    ]
    given = train.read_splits(str(data), 1)
    monkeypatch.setattr(train, "read_splits", lambda *_: given | {"train": answered})
    train.main(flags(world, tmp_path / "b", "--data", data, "--max_steps", 2, method="sft"))
    losses = [[r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in "ab"]
    close(losses[0], losses[1], 1e-6)


def test_the_teacher_answers_rows_without_an_answer(world, tmp_path, monkeypatch):
    """And those alone, sampled; sft, which has no teacher, says so."""
    data = tmp_path / "data"
    shutil.copytree(world / "data", data, ignore=shutil.ignore_patterns("*-by-*"))
    lines = [json.loads(x) for x in (data / "train.jsonl").read_text().splitlines()]
    for line in lines[10:]:
        del line["output"]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    more = ["--data", data, "--max_steps", 3]
    with pytest.raises(InputError, match="38 training rows have no output"):
        train.main(flags(world, tmp_path / "sft", *more, method="sft"))
    monkeypatch.setattr(teacher_states, "load", None)  # the teacher that answered is used
    train.main(flags(world, tmp_path / "a", *more, "--cache_teacher", method="uld"))
    probe.main([str(tmp_path / "a"), "--split", "train", "--num", "20"])
    assert (tmp_path / "a/probe/next_bytes.png").exists()
    given = train.read_splits(str(data), 1)
    file = next(data.glob("train-by-teacher-*")) / "answers-0.jsonl"
    answers = [json.loads(line) for line in file.read_text().split("\n") if line]
    asked = [row for row in given["train"] if not row.outputs]
    decoder, tokenizer = model.load(world / "teacher"), load_tokenizer(world / "teacher")
    sampled = generation.answer_rows(decoder, tokenizer, asked, 128, 100, 128, temperature=0.7)
    assert {i: text for i, text, _ in answers} == dict(enumerate(sampled))
    rows = [replace(asked[i], outputs=[text], ended=ended) for i, text, ended in sorted(answers)]
    rows = [row for row in rows if row.outputs[0]] + given["train"][:10]
    monkeypatch.setattr(train, "read_splits", lambda *_: given | {"train": rows})
    train.main(flags(world, tmp_path / "b", *more, "--cache_teacher", method="uld"))
    losses = [[r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in "ab"]
    close(losses[0], losses[1], 1e-6)


def test_two_runs_at_once_ask_the_teacher_once(world, tmp_path):
    config = train.Config(teacher="teacher", max_length=128, max_prompt_length=100)
    rows = [Row(row.prompt, []) for row in read_rows(world / "data/train.jsonl")[:8]]
    decoder, tokenizer = model.load(world / "teacher"), load_tokenizer(world / "teacher")

    def run(_):
        return teacher_answers.teacher_rows(config, rows, tmp_path, decoder, tokenizer, False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    lines = next(tmp_path.glob("*/answers-0.jsonl")).read_text().split("\n")
    assert first == second and len(list(filter(None, lines))) == len(rows)


MEMORY = """
import torch
from runtime.distributed import give_memory_back, keep_memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

keep_memory()
tensors = [torch.ones(250_000) for _ in range(300)]  # a megabyte each
last = tensors.pop()  # the freed memory has no open end
full = megabytes()
del tensors
kept = megabytes()
give_memory_back()
print(full - kept, full - megabytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_memory_is_kept_until_it_is_given_back():
    words = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, cwd=HERE, text=True)
    while_kept, after = map(float, words.stdout.split())
    assert while_kept < 30 and after > 250


@pytest.mark.parametrize("method", ("dskd_cma_ga", "byte_kd", "uld"))
def test_cached_teacher(method, world, tmp_path):
    """The states on disk are the teacher's, in bfloat16; an interrupted writing continues."""
    data = tmp_path / "data"
    shutil.copytree(world / "data", data, ignore=shutil.ignore_patterns("train-states-*"))
    more = ["--data", data, "--max_steps", 4]
    train.main(flags(world, tmp_path / "plain", *more, method=method))
    train.main(flags(world, tmp_path / "a", *more, "--cache_teacher", method=method))
    for x, y in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "a")):
        if "loss" in x:
            assert abs(x["loss"] - y["loss"]) < 0.01 * x["loss"]
    states = next(data.glob("train-states-teacher-*.bin"))
    done = states.with_suffix(".done")
    whole = states.read_bytes()
    states.write_bytes(bytes(200) + whole[200:])
    done.write_bytes(b"\0" * len(done.read_bytes()))
    train.main(flags(world, tmp_path / "b", *more, "--cache_teacher", method=method))
    assert states.read_bytes() == whole and set(done.read_bytes()) == {1}


@pytest.mark.parametrize("method, share", [("byte_kd", 0.5), ("alm", 1.0), ("mined", 1.0)])
def test_on_policy(method, share, world, tmp_path):
    """In a share of the steps CE is of the data and the method's terms of the student's answers,
    with counts of their own."""
    more = ["--batch_size", 48, "--lr", "1e-4"]  # an epoch is one step
    for name, of_run in (("a", share), ("b", 0)):
        train.main(flags(world, tmp_path / name, *more, "--on_policy", of_run, method=method))
    a, b = ([r for r in metrics(tmp_path / name) if "loss" in r] for name in "ab")
    close(a[0]["nll_loss"], b[0]["nll_loss"], 1e-5)
    assert a[0]["kd_loss"] != b[0]["kd_loss"]
    α = {"byte_kd": 0.75}.get(method, 0.5)
    for record in a:
        loss = (1 - α) * record["nll_loss"] + α * record["kd_loss"]
        close(record["loss"], loss, 1e-4)


def test_gradient_checkpointing(world, tmp_path, monkeypatch):
    calls, real = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *x, **how: calls.append(1) or real(*x, **how))
    for name, more in (("run", ["--gradient_checkpointing"]), ("plain", [])):
        train.main(flags(world, tmp_path / name, *QUICK, *more, method="sft"))
    for x, y in zip(metrics(tmp_path / "run"), metrics(tmp_path / "plain")):
        if "loss" in x:
            close(x["loss"], y["loss"], 1e-5)
    assert calls


def test_lora(world, tmp_path):
    more = ["--lora_rank", 4]
    train.main(flags(world, tmp_path / "run", *QUICK, *more, method="sft"))
    train.main(flags(world, tmp_path / "plain", *QUICK, method="sft"))
    close(metrics(tmp_path / "run")[0]["loss"], metrics(tmp_path / "plain")[0]["loss"], 1e-5)
    base = model.load(world / "student").embed.weight
    assert torch.equal(model.load(tmp_path / "run/last").embed.weight, base)
    assert (tmp_path / "run/last/adapter/adapter_model.safetensors").exists()
    train.main(
        flags(world, tmp_path / "again", *QUICK, *more, "--student", tmp_path / "run", method="sft")
    )
    adapter = json.loads((tmp_path / "again/best/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "run/best")
    moments = load_file(tmp_path / "run/last/resume.safetensors")
    learning = {name.rsplit("/", 1)[0] for name in moments if name.startswith("student.")}
    assert learning and all(name.endswith((".a", ".b")) for name in learning)


def test_lora_is_scored_in_the_type_it_was_trained_in(world, tmp_path, monkeypatch):
    """So that the final table of a large model needs no more memory than its training."""
    types = []

    def score(decoder, *_):
        types.append(decoder.embed.weight.dtype)
        return {"bits_per_byte": 1.0}

    monkeypatch.setattr(train, "scores_of", score)
    more = ["--lora_rank", 4, "--dtype", "bfloat16", "--max_steps", 1, "--select", "bits"]
    train.main(flags(world, tmp_path / "run", *more, method="sft"))
    assert types == [torch.bfloat16] * 5  # dev; before and after, dev and test


def test_bfloat16(world, tmp_path):
    for method in ("dskd_cma_ga", "dwa_kd", "byte_kd"):
        runs = []
        for dtype in ("bfloat16", "float32"):
            out = tmp_path / f"{method}-{dtype}"
            train.main(flags(world, out, "--dtype", dtype, "--max_steps", 3, method=method))
            runs.append([r["loss"] for r in metrics(out) if "loss" in r])
        close(runs[0], runs[1], 0.05)
        assert runs[0] != runs[1]
    weights = load_file(tmp_path / "byte_kd-bfloat16/best/model.safetensors")
    assert weights["transformer.wte.weight"].dtype == torch.float32


def test_the_best_checkpoint_is_no_accident(world, tmp_path, capsys):
    """Bits per byte decide between equal ROUGE-L, and everything where no answer has a word that
    ROUGE-L counts."""
    fewer, more = ({"rouge_l": 0.0, "bits_per_byte": bits} for bits in (1.0, 2.0))
    better = {"rouge_l": 1.0, "bits_per_byte": 3.0}
    for select in ("rouge", "sampled"):
        order = sorted((fewer, better, more), key=lambda scores: train.goodness(scores, select))
        assert order == [more, fewer, better]
    assert train.goodness(better, "bits") < train.goodness(more, "bits")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"{i}\n", "output": "你好"} for i in range(8)]
    for split in ("train", "dev"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    argv = flags(world, tmp_path / "run", "--data", tmp_path / "data", "--lr", "1e-2", method="sft")
    train.main([*argv, "--epochs", "4"])
    assert "so bits per byte choose the best" in capsys.readouterr().out
    bits = [r["dev_bits_per_byte"] for r in metrics(tmp_path / "run") if "dev_bits_per_byte" in r]
    best = json.loads((tmp_path / "run/best/training.json").read_text())
    assert json.loads((tmp_path / "run/config.json").read_text())["select"] == "rouge"  # as given
    assert len(bits) == 4 and best["best_dev_bits_per_byte"] == min(bits) < bits[0]
    more = ["--data", tmp_path / "data", "--max_steps", 1, "--select", "sampled", "--answers"]
    train.main(flags(world, tmp_path / "again", *more, method="sft"))
    assert "ROUGE-L (greedy)" in capsys.readouterr().out  # as they were drawn


def test_sampled_selection(world, tmp_path, monkeypatch):
    """Three answers to every row, sampled; the same again with the same seeds."""
    found = []
    for select, seeds in (("sampled", 3), ("sampled", 3), ("sampled", 1), ("rouge", 3)):
        monkeypatch.setattr(train, "SCORING_SEEDS", (10, 20, 30)[:seeds])
        out = tmp_path / str(len(found))
        train.main(flags(world, out, "--max_steps", 2, "--select", select, method="sft"))
        found.append(metrics(out)[-1]["dev_rouge_l"])
    assert found[0] == found[1] and len(set(found)) == 3


def test_every_token_weighs_the_same(world, tmp_path, monkeypatch):
    """The mean gradient of an epoch's steps is that of all rows in one step, whatever their
    lengths."""
    gradients = []

    def step(optimizer):
        of_step = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat(of_step))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    means = {}
    for size in (1, 48):
        gradients.clear()
        more = ["--batch_size", size, "--clip_grad", 1e9, "--epochs", 1]
        train.main(flags(world, tmp_path / str(size), *more, method="sft"))
        assert len(gradients) == 48 / size
        means[size] = torch.stack(gradients).mean(0)
    close(means[1], means[48], 1e-5)


def test_learning_rate():
    assert train.learning_rate(1e-3, 0, 10, 110) == 1e-4
    assert train.learning_rate(1e-3, 9, 10, 110) == train.learning_rate(1e-3, 10, 10, 110) == 1e-3
    close(train.learning_rate(1e-3, 109, 10, 110), 1e-7)
    close(train.learning_rate(1e-3, 50, 0, 101), (1e-3 + 1e-7) / 2)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (["--method", "byte_kdd"], "did you mean byte_kd"),
        (["--method", "plain"], "must be the path of a file"),
        (["--method", "uld", "--temperature", 9], "does not use it .it uses: kd_rate"),
        (["--method", "byte_kd", "--projector_lr", 1], "does not use it"),
        (["--method", "dskd_cma", "--ga_weight", "5"], "there is no --adversary"),
        (["--method", "dskd_cma", "--on_policy", "0.5"], "does not use it"),
        (["--method", "dskd_clp", "--adversary", "ct"], "does not use it"),
        (["--divergence", "x"], "must be one of"),
        (["--lr", "fast"], "lr"),
        (["--lr", "-1"], "at least 0"),
        (["--kd_rate", "2"], "at most 1"),
        (["--kd_rat", 0.9], "unknown: --kd_rat 0.9; did you mean --kd_rate"),
        (["--teacher", "/no/folder"], "/no/folder: not a folder"),
        (["--teacher", "qwen2.5-0.5"], "did you mean qwen2.5-0.5b"),
        (["--data", "dollly"], "did you mean dolly"),
        (["--select", "bit"], "did you mean bits"),
        (["--epochs", 3, "--max_steps", 10], "--epochs: has no use beside --max_steps 10"),
        (["--device", "cuda"], "no CUDA"),
        (["--max_length", "1000"], "256 positions"),
        (["--lora_alpha", "3"], "without --lora_rank"),
        (["--shard", "both"], "torchrun"),
        (["--shard", "both", "--cache_teacher"], "no teacher's layers"),
        (["--resume", "--out_dir", "none"], "no run"),
    ],
)
def test_command_lines_that_are_wrong(change, message, world, tmp_path):
    with pytest.raises(InputError, match=message):
        train.main(flags(world, tmp_path / "run", *change))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty_is_refused(world, quick_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, quick_run, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="is not empty"):
            train.main(flags(world, folder, *QUICK))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_steps_that_explode_end_the_run(world, tmp_path):
    more = ["--lr", "1e39", "--save_interval", 1, "--max_steps", 9]
    with pytest.raises(InputError, match="not saved at step 1, because weights are not finite"):
        train.main(flags(world, tmp_path / "run", *more, method="sft"))


def test_steps_that_are_not_finite_are_not_taken(world, tmp_path, monkeypatch, capsys):
    """Their rows are named; the third in a row ends the run, and the last checkpoint is good."""
    from methods import blocks

    def spoiled(logits, labels):
        terms = real(logits, labels)
        steps.append(1)
        bad = len(steps) == 2 or len(steps) > 4
        return {"nll_loss": terms["nll_loss"] * (float("nan") if bad else 1.0)} | {
            "accuracy": terms["accuracy"]
        }

    import methods.sft

    real, steps = blocks.cross_entropy, []
    monkeypatch.setattr(methods.sft, "cross_entropy", spoiled)
    argv = flags(world, tmp_path / "run", "--save_interval", 1, "--max_steps", 20, method="sft")
    with pytest.raises(InputError, match="3 steps in a row, up to step 7"):
        train.main(argv)
    records = [record for record in metrics(tmp_path / "run") if "lr" in record]
    assert ["skipped_rows" in record for record in records] == [False, True, False, False] + [
        True
    ] * 3
    assert len(records[1]["skipped_rows"]) == 8
    said = capsys.readouterr().err
    assert "training: step 4 of 20" in said and "loss nan" not in said
    assert json.loads((tmp_path / "run/last/training.json").read_text())["step"] == 4


# ----------------------------------------------------------------- a run is never lost


@pytest.mark.parametrize(
    "method, more",
    [
        ("dskd_cma_ga", ["--lora_rank", 4]),
        ("dwa_kd", ["--adversary", "ct"]),
        ("byte_kd", ["--on_policy", 0.5]),
        ("sft", []),
    ],
)
def test_resume_is_exact(method, more, world, tmp_path):
    """Stopped after any step, the run ends in the same bytes: here after step 3 of 9."""
    common = ["--batch_size", 12, "--max_steps", 9, "--eval_interval", 4, *more]
    train.main(flags(world, tmp_path / "whole", *common, method=method))
    real = train.append_metrics

    def interrupt(out_dir, record):
        real(out_dir, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    argv = flags(world, tmp_path / "cut", *common, method=method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "append_metrics", interrupt)
        with pytest.raises(SystemExit):
            train.main(argv)
    assert json.loads((tmp_path / "cut/last/training.json").read_text())["step"] == 3
    train.main(["--out_dir", str(tmp_path / "cut"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_what_was_saved_is_scored_on_resume(quick_run, world, tmp_path, monkeypatch):
    """A kill during a scoring, of dev or at the end, loses nothing; a second resume changes
    nothing."""
    real = train.scores_of
    for fatal in (1, 2, 4):
        calls, out = [], tmp_path / str(fatal)

        def dies(*args):
            calls.append(1)
            if len(calls) == fatal:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(train, "scores_of", dies)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags(world, out, *QUICK))
        monkeypatch.setattr(train, "scores_of", real)
        for _ in range(2):
            train.main(["--out_dir", str(out), "--resume"])
            assert_same_run(quick_run, out)


def test_resume_refuses_what_does_not_fit(quick_run, world, tmp_path):
    shutil.copytree(quick_run, tmp_path / "run")
    argv = ["--out_dir", str(tmp_path / "run"), "--resume"]
    with pytest.raises(InputError, match="has --lr 0.001"):
        train.main([*argv, "--lr", "5"])
    settings = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(settings | {"byte_weight": 1.0}))
    with pytest.raises(InputError, match="byte_weight"):
        train.main(argv)


@pytest.mark.parametrize(
    "file",
    ("model.safetensors", "modules/projectors.safetensors", "resume.safetensors", "config.json"),
)
def test_a_damaged_checkpoint_is_noticed(file, quick_run, world, tmp_path, capsys):
    """The one before takes its place, and the run ends in the same bytes."""
    out = tmp_path / "run"
    shutil.copytree(quick_run, out)
    path = out / "last" / file
    path.write_bytes(path.read_bytes()[:-9])
    train.main(["--out_dir", str(out), "--resume"])
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(quick_run, out)
    for name in ("last", "last.previous"):
        path = out / name / file
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="no checkpoint is whole"):
        train.main(["--out_dir", str(out), "--resume"])


def test_killed_at_every_rename_of_a_checkpoint(quick_run, world, tmp_path, monkeypatch):
    """Whatever rename, removal or flush a kill comes before, the run ends in the same bytes."""
    from runtime import checkpoint

    class Killed(BaseException):
        pass

    for number in (1, 5, 9, 14, 20, 27, 35):
        count, out = [], tmp_path / str(number)

        def before(real):
            def call(*args, **named):
                count.append(1)
                if len(count) == number:
                    raise Killed
                return real(*args, **named)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.Path, "rename", before(checkpoint.Path.rename))
            patch.setattr(checkpoint.shutil, "rmtree", before(shutil.rmtree))
            patch.setattr(checkpoint, "flush", before(checkpoint.flush))
            with pytest.raises(Killed):
                train.main(flags(world, out, *QUICK))
        train.main(["--out_dir", str(out), "--resume"])
        assert_same_run(quick_run, out)


def test_a_full_disk_ends_a_run_in_one_line(quick_run, world, tmp_path):
    """Weights that cannot be written whole (here: files of 16 KiB at most) lose no run."""

    def allow_small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))

    argv = flags(world, tmp_path / "run", *QUICK)
    code, _, errors = finish(start("train.py", *argv, preexec_fn=allow_small_files))
    assert code == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: ") and "File too large" in errors
    train.main(["--out_dir", str(tmp_path / "run"), "--resume"])
    assert_same_run(quick_run, tmp_path / "run")


def test_one_run_per_folder(quick_run, world, tmp_path):
    from runtime.checkpoint import lock_run

    shutil.copytree(quick_run, tmp_path / "run")
    lock_run(tmp_path / "run")
    code, _, errors = finish(start("train.py", "--out_dir", tmp_path / "run", "--resume"))
    assert code == 2 and errors.startswith("error: --out_dir") and errors.count("\n") == 1
    assert "another run is writing" in errors


@pytest.mark.soak
def test_twenty_kills(world, tmp_path):
    """kill -9 at 20 moments, half of them while a checkpoint is being written: the same bytes as a
    run that nothing disturbed."""
    import random
    import time

    more = ["--epochs", 6, "--save_interval", 1, "--eval_interval", 12, "--eval_num", 2]
    code, _, errors = finish(start("train.py", *flags(world, tmp_path / "whole", *more)))
    assert code == 0, errors
    out, rng, kills, while_writing = tmp_path / "cut", random.Random(0), 0, 0
    argv = flags(world, out, *more)
    while kills < 20:
        process = start("train.py", *argv)
        step = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            writing = (out / "last.tmp").exists()
            lines = (
                (out / "metrics.jsonl").read_text().count("\n")
                if (out / "metrics.jsonl").exists()
                else 0
            )
            if lines > step and (writing if kills % 2 else rng.random() < 0.05):
                break
        assert process.poll() is None, finish(process)[2]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        while_writing += (out / "last.tmp").exists()
        argv = ["--out_dir", out, "--resume"] if (out / "config.json").exists() else argv
    code, _, errors = finish(start("train.py", *argv))
    assert code == 0, errors
    assert while_writing >= 10
    assert_same_run(tmp_path / "whole", out)
