"""Fixtures that several test files use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float32_on_every_cpu(monkeypatch):
    """The automatic precision is the same wherever the tests run."""
    float32 = "fp32", "the fastest here"
    monkeypatch.setattr("mana_triton.engine.device.fastest_on_cpu", lambda: float32)


@pytest.fixture
def one_thread():
    """PyTorch on one thread: small tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned():
    """Uninitialized memory holds NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)
