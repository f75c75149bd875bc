"""The memory bank's Triton kernels; what is tested stands in interpreted_memory.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

SUITE = Path(__file__).with_name("interpreted_memory.py")


def run(interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(SUITE)]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]
    # the poison comes with deterministic algorithms, for which cuBLAS wants this
    choices = {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    result = subprocess.run(
        command, cwd=SUITE.parent.parent, env={**os.environ, **choices},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
def test_in_the_interpreter():
    run("1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run("0")
