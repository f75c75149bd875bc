"""The Triton kernel of the projections; what is tested stands in interpreted_projection.py."""

import pytest
import torch
from attention_cases import run_suite

pytest.importorskip("triton", reason="no Triton on this platform")

SUITE = "interpreted_projection.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
def test_in_the_interpreter():
    run_suite(SUITE, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run_suite(SUITE, interpret=False)
