"""What only a GPU can show: pytest -m cuda."""

import json
import signal

import pytest
import torch

import model
import train
from distillation import DistillationLoss
from methods import method_names
from runtime.generation import generate
from tests.helpers import close, flags, metrics

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("side", ("student", "teacher"))
@torch.no_grad()
def test_decoders_are_the_cpus(side, world):
    cpu, gpu = model.load(world / side), model.load(world / side, device="cuda")
    ids, mask = torch.randint(5, 300, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    real = mask.bool()
    expected, found = cpu(ids, mask), gpu(ids.cuda(), mask.cuda())
    close(gpu.logits(found).cpu()[real], cpu.logits(expected)[real], 1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        half = gpu.logits(gpu(ids.cuda(), mask.cuda())).float().cpu()
    close(half[real], cpu.logits(expected)[real], 0.1)
    a = generate(cpu, ids, mask, 10, temperature=0)
    b = generate(gpu, ids.cuda(), mask.cuda(), 10, temperature=0).cpu()
    assert (a == b).float().mean() > 0.9


COMBINATIONS = [(name, []) for name in method_names() if name not in ("kd", "dskd")]
COMBINATIONS += [
    ("dwa_kd", ["--adversary", "gan", "--gradient_checkpointing"]),
    ("dskd_cma", ["--lora_rank", 4]),
    ("byte_kd", ["--on_policy", 0.5]),
    ("uld", ["--cache_teacher"]),
]


@pytest.mark.parametrize("method, more", COMBINATIONS)
def test_methods_train_as_on_the_cpu(method, more, world, tmp_path):
    """Float32 on both: the first steps' losses; and a run in bfloat16, the GPU's own type."""
    deterministic = method in ("sft", "seqkd", "uld", "mined", "byte_kd", "alm", "dskd_cma")
    losses = {}
    for device in ("cpu", "cuda"):
        where = ["--device", device, "--dtype", "float32", "--max_steps", 3, *more]
        train.main(flags(world, tmp_path / device, *where, method=method))
        losses[device] = [r["loss"] for r in metrics(tmp_path / device) if "loss" in r]
    if deterministic and not more:
        close(losses["cuda"], losses["cpu"], 2e-3)
    train.main(flags(world, tmp_path / "half", "--max_steps", 3, *more, method=method))
    half = [r["loss"] for r in metrics(tmp_path / "half") if "loss" in r]
    close(half[0], losses["cuda"][0], 0.1)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_resumes(world, tmp_path):
    common = ["--max_steps", 8, "--eval_interval", 4, "--dtype", "float32"]
    train.main(flags(world, tmp_path / "whole", *common))
    real = train.append_metrics

    def interrupt(out_dir, record):
        real(out_dir, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "append_metrics", interrupt)
        with pytest.raises(SystemExit):
            train.main(flags(world, tmp_path / "cut", *common))
    train.main(["--out_dir", str(tmp_path / "cut"), "--resume"])
    a, b = (
        [r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in ("whole", "cut")
    )
    close(b, a, 1e-3)


def test_the_teacher_of_a_loss_follows_the_student(world):
    """As in a transformers Trainer, which moves the model that learns."""
    student, teacher = model.load(world / "student"), model.load(world / "teacher")
    loss_function = DistillationLoss(
        "dskd_cma", student, teacher, world / "student", world / "teacher"
    )
    student.cuda()
    loss, _ = loss_function([{"prompt": "Name a river.", "output": "The Rhine."}])
    loss.backward()
    assert loss.is_cuda


def test_no_logits_of_the_whole_batch():
    """The peak memory of a loss and its gradient is far from what all logits would take."""
    from methods import blocks

    N, V, d = 20_000, 20_000, 16
    hidden = torch.randn(N, d, device="cuda", requires_grad=True)
    head = torch.randn(V, d, device="cuda", requires_grad=True)
    labels = torch.randint(0, V, (N,), device="cuda")

    def block_loss(block, logits):
        terms = blocks.cross_entropy(logits, labels[block])
        return terms["nll_loss"].sum(), terms

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = blocks.in_blocks(block_loss, [hidden], [head])
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.3 * 4 * N * V
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), labels, reduction="sum")
    close(loss.detach().cpu(), expected.detach().cpu(), 1e-4)
