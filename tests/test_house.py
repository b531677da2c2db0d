"""The layout: imports go one way, lines are short, the README points at what is there."""

import ast
import re

import pytest

from tests.helpers import HERE

SKIPPED = {"data", "out", "golden", ".venv", "tests"}
FILES = [
    f
    for f in sorted(HERE.rglob("*.py"))
    if not set(f.relative_to(HERE).parts[:-1]) & SKIPPED and f.name != "test_all.py"
]
NAMES = {".".join(f.relative_to(HERE).with_suffix("").parts) for f in FILES}


def imported(path) -> set[str]:
    """The project's modules that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in NAMES or f"{name}.__init__" in NAMES}


def test_imports_go_one_way():
    """No circle; the data flows text → tokenize_align → model → cma, methods → train → scripts."""
    edges = {}
    for file in FILES:
        name = ".".join(file.relative_to(HERE).with_suffix("").parts)
        edges[name.removesuffix(".__init__")] = imported(file)

    def reach(name, path):
        assert name not in path, f"a circle: {path + [name]}"
        for other in edges.get(name, ()):
            if other != name:
                reach(other, [*path, name])

    for name in edges:
        reach(name, [])
    concepts = {"cma", "discriminator"} | {name for name in edges if name.startswith("methods")}
    for name in concepts:
        allowed = concepts | {"runtime.config"}
        assert edges[name] <= allowed, f"{name} knows more than tensors: {edges[name] - allowed}"
    for name in edges:
        if not name.startswith("tools"):
            assert not any(other.startswith("tools") for other in edges[name]), name


def test_lines_are_short():
    for file in [
        *FILES,
        *(HERE / "tests").glob("*.py"),
        HERE / "test_all.py",
        HERE / "conftest.py",
    ]:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            assert len(line) <= 100, f"{file}:{number}"


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (HERE / "docs").glob("*.md"))]
)
def test_pages_point_at_what_is_there(page):
    """Files, links, scripts and flags of a page exist."""
    text = (HERE / page).read_text(encoding="utf-8")
    assert not re.search(r"[A-Z]+_(TEXT|TABLE)", text), "a placeholder"
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt))`", text):
        if name == "table.md":  # tools.compare writes it
            continue
        assert (HERE / name).exists() or list(HERE.rglob(name)), f"{page}: {name}"
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert ((HERE / page).parent / link).exists(), f"{page}: {link}"
    import probe
    import sample
    import train
    from eval_rouge import Config as EvalConfig
    from examples import python_functions
    from tools import bench, compare, compress

    known = {"help", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    for config in (
        train.Config,
        EvalConfig,
        sample.Config,
        probe.Config,
        bench.Config,
        compare.Config,
        compress.Config,
        python_functions.Config,
    ):
        known |= config.__dataclass_fields__.keys()
    if page == "docs/ablations.md":  # its commands name the commit that had their options
        return
    for flag in re.findall(r"(?<![\w-])--(\w+)", text):
        assert flag in known, f"{page}: --{flag}"
