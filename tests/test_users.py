"""What a user meets beside the numbers: refusals, logs, what a finished run leaves."""

import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest

import probe
import train
from runtime import checkpoint
from runtime.config import InputError
from runtime.model_card import how_to_load
from runtime.progress import Progress
from tests.helpers import finish, flags, metrics, start
from tools import compare


def test_notes_say_what_the_teacher_was_fine_tuned_on(world, tmp_path, capsys):
    """Not at all by this script; on these rows, which needs no note; on others."""
    others = shutil.copytree(world / "data", tmp_path / "others")

    def notes_of(name, *more):
        short = ["--max_steps", 1, "--eval_num", 1]
        train.main(flags(world, tmp_path / name, *short, *more, method="byte_kd"))
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("note: the teacher was")]

    (note,) = notes_of("first")
    assert "not fine-tuned" in note and f"--data {world / 'data'} " in note
    tuned = ["--teacher", tmp_path / "first/best"]
    assert notes_of("second", *tuned) == []
    (note,) = notes_of("third", *tuned, "--data", others)
    assert f"on {world / 'data'}, not on {others}" in note


def test_a_log_file_can_be_read(world, tmp_path):
    """Without a terminal: no bars, no escape codes, but where the run is and how long it takes."""
    code, out, errors = finish(start("train.py", *flags(world, tmp_path / "run", method="sft")))
    assert code == 0, errors
    lines = out.splitlines()
    steps = [line for line in errors.splitlines() if line.startswith("training: step ")]
    assert len(steps) == 12  # of 12 steps each is more than a twentieth
    assert re.fullmatch(
        r"training: step 12 of 12, 0:00 left, loss \d+\.\d+ \(mean of 12 steps\), [\d,]+ tokens/s",
        steps[-1],
    )
    assert not re.search("[\r\x1b]", out + errors)
    named = next(i for i, line in enumerate(lines) if line.startswith("best on dev: "))
    assert named < next(i for i, line in enumerate(lines) if line.startswith("student  "))
    assert "load " + str(tmp_path / "run/best") in out


def test_lines_come_by_time_or_by_parts(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(1000, "working", "row")
    for _ in range(100):
        now[0] += 1.0
        progress.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: row 30 of 1000, 16:10 left" and len(lines) == 3
    progress = Progress(100, "training", "step", done=50, parts=20)
    progress.update(4, "loss 1")
    progress.update(2, "loss 2")
    assert capsys.readouterr().err == "training: step 56 of 100, 0:00 left, loss 2\n"


@pytest.mark.parametrize("where", ("tensorboard", "wandb"))
def test_what_is_logged_is_reported(where, world, tmp_path, monkeypatch):
    """To a library that is installed; else its name is told."""
    argv = flags(world, tmp_path / "run", "--max_steps", 2, "--report_to", where, method="sft")
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"pip install {where}"):
        train.main(argv)
    assert not (tmp_path / "run").exists()
    found = []
    fake = SimpleNamespace(
        init=lambda **_: None,
        log=lambda values, step: found.extend(
            (name, value, step) for name, value in values.items()
        ),
        SummaryWriter=lambda folder: SimpleNamespace(add_scalar=lambda *x: found.append(x)),
    )
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, fake)
    train.main(argv)
    expected = []
    for record in metrics(tmp_path / "run"):
        expected += [(k, v, record["step"]) for k, v in record.items() if k != "step"]
    assert found == expected


def test_a_finished_run_can_be_made_longer(world, tmp_path):
    run = tmp_path / "run"
    train.main(flags(world, run, "--epochs", 1, method="sft"))
    assert metrics(run)[-2]["step"] == 6
    train.main(["--out_dir", str(run), "--resume", "--epochs", "2"])
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert json.loads((run / "config.json").read_text())["epochs"] == 2
    assert records[6]["lr"] > records[5]["lr"]  # the cosine of the longer run
    with pytest.raises(InputError, match="has taken 12 steps, more than 6"):
        train.main(["--out_dir", str(run), "--resume", "--epochs", "1"])
    assert json.loads((run / "config.json").read_text())["epochs"] == 2  # nothing was harmed


def test_a_longer_run_keeps_a_better_checkpoint(world, tmp_path, monkeypatch):
    """Though the step that ended it before is no scoring step of the longer run."""
    bits = iter(range(1, 99))
    monkeypatch.setattr(train, "scores_of", lambda *_: {"bits_per_byte": float(next(bits))})
    run, more = tmp_path / "run", ["--select", "bits", "--eval_interval", 9]
    train.main(flags(world, run, "--max_steps", 1, *more, method="sft"))
    before = (run / "best/model.safetensors").read_bytes()
    train.main(["--out_dir", str(run), "--resume", "--max_steps", "2"])
    assert (run / "best/model.safetensors").read_bytes() == before
    scored = [record["step"] for record in metrics(run) if "dev_bits_per_byte" in record]
    assert scored == [1, 2]


def test_the_model_card_says_how_to_load(world, tmp_path, monkeypatch, capsys):
    """Its Python runs; a run with --select bits scores no answers unless asked."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    train.main(flags(world, "run", "--max_steps", 2, "--select", "bits", method="byte_kd"))
    card = (tmp_path / "run/best/README.md").read_text()
    assert f"| teacher | {world / 'teacher'} |" in card and "--select bits" in card
    code = re.search("```python\n(.*)```", card, re.DOTALL)[1]
    capsys.readouterr()
    exec(code.replace('"text-generation", ', '"text-generation", max_new_tokens=3, model='))
    assert capsys.readouterr().out.startswith("Name three rivers.")
    assert "dev_rouge_l" not in (tmp_path / "run/metrics.jsonl").read_text()
    lines = how_to_load(tmp_path, "alpaca", "dolly")
    assert "### Instruction:\\nName three rivers.\\n" in lines  # as the student was trained
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["teacher"] == str((world / "teacher").resolve())


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--method sft --epochs 2",
        "--method seqkd --max_steps 9",
        "--method dskd_cma_ga --ga_weight 1",
    ],
)
def test_the_command_of_a_run_gives_its_settings(argv):
    config = train.read_settings(argv.split())
    assert train.read_settings(shlex.split(train.command_of(config))[2:]) == config


MINE = """from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from beside import WEIGHT
from methods import Method
from methods.blocks import student_side
from methods.sft import label_loss

@dataclass
class Mine:
    weight: float = WEIGHT

def mine(batch, student, teacher, modules, objective):
    total, terms = label_loss(student_side(batch, student), objective)
    return Mine().weight * total, objective.per_student_token(terms)

METHOD = Method(loss=mine, make_modules=lambda *configs: {"regressor": nn.Linear(2, 2)})
"""


def test_a_method_of_ones_own(world, tmp_path, monkeypatch):
    """It has modules and helpers of its own, is found from elsewhere, and is not changed unseen."""
    (tmp_path / "beside.py").write_text("WEIGHT = 2.0")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    cells = ["--method", "mine.py", "--teacher", world / "teacher", "--student", world / "student"]
    row = ["--methods", *map(str, cells[1:2]), "--seeds", "1", "--sets", str(world / "data")]
    row += ["--data", str(world / "data"), "--max_steps", "2", "--select", "bits", "--num", "2"]
    row += ["--scoring_seeds", "1", "--out_dir", "table", "--max_length", "64"]
    row += [str(word) for word in cells[2:]]
    compare.main(row)
    run = str(tmp_path / "table/cells/mine.py-seed1")
    record = metrics(tmp_path / "table/cells/mine.py-seed1")[0]
    assert record["loss"] == pytest.approx(record["nll_loss"])  # twice (1 − 0.5) CE
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "--out_dir", run, "--max_steps", "3"])
    probe.main([run, "--num", "2"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE + "# changed")
    with pytest.raises(InputError, match="the method of the run"):
        train.main(["--resume", "--out_dir", run, "--max_steps", "4"])
    row[row.index("--max_steps") + 1] = "3"
    with pytest.raises(InputError, match="mine.py has changed since"):
        compare.main(row)


def test_two_starts_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = checkpoint.make_run_folder("a/teacher", "b/student", "uld")
    second = checkpoint.make_run_folder("a/teacher", "b/student", "uld")
    assert [str(first), str(second)] == ["out/teacher-student-uld", "out/teacher-student-uld-2"]


def test_caches_go_where_they_are_told(world, tmp_path, monkeypatch):
    """--cache_dir, and no other place: the data's folder may be read-only."""
    monkeypatch.setenv("NANODSKD_CACHE", "unused")  # put back afterwards
    shutil.copytree(world / "data", tmp_path / "data", ignore=shutil.ignore_patterns("train-*"))
    before = sorted(tmp_path.glob("data/*"))
    more = ["--data", tmp_path / "data", "--max_steps", 1, "--cache_teacher"]
    more += ["--cache_dir", "cache"]
    monkeypatch.chdir(tmp_path)
    train.main(flags(world, tmp_path / "run", *more, method="uld"))
    monkeypatch.chdir("run")
    train.main(["--out_dir", str(tmp_path / "run"), "--resume", "--max_steps", "2"])
    assert sorted(tmp_path.glob("data/*")) == before
    assert list(tmp_path.glob("cache/computed/*/train-states-*.bin"))
    assert not (tmp_path / "run/cache").exists()
