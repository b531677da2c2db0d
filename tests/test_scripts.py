"""eval_rouge.py, sample.py, probe.py, toy.py and tools/."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import eval_rouge
import model
import probe
import sample
import toy
import train
from data import Row, read_rows
from pictures.attention import token_label
from probing import attention
from probing.bootstrap import mean_distance, resample
from runtime.config import InputError
from tests.helpers import FIXTURES, HERE, close, flags
from tokenize_align import load_tokenizer
from tools import bench, compare, compress, tables


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Runs of four methods that probe.py looks at."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("dskd_cma", "dskd_cma_ga", "dskd_clp", "byte_kd", "sft"):
        train.main(flags(world, folder / method, "--max_steps", 4, method=method))
    return folder


# -------------------------------------------------------------------------------- eval_rouge


def test_eval_rouge(runs, world, capsys):
    """The answers that it leaves have the scores that it prints; a set apart counts as OOD."""
    run, toy_set = str(runs / "byte_kd"), str(world / "data")
    eval_rouge.main(
        [
            run,
            "--data",
            toy_set,
            "toy-kinds",
            "--num",
            "5",
            "--seeds",
            "1",
            "2",
            "--max_length",
            "90",
        ]
    )
    out = capsys.readouterr().out
    assert "(in domain)" in out and "OOD mean" in out and "± " in out
    found = json.loads((runs / "byte_kd/best/rouge.json").read_text())
    scores = found["sets"][toy_set]
    assert found["ood_rouge_l"] == found["sets"]["toy-kinds"]["rouge_l"]
    files = sorted((runs / "byte_kd/best").glob("answers-*data-seed*.jsonl"))
    assert len(files) == 2
    for file, expected in zip(files, scores["rouge_l_by_seed"]):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        given = eval_rouge.rouge_l([x["answer"] for x in lines], [x["output"] for x in lines])
        close(100 * np.mean(given), np.float64(expected), 1e-9)
    close(scores["bits_per_byte"], sum(scores["bits_by_row"]) / sum(scores["bytes_by_row"]), 1e-9)
    rows = read_rows(world / "data/test.jsonl")[:5]
    decoder, tokenizer = model.load(run), load_tokenizer(run)
    kl = 0.0
    for row in rows:
        for answer, p in row.truth.items():
            ((bits, _, _),) = eval_rouge.answer_bits(
                decoder, tokenizer, [Row(row.prompt, [answer])], 90, 256
            )
            kl += p * (math.log2(p) + bits) / len(rows)
    close(scores["kl_to_truth"], kl, 1e-5)


def test_truth_wants_the_whole_answer(world):
    """An answer whose EOS alone is cut has no KL to the truth."""
    decoder, tokenizer = model.load(world / "student"), load_tokenizer(world / "student")
    rows = [Row("Which food?\n", ["figs"], {"figs": 1.0})]
    size = len(tokenizer.encode("Which food?\n") + tokenizer.encode("figs"))
    assert eval_rouge.kl_to_truth(decoder, tokenizer, rows, size, 99, 1) is None
    assert eval_rouge.kl_to_truth(decoder, tokenizer, rows, size + 1, 99, 1) > 0


def test_bits_have_float32_logits(world):
    """Under bfloat16 the hidden states are rounded, the logits are not."""
    decoder, tokenizer = model.load(world / "student"), load_tokenizer(world / "student")
    decoder.head.weight.data *= 30
    prompt, label = tokenizer.encode("Which food?\n"), tokenizer.encode("figs")[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ((bits, _, _),) = eval_rouge.answer_bits(
            decoder, tokenizer, [Row("Which food?\n", ["figs"])], len(prompt) + 1, 99
        )
        hidden = decoder(torch.tensor([prompt]))[0, -1]
    exact = -(hidden.float() @ decoder.head.weight.t()).log_softmax(-1)[label] / math.log(2)
    close(bits, exact, 1e-5)


def test_answers_without_room(runs, world, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "%s", "output": "b"}' % ("a " * 300))
    argv = [str(runs / "sft"), "--data", str(tmp_path / "x.jsonl"), "--temperature", "0"]
    argv += ["--out_dir", str(tmp_path), "--max_length", "20"]
    with pytest.raises(InputError, match="no row that is scored has room"):
        eval_rouge.main(argv)
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write('\n{"prompt": "a", "output": "b"}')
    eval_rouge.main(argv)
    found = json.loads((tmp_path / "rouge.json").read_text())
    assert found["sets"][str(tmp_path / "x.jsonl")]["bytes_by_row"] == [0, 1]
    assert found["settings"]["seeds"] == [] and found["settings"]["max_length"] == 20


def test_sample(runs, monkeypatch, capsys):
    sample.main([str(runs / "sft"), "Which food does Mira like?", "--max_new_tokens", "9"])
    first = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which food does Mira like?\n\n"))
    sample.main([str(runs / "sft"), "--max_new_tokens", "9"])
    assert capsys.readouterr().out.removeprefix("instruction> ").startswith(first)


def test_sample_shows_what_is_true_of_the_toy(runs, data_folder, monkeypatch, capsys):
    """Beside the student's answer the teacher's and the world's."""
    monkeypatch.setattr(sample, "TOY_SETS", (sample.trained_on(runs / "sft/best"),))
    shutil.copytree(runs / "sft/best", data_folder / "toy/teacher", dirs_exist_ok=True)
    sample.main([str(runs / "sft"), "Say what Mira eats.", "--max_new_tokens", "9"])
    shutil.rmtree(data_folder / "toy/teacher")
    student, teacher, truth = capsys.readouterr().out.splitlines()[-3:]
    assert teacher.startswith("the teacher:  ")
    assert truth.startswith("the truth:    plums (0.30), Mira eats plums. (0.18)")
    assert abs(sum(toy.true_answers("Say what Mira eats.").values()) - 1) < 1e-9


# ------------------------------------------------------------------------------------- probe


def test_measures_of_handmade_attention():
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]])
    same_chunk = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    repeated = torch.tensor([True, False, False])
    positions, others = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0.5, 1.5, 3.0])
    found = attention.measure(weights, same_chunk, repeated, positions, others)
    close(found["mass"], torch.tensor([1.0, 0.5]))  # the last has no counterpart
    close(found["hit"], torch.tensor([1.0, 1.0]))
    close(found["mass_repeated"], torch.tensor([1.0]))
    close(found["mass_once"], torch.tensor([0.5]))
    entropy = -(0.7 * math.log2(0.7) + 0.3 * math.log2(0.3))
    close(found["entropy_bits"], torch.tensor([entropy, 1.5]))
    close(found["byte_distance"], torch.tensor([0.2, 1.0]))
    mean, draws = resample([torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    assert mean == 3.0 and set(draws.tolist()) == {1.5, 3.0, 6.0}


def test_distance_of_keys_and_queries():
    torch.manual_seed(0)
    keys, queries = torch.randn(300, 5), torch.randn(300, 5)
    assert mean_distance(keys, queries) < 0.3 < 1 < mean_distance(keys, queries + 3)


@pytest.mark.parametrize(
    "token, label",
    [
        (b" the", "␣the"),
        (b"\n", "↵"),
        ("你".encode()[:2], "<e4 bd>"),
        ("你".encode(), "\\u4f60"),
        (b"a" * 30, "a" * 17 + "…"),
    ],
)
def test_token_labels(token, label):
    assert token_label(token) == label


def test_the_probe_shows_the_attention_of_training(runs, world):
    """What attend() gives is what the method computes from the checkpoint's files."""
    from methods.blocks import Side
    from tokenize_align import collate

    run = probe.open_run(str(runs / "dskd_cma_ga"), "")
    examples = run.examples(read_rows(world / "data/dev.jsonl")[:4])
    pads = run.tokenizers[0].eos_id, run.tokenizers[1].eos_id
    found = attention.attend(
        run.attention, examples, run.student, run.teacher, run.modules["projectors"], pads
    )
    batch = collate(examples, *pads)
    s, t = Side(batch, "student", run.student), Side(batch, "teacher", run.teacher)
    E_s = torch.cat([run.student.embed(s.inputs), run.student.embed(s.labels)], -1)
    E_t = torch.cat([run.teacher.embed(t.inputs), run.teacher.embed(t.labels)], -1)
    Q, K = run.modules["projectors"].query(E_s).split(s.counts), (E_t / E_t.std()).split(t.counts)
    for response, q, k in zip(found, Q, K):
        A = q @ k.T / k.size(1) ** 0.5
        close(response.t2s, A.softmax(1).detach())
        close(response.s2t, A.T.softmax(1).detach())


@pytest.mark.parametrize(
    "names, files",
    [
        (("dskd_cma_ga",), {"heatmap.png", "keys_queries.png"}),
        (("dskd_cma", "dskd_cma_ga"), {"heatmap-A.png", "heatmap-B.png", "keys_queries.png"}),
        (("dskd_clp",), {"heatmap.png"}),
        (("byte_kd",), {"next_bytes.png"}),
        (("sft", "byte_kd"), {"next_bytes.png"}),
    ],
)
def test_probe(names, files, runs, world, tmp_path, capsys):
    argv = [str(runs / name) for name in names] + ["--out_dir", str(tmp_path), "--num", "5"]
    if "sft" in names:
        argv += ["--teacher", str(world / "teacher")]
    probe.main(argv)
    assert {f.name for f in tmp_path.iterdir()} == files | {"probe.json"}
    log = json.loads((tmp_path / "probe.json").read_text())
    assert list(log["runs"]) == [str(runs / name) for name in names]
    numbers = log["runs"][str(runs / names[-1])]
    if names == ("dskd_clp",):  # chunks in place of attention are always right
        assert numbers["student → teacher: mass"]["mean"] == 1.0
    if "byte_kd" in names:
        assert numbers["kl"]["mean"] > 0
    out = capsys.readouterr().out
    assert ("B − A" in out) == (len(names) == 2)


def test_probe_takes_the_dev_rows_of_the_run(world, tmp_path):
    """Where the data has no dev split, train.py has drawn one."""
    (tmp_path / "data").mkdir()
    shutil.copy(world / "data/train.jsonl", tmp_path / "data")
    argv = flags(world, tmp_path / "run", "--max_steps", 1, "--seed", 2, method="byte_kd")
    argv[argv.index("--data") + 1] = str(tmp_path / "data")
    train.main(argv)
    probe.main([str(tmp_path / "run"), "--num", "3"])
    log = json.loads((tmp_path / "run/probe/probe.json").read_text())
    assert log["data"].endswith("data, dev") and log["rows"] == [0, 1, 2]


def test_probe_refuses(runs, world, tmp_path):
    for argv, message in (
        ([], "name a run"),
        ([str(tmp_path)], "no run in this folder"),
        ([str(runs / "sft")], "has no teacher"),
    ):
        with pytest.raises(InputError, match=message):
            probe.main(argv)


def test_next_bytes_of_a_model_with_itself_agree(runs, world):
    from probing.next_bytes import predict_next_bytes

    run = probe.open_run(str(runs / "byte_kd"), "")
    examples = run.examples(read_rows(world / "data/dev.jsonl")[:4])
    for example in examples:
        example.teacher = example.student
    tokenizers = (run.tokenizers[0], run.tokenizers[0])
    for prediction in predict_next_bytes(tokenizers, examples, run.student, run.student):
        assert prediction.kl.abs().max() < 1e-5
        assert (prediction.student.sum(1) < 1 + 1e-5).all()


# --------------------------------------------------------------------------------------- toy


def test_toy_worlds_are_apart():
    """Nothing that is scored stands in a training row; the truth sums to 1; the world is always the
    same."""
    rows = toy.make_rows()
    assert rows == toy.make_rows()
    prompts = {key: {row["prompt"] for row in of_key} for key, of_key in rows.items()}
    training = prompts["toy-world", "train"] | prompts["toy-childhood", "train"]
    assert len(rows["toy", "train"]) == 800 and prompts["toy", "train"] <= training
    for name in ("toy", "toy-phrasings", "toy-kinds", "toy-asides"):
        assert not prompts[name, "test"] & training
        for row in rows[name, "test"]:
            assert row["output"][0] in row["truth"]
            close(sum(row["truth"].values()), 1.0, 1e-9)
    drawn = {}
    for row in rows["toy-world", "train"]:
        drawn.setdefault(row["prompt"], set()).add(row["output"])
    assert max(map(len, drawn.values())) == 9


# ------------------------------------------------------------------------------------- tools


def test_compare(world, tmp_path, capsys, monkeypatch):
    """A table of two rows and two seeds; the same command again trains nothing, and one with a seed
    more trains that."""

    def start_here(script, arguments, log):
        {"train.py": train, "eval_rouge.py": eval_rouge}[script].main(arguments)

    base = ["--data", str(world / "data"), "--scoring_seeds", "1", "--out_dir", str(tmp_path / "t")]
    base += ["--student", str(world / "student"), "--teacher", str(world / "teacher")]
    base += ["--max_steps", "3", "--batch_size", "8", "--max_length", "90", "--eval_num", "2"]
    base += ["--max_prompt_length", "60", "--methods", "sft", "byte_kd --kd_rate 0.9", "--seeds"]
    compare.main([*base, "1"])
    results = json.loads((tmp_path / "t/results.json").read_text())
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "t/cells").rglob("*.safetensors")}
    monkeypatch.setattr(compare, "start", start_here)
    compare.main([*base, "1", "2"])
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    again = json.loads((tmp_path / "t/results.json").read_text())
    assert {row: by_seed["1"] for row, by_seed in again.items()} == {
        row: by_seed["1"] for row, by_seed in results.items()
    }
    text = (tmp_path / "t/table.md").read_text()
    assert "| `byte_kd --kd_rate 0.9` | 2 |" in text and "minus `sft`" in text and "±" in text
    settings = json.loads(
        (tmp_path / "t/cells/byte_kd_--kd_rate_0.9-seed2/config.json").read_text()
    )
    assert (settings["kd_rate"], settings["seed"]) == (0.9, 2)
    longer = ["4" if word == "3" else word for word in base]
    with pytest.raises(InputError, match="was trained with --max_steps 3"):
        compare.main([*longer, "1"])
    with pytest.raises(InputError, match="has --lr"):
        compare.main([*base, "1", "--lr", "1"])
    with pytest.raises(InputError, match="tools.compare sets it"):
        compare.main(["--method", "x"])
    compare.main(["--preset", "paper", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("python train.py") for line in lines) == 1 + 5 * (6 + 18)
    compare.main(["--preset", "paper", "--dry_run", "--methods", "sft", "--seeds", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("python train.py") for line in lines) == 1 + 2


SLOW = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open("saved", "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
open("begun", "w").close()
time.sleep(60)
"""


def test_compare_waits_for_a_run_that_saves(tmp_path):
    """Ctrl-C reaches both processes; tools.compare ends after train.py."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "compare_it.py").write_text(
        "from tools import compare\n"
        "compare.HERE = compare.Path()\n"
        "compare.start('slow.py', [], None)"
    )
    process = subprocess.Popen(
        [sys.executable, "compare_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    assert (tmp_path / "saved").exists()


def as_sets(differences: np.ndarray, sizes: np.ndarray) -> dict[int, dict]:
    """Differences of rows (seeds, rows) as training seeds' sets of rouge.json."""
    return {
        seed: {
            "a": {
                "rouge_l_by_row": of_seed,
                "bits_by_row": of_seed * sizes,
                "bytes_by_row": sizes,
            }
        }
        for seed, of_seed in enumerate(differences)
    }


@pytest.mark.parametrize("metric", ("rouge_l", "bits_per_byte"))
@pytest.mark.parametrize("of_seeds, of_rows", [(1.0, 1.0), (0.3, 5.0), (0.02, 8.0)])
def test_intervals_hold(metric, of_seeds, of_rows):
    """The 95 % interval of a difference holds the truth in about 95 of 100 experiments, whether
    training seeds or rows vary more."""
    rng, seeds, rows, held = np.random.default_rng(0), 4, 100, 0
    for _ in range(300):
        sizes = rng.gamma(2.0, 10.0, rows) + 1
        differences = 0.7 + rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_rows, rows)
        differences = differences + rng.normal(0, 3.0, (seeds, rows))
        ours, theirs = as_sets(differences, sizes), as_sets(0 * differences, sizes)
        _, low, high = tables.paired_difference(ours, theirs, ["a"], metric)
        held += low < 0.7 < high
    assert 0.91 < held / 300 < 0.985


def test_the_interval_of_one_seed_is_students():
    """Over rows alone; and none without a common seed."""
    rows = np.array([1.0, 2.0, 6.0])
    ours, theirs = as_sets(rows[None], np.ones(3)), as_sets(0 * rows[None], np.ones(3))
    reach = 4.302653 * rows.std(ddof=1) / 3**0.5  # t of 2 degrees of freedom
    close(tables.paired_difference(ours, theirs, ["a"], "rouge_l"), [3, 3 - reach, 3 + reach])
    assert tables.paired_difference(ours, {3: {}}, ["a"], "rouge_l") is None


def test_compress(world, tmp_path, capsys):
    """All layers and the own tokenizer: the model itself. Fewer layers and another tokenizer: a
    folder that transformers reads, too, whose shared tokens keep their rows."""
    transformers = pytest.importorskip("transformers")
    teacher = str(world / "teacher")
    compress.main([teacher, "--out_dir", str(tmp_path / "same")])
    same, whole = model.load(tmp_path / "same"), model.load(teacher)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), whole.parameters()))
    argv = [teacher, "--layers", "1", "--tokenizer", str(world / "student")]
    compress.main([*argv, "--out_dir", str(tmp_path / "cut")])
    assert "1 layers, 600 tokens" in capsys.readouterr().out
    cut, ids = model.load(tmp_path / "cut"), torch.arange(9)[None]
    close(cut.layers[0].mlp.up_proj.weight, whole.layers[1].mlp.up_proj.weight)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    close(cut.logits(cut(ids)).detach(), reference(ids).logits.detach())
    before, after = load_tokenizer(teacher), load_tokenizer(tmp_path / "cut")
    of_bytes = {before.token_bytes(i): i for i in range(before.vocab_size)}
    shared = [
        (of_bytes[after.token_bytes(i)], i)
        for i in range(after.vocab_size)
        if after.token_bytes(i) in of_bytes and i not in after.control
    ]
    assert len(shared) > 100
    for old, new in shared:
        close(cut.embed.weight[new], whole.embed.weight[old], 1e-6)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert read("Which food?").input_ids == after.encode("Which food?")
    for layers in ("2", "1,0", "x"):
        with pytest.raises(InputError, match="must be rising"):
            compress.main([teacher, "--layers", layers, "--out_dir", str(tmp_path / layers)])


def test_bench_of_small_models(monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("rouge_score")
    only = ["step", "generation", "rouge"]
    sizes = dict(max_position_embeddings=bench.POSITIONS), dict(n_positions=bench.POSITIONS)
    monkeypatch.setattr(bench, "SMOLLM2", toy.TEACHER | sizes[0])
    monkeypatch.setattr(bench, "GPT2", toy.STUDENT | sizes[1])
    bench.main(["--repeats", "1", "--only", *only])
    out = capsys.readouterr().out
    assert out.count("×") == 3 and "GB" in out


def test_bench_of_a_pair_with_cached_states(world, tmp_path, capsys):
    """A step on the states that another process has saved has the loss of one that makes them."""
    given = [f"--{name}={world / name}" for name in ("teacher", "student", "data")]
    given += ["--folder", str(tmp_path), "--repeats", "1", "--worker"]
    bench.main([*given, "states", "--cache_teacher"])
    losses = []
    for how in ([], ["--cache_teacher"]):
        bench.main([*given, "byte_kd", *how])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]


def test_functions_of_the_library(tmp_path):
    """The rows that docs/results.md was made with, where this is their Python."""
    from examples import python_functions

    source = '''
class A:
    def area(self, width):
        """What a square covers."""
        square = width * width  # of the width
        return square + 0 * width

    @property
    def decorated(self):
        """Left out."""
        return "long enough, but for the decorator above it"

    def short(self):
        """Left out."""
        return 1
'''
    prompt = 'def area(self, width):\n    """What a square covers."""\n'
    body = "    square = width * width  # of the width\n    return square + 0 * width"
    assert python_functions.functions_of(source) == [(prompt, body)]
    folder = FIXTURES / "data/pycode"
    if sys.version_info[:2] != (3, 11) or not folder.is_dir():
        pytest.skip("wants Python 3.11 and data/pycode among the fixtures")
    python_functions.main([str(tmp_path), "--labels", "50", "--prompts", "50", "400"])
    for split in ("dev", "test"):
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    expected = rows[:50] + [{"prompt": row["prompt"]} for row in rows[50:400]]
    found = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in found] == expected
