"""torchrun: several processes take the steps that one takes."""

import json
import signal
import time

import pytest
from safetensors.torch import load_file

import runtime.lora
import train
from tests.helpers import HERE, close, finish, flags, metrics, start, without_times

TWO = ["--batch_size", 4, "--grad_accum", 2, "--max_steps", 7, "--eval_interval", 4]


@pytest.mark.parametrize(
    "method, more",
    [
        ("dwa_kd", ["--adversary", "ct"]),
        ("byte_kd", ["--shard", "both"]),
        ("sft", ["--shard", "student", "--lora_rank", 4]),
        ("sft", ["--shard", "student", "--gradient_checkpointing"]),
        ("seqkd", []),
    ],
)
def test_two_processes_equal_one(method, more, world, tmp_path, monkeypatch):
    """The same losses and weights, but for rounding; 41 rows, so that in an epoch's last step one
    process has none; resumed by one process from what two saved."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev", "test"):
        lines = (world / "data" / f"{split}.jsonl").read_text().splitlines(True)[:41]
        (data / f"{split}.jsonl").write_text("".join(lines))
    one = [word for word in more if word not in ("--shard", "both", "student")]
    # LoRA's dropout draws other numbers in each process.
    monkeypatch.setattr(runtime.lora, "DROPOUT", 0.0)
    script = tmp_path / "train.py"
    script.write_text(
        "import runtime.lora\nruntime.lora.DROPOUT = 0.0\nimport runpy\n"
        f"runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')"
    )
    train.main(flags(world, tmp_path / "one", "--data", data, *TWO, *one, method=method))
    argv = flags(world, tmp_path / "two", "--data", data, *TWO, *more, method=method)
    code, _, errors = finish(start(script, *argv, "--device", "cpu", torchrun=2))
    assert code == 0, errors[-3000:]
    a, b = (without_times(metrics(tmp_path / name)) for name in ("one", "two"))
    assert len(a) == len(b) == 9
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x:
            close(y[name], x[name], 1e-4)
    for checkpoint in ("best", "last"):
        x, y = (
            load_file(tmp_path / name / checkpoint / "model.safetensors") for name in ("one", "two")
        )
        for name in x:  # a key's bias has no gradient but rounding, which AdamW enlarges
            close(y[name], x[name], 1e-3 if "bias" not in name else 1.0)
    train.main(["--out_dir", str(tmp_path / "two"), "--resume", "--shard", "none"])
    assert json.loads((tmp_path / "two/results.json").read_text())["student"]


def test_a_signal_stops_all_processes_after_the_same_step(world, tmp_path):
    more = ["--epochs", 400, "--batch_size", 4, "--grad_accum", 2, "--device", "cpu"]
    process = start("train.py", *flags(world, tmp_path / "run", *more, method="sft"), torchrun=2)
    file = tmp_path / "run/metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (file.exists() and file.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    finish(process)
    step = json.loads((tmp_path / "run/last/training.json").read_text())["step"]
    assert step == metrics(tmp_path / "run")[-1]["step"] >= 3


def test_several_processes_refuse(world, tmp_path):
    argv = flags(world, tmp_path / "run", "--device", "cpu", "--grad_accum", 3)
    code, _, errors = finish(start("train.py", *argv, torchrun=2))
    assert code != 0 and "must be a multiple of the 2 processes" in errors
