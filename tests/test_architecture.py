"""Imports flow one way: eval > jobs, training > engine, video > model > attention > kernels."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = {"files", "resize"}  # what every module may import
NETWORK = {"model", "attention", "checkpoint", "kernels", "metrics", "export"}
ALLOWED = {
    "kernels": set(),
    "attention": {"kernels"},
    "model": {"attention", "kernels"},
    "checkpoint": {"model", "attention"},
    "metrics": set(),
    "engine": NETWORK,
    "video": set(),
    "export": NETWORK | {"engine"},
    "jobs": NETWORK | {"engine", "video"},
    "training": NETWORK | {"engine", "video"},
    "infer": NETWORK | {"engine", "video", "jobs"},
    "train": NETWORK | {"engine", "video", "training"},
}  # fmt: skip


def room(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "mana_triton" else parts[1]


def imported(file: Path) -> set[str]:
    """The rooms of mana_triton that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("mana_triton.")}
    return found


def test_imports_flow_one_way():
    files = [*ROOT.glob("mana_triton/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert len(files) > 30
    for file in files:
        if (at := room(file)) in ALLOWED:
            wrong = imported(file) - ALLOWED[at] - BASE - {at}
            assert not wrong, f"{file.relative_to(ROOT)} must not import {', '.join(wrong)}"


def test_programs_of_eval_are_imported_by_nothing():
    for file in ROOT.glob("mana_triton/**/*.py"):
        assert not any(line.startswith(("from eval", "import eval")) for line in file.open())
