"""Imports flow one way: infer, train -> jobs, training -> engine, video -> model -> kernels."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "mana_triton"
NETWORK = {"kernels", "attention", "model", "checkpoint"}
ALLOWED = {
    "files": set(), "resize": set(), "kernels": set(), "metrics": set(), "video": set(),
    "attention": {"kernels"},
    "model": {"attention", "kernels"},
    "checkpoint": NETWORK - {"checkpoint"},
    "engine": NETWORK,
    "export": NETWORK | {"engine"},
    "jobs": NETWORK | {"engine", "video"},
    "training": NETWORK | {"engine", "video", "metrics"},
    "infer": NETWORK | {"engine", "video", "jobs"},
    "train": NETWORK | {"training"},
}  # fmt: skip


def test_imports_flow_one_way():
    files = [*ROOT.glob("**/*.py"), *(ROOT / "kernels").glob("**/*.py")]
    for file in files:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = {name.split(".")[1] for name in names if name.startswith("mana_triton.")}
            wrong = found - ALLOWED.get(room, found) - {room, "files", "resize", "runtime"}
            assert not wrong, f"{file} must not import {wrong}"
            assert not any(name.split(".")[0] == "eval" for name in names), file
