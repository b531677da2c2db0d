"""Fixtures. The tests see no GPU, but for those of `pytest -m cuda`."""

import os
import warnings
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
HAS_CUDA = torch.cuda.is_available()


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: wants a GPU")
    config.addinivalue_line("markers", "soak: kills a run 20 times, a minute or two")
    config.addinivalue_line("markers", "draws: looks at a run's pictures")
    if "cuda" not in config.getoption("-m"):
        torch.cuda.is_available = lambda: False
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("cuda") and not (HAS_CUDA and chosen == "cuda"):
            item.add_marker(pytest.mark.skip(reason="wants a GPU and -m cuda"))
        if item.get_closest_marker("soak") and chosen != "soak":
            item.add_marker(pytest.mark.skip(reason="wants -m soak"))


@pytest.fixture(autouse=True, scope="session")
def data_folder(tmp_path_factory):
    """What the scripts keep under data/ stays out of the project's own."""
    import runtime.files

    patch = pytest.MonkeyPatch()
    patch.setattr(runtime.files, "PROJECT", tmp_path_factory.mktemp("project"))
    (runtime.files.PROJECT / "data").mkdir()
    yield runtime.files.PROJECT / "data"
    patch.undo()


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than most tests' runs."""
    from pictures import runs

    if request.node.get_closest_marker("draws"):
        return
    for name in ("results", "curves"):
        monkeypatch.setattr(runs, name, lambda *args: None)


@pytest.fixture(scope="session")
def world(data_folder, tmp_path_factory) -> Path:
    """A few rows of the toy, and both its models with random weights: data/, student/, teacher/."""
    import model
    import toy

    patch = pytest.MonkeyPatch()
    for name, value in dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2).items():
        patch.setitem(toy.TEACHER, name, value)
    toy.write_data()
    patch.undo()
    folder = tmp_path_factory.mktemp("world")
    for side in ("student", "teacher"):
        torch.manual_seed(5)
        model.load(toy.home() / f"{side}-start", init="random").save(folder / side)
    (folder / "data").mkdir()
    for split, rows in (("train", 48), ("dev", 6), ("test", 6)):
        lines = (toy.home() / "toy" / f"{split}.jsonl").read_text().splitlines(True)[:rows]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def quick_run(world, tmp_path_factory) -> Path:
    """A finished run of four steps, with everything in its folder."""
    import train
    from tests.helpers import QUICK, flags

    folder = tmp_path_factory.mktemp("quick") / "run"
    train.main(flags(world, folder, *QUICK))
    return folder
