"""The losses outside train.py: alike for this project's models and transformers', in a loop, in a
Trainer and in the notebook."""

import json
import runpy

import pytest
import torch

import model
import train
from distillation import DistillationLoss
from runtime.config import InputError
from tests.helpers import HERE, close, flags, metrics

transformers = pytest.importorskip("transformers")

ROWS = [
    {"prompt": "Say what Mira eats.\n", "output": "Mira eats figs."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tolven"}]},
]


def loaded(world, ours: bool):
    folders = world / "student", world / "teacher"
    if ours:
        return [*map(model.load, folders), *map(str, folders)]
    models = map(transformers.AutoModelForCausalLM.from_pretrained, folders)
    return [*models, *map(transformers.AutoTokenizer.from_pretrained, folders)]


@pytest.mark.parametrize(
    "method", ("byte_kd", "alm", "dskd_cma", "dwa_kd", "dskdv2", "gold", "mined", "uld", "xtoken")
)
def test_models_of_transformers_have_the_same_loss(method, world):
    """And the same gradients, of the student and of what learns beside it."""
    found = []
    for ours in (True, False):
        student, teacher, *tokenizers = loaded(world, ours)
        torch.manual_seed(1)
        loss_function = DistillationLoss(method, student, teacher, *tokenizers)
        loss, terms = loss_function(ROWS)
        loss.backward()
        assert all(p.grad is None for p in teacher.parameters())
        embed = student.embed if ours else student.get_input_embeddings()
        beside = [p.grad.abs().sum() for p in loss_function.parameters() if p.grad is not None]
        found.append((loss.detach(), embed.weight.grad, torch.stack([torch.zeros(()), *beside])))
        assert "nll_loss" in terms and "kd_loss" in terms
    for mine, other in zip(*found):
        close(mine, other, 1e-5)


@pytest.mark.parametrize("method", ("byte_kd", "dskd_cma_ga", "dwa_kd", "dskdv2", "gold", "xtoken"))
def test_models_in_bfloat16(method, world):
    """transformers loads a model in its checkpoint's type; autocast brings all together."""
    losses = []
    for types in (torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2:
        student, teacher, *tokenizers = loaded(world, ours=False)
        torch.manual_seed(1)
        models = student.to(types[0]), teacher.to(types[1])
        loss, _ = DistillationLoss(method, *models, *tokenizers)(ROWS)
        loss.backward()
        losses.append(loss.detach().float())
    close(losses[1], losses[0], 0.05)
    close(losses[2], losses[0], 0.05)


def test_it_is_the_loss_of_train(world, tmp_path):
    """The first step of a run on two rows."""
    lines = (world / "data/train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(lines))
    argv = flags(world, tmp_path / "run", "--data", tmp_path / "data", "--max_steps", 1)
    argv[argv.index("--method") + 1] = "byte_kd"
    train.main(argv)
    student, teacher, *tokenizers = loaded(world, ours=True)
    loss_function = DistillationLoss("byte_kd", student.eval(), teacher, *tokenizers)
    loss, _ = loss_function([json.loads(line) for line in lines])
    close(loss.detach(), metrics(tmp_path / "run")[0]["loss"], 1e-5)


def test_wrong_options_and_rows(world):
    models = loaded(world, ours=True)
    with pytest.raises(InputError, match="divergence: uld does not use it"):
        DistillationLoss("uld", *models, divergence="reverse_kl")
    with pytest.raises(InputError, match="on_policy: byte_kd does not use it"):
        DistillationLoss("byte_kd", *models, on_policy=0.5)
    with pytest.raises(InputError, match="seqkd: is cross-entropy"):
        DistillationLoss("seqkd", *models)
    with pytest.raises(InputError, match="needs one vocabulary"):
        DistillationLoss("kd", *models)
    with pytest.raises(InputError, match="dskd_cma: needs models in bfloat16 or float32"):
        DistillationLoss("dskd_cma", models[0], model.load(world / "teacher").half(), *models[2:])
    with pytest.raises(InputError, match="float16: it is too coarse"):
        with torch.autocast("cpu", torch.float16):
            DistillationLoss("byte_kd", *models)(ROWS)
    with pytest.raises(InputError, match="row 1: no output"):
        DistillationLoss("uld", *models)([ROWS[0], {"prompt": "p"}])


@pytest.mark.parametrize("method", ["byte_kd", "dskd_cma_ga"])
def test_the_trainer(method, world, tmp_path, monkeypatch):
    """It trains the student and what learns beside it, evaluates and saves."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lines = (world / "data/train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    example = runpy.run_path(str(HERE / "examples/trainer.py"))
    trainer = example["main"](
        str(world / "teacher"),
        str(world / "student"),
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "out"),
        method,
        num_train_epochs=8,
        report_to="none",
        use_cpu=True,
    )
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert trainer.state.global_step == 16 and losses
    learned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.model.parameters()} <= learned
    assert {id(p) for p in trainer.model.loss_function.parameters()} <= learned
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(saved.get_input_embeddings().weight, trainer.model.student.get_input_embeddings().weight)
    evaluated = trainer.evaluate(trainer.train_dataset[:8])["eval_loss"]
    with torch.no_grad():
        expected, _ = trainer.model.loss_function(trainer.train_dataset[:8])
    close(evaluated, expected, 1e-5)
    assert len((HERE / "examples/trainer.py").read_text().splitlines()) <= 60


def test_the_notebook(world, monkeypatch, capsys):
    """Every cell runs, on the small models."""
    monkeypatch.chdir(HERE / "examples")
    monkeypatch.setenv("TEACHER", str(world / "teacher"))
    monkeypatch.setenv("STUDENT", str(world / "student"))
    import matplotlib

    matplotlib.use("agg")
    cells = json.loads((HERE / "examples/two_models.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert 0 < names["inside"] < 1  # of the attention, before training
    said = capsys.readouterr().out
    assert "student: " in said and "KL " in said
    for curve in names["curves"].values():
        assert curve[-1] < curve[0]
