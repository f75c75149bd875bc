"""The Triton kernels of memory bank and projections; what is tested stands in the suites named."""

import pytest
import torch
from attention_cases import run_suite

pytest.importorskip("triton", reason="no Triton on this platform")

pytestmark = pytest.mark.parametrize(
    "suite", ["interpreted_memory.py", "interpreted_projection.py"]
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
def test_in_the_interpreter(suite):
    run_suite(suite, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(suite):
    run_suite(suite, interpret=False)
