"""Plans fit their budget, the estimate is what is measured, and out of memory loses no frame."""

import itertools
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ROUNDING, lively_network, noise
from torch import Tensor

from mana_triton.engine import memory
from mana_triton.engine.memory import parse_bytes
from mana_triton.engine.plan import Plan, estimate, first_plan, fit
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.model import MANA, MANAConfig

GIB = 2**30
ONE = EngineOptions(workers=1, scene_cuts=False)


def plan_of(
    preset: str, height: int, width: int, room: float = math.inf, batched=False, **asked: int
) -> Plan:
    config = MANAConfig.preset(preset)
    plan = first_plan(config, 4, height, width, threads=4, batched=batched)
    return fit(plan, asked, int(min(room, 2**60)), config, 4, height, width)


def pictures(upscaler: Upscaler, frames) -> Tensor:
    return torch.stack([torch.as_tensor(x.picture) for x in upscaler.stream(frames)])


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(("tiny", "small", "paper")),
    size=st.tuples(st.integers(16, 2200), st.integers(16, 4000)),
    room=st.floats(0.01, 64),
    batched=st.booleans(),
    asked=st.sampled_from([{}, {"tile": 64}, {"tile": 0, "workers": 3}]),
)
def test_a_plan_fits_or_is_refused(preset, size, room, batched, asked):
    height, width = size
    try:
        plan = plan_of(preset, height, width, room * GIB, batched, **asked)
    except ValueError as error:
        assert "the memory budget leaves" in str(error) and "raise it" in str(error)
        return
    assert plan.peak == estimate(MANAConfig.preset(preset), 4, height, width, plan) <= room * GIB
    assert all(getattr(plan, name) == value for name, value in asked.items())


@pytest.mark.parametrize(
    ("preset", "height", "width", "tile", "workers"),
    [
        ("tiny", 64, 112, 0, 4), ("tiny", 180, 320, 0, 1), ("small", 96, 128, 0, 3),
        ("paper", 64, 112, 0, 2), ("tiny", 360, 640, 235, 1), ("tiny", 1080, 1920, 235, 1),
        ("small", 1080, 1920, 107, 1), ("paper", 1080, 1920, 32, 1),
    ],
)  # fmt: skip
def test_plans_of_common_sizes(preset, height, width, tile, workers):
    """The results' bits depend on the division, so it must not change by accident."""
    plan = plan_of(preset, height, width)
    assert (plan.tile, plan.workers, plan.batch, plan.band) == (tile, workers, 1, 64)


def test_a_gpu_gets_batches_of_whole_frames():
    assert plan_of("tiny", 64, 112, batched=True).batch == 7
    assert plan_of("paper", 270, 480, batched=True).batch == 1
    assert plan_of("tiny", 64, 112, 0.1 * GIB, batched=True).batch < 7


def test_the_largest_part_is_halved_first():
    plan, sizes = Plan(batch=5, workers=2), []
    while plan := plan.halved(1080, 1920):
        sizes.append((plan.batch, plan.workers, plan.tile, plan.band))
    assert sizes[:4] == [(2, 2, 0, 64), (1, 2, 0, 64), (1, 1, 0, 64), (1, 1, 960, 32)]
    assert sizes[4:] == [(1, 1, 480, 16), (1, 1, 240, 8), (1, 1, 120, 8), (1, 1, 60, 8)]


def test_frames_that_do_not_fit_are_refused_before_work_begins():
    upscaler = Upscaler(lively_network(), EngineOptions(memory_budget=1))
    message = r"20x20 frames need .* GiB in addition .*, the memory budget leaves 0\.00; raise it"
    with pytest.raises(ValueError, match=message):
        upscaler.plan(20, 20)
    with pytest.raises(ValueError, match=message):
        list(upscaler.stream(noise(2, 20, 20)))
    enough = Upscaler(lively_network(), EngineOptions(memory_budget=64 * GIB))
    assert len(pictures(enough, noise(2, 20, 20))) == 2


def test_sizes_are_parsed():
    for text, size in (("8G", 8 * GIB), ("1.5GiB", 3 * GIB // 2), ("800 MB", 800 << 20)):
        assert parse_bytes(text) == size
    for text in ("", "8 apples", "-1G", "0", "G", "1e9"):
        with pytest.raises(ValueError, match="must be a size such as 8G"):
            parse_bytes(text)


def test_memory_of_this_machine():
    cpu = torch.device("cpu")
    assert 2**20 < memory.held_bytes(cpu) < (memory.total_bytes(cpu) or math.inf)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
def test_the_estimate_is_what_a_stream_takes():
    code = """
        from pathlib import Path
        from mana_triton import runtime
        runtime.configure_process()
        import numpy as np, torch
        from mana_triton import EngineOptions, Upscaler
        torch.set_num_threads(2)
        options = EngineOptions(device="cpu", precision="fp32", workers=2, tile=0)
        upscaler = Upscaler("tiny", options)

        def enlarge(height, width):
            frames = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
            for _ in upscaler.stream(frames, is_cut=lambda _: False):
                pass

        def kib(key):
            return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

        enlarge(32, 40)  # what the first call alone takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = kib("VmRSS")
        enlarge(96, 160)
        print((kib("VmHWM") - before) / 1024, upscaler.plan(96, 160).peak / 2**20)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    measured, estimated = map(float, result.stdout.split())
    assert 0.7 * estimated <= measured <= 1.3 * estimated


# --- out of memory

ERRORS = (
    MemoryError("no memory"),
    torch.OutOfMemoryError("no memory on the GPU"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED, no memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED, no memory"),
)


def fail(model: MANA, stage: str, moments: set[int], error: Exception) -> None:
    """Let a stage of a network fail at some of its calls; they are removed when it has."""
    function, calls = getattr(model, stage), itertools.count()

    def sometimes(*args, **kwargs):
        if (call := next(calls)) in moments:
            moments.discard(call)
            raise error
        return function(*args, **kwargs)

    setattr(model, stage, sometimes)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 3}], ids=str)
def test_no_frame_is_lost_when_memory_runs_out(seed, options):
    """Each frame is read once, and scene cuts stay where they are."""
    frames, cuts, read = noise(9, 70, 40), {0, 6}, []
    model = lively_network()

    def enlarged(upscaler: Upscaler) -> Tensor:
        results = upscaler.stream(
            range(9), pixels=lambda n: read.append(n) or frames[n], is_cut=lambda n: n in cuts
        )
        return torch.stack([torch.as_tensor(x.picture) for x in results])

    whole = enlarged(Upscaler(model, ONE))
    read.clear()
    upscaler = Upscaler(model, EngineOptions(**options))
    moments = {seed % 3}
    stage = ("encode", "fuse", "decode", "keys_values", "extract", "queries")[seed]
    fail(upscaler.model, stage, moments, ERRORS[seed % len(ERRORS)])
    results = enlarged(upscaler)
    assert not moments, "it must have failed"
    assert upscaler.plan(70, 40).why == "halved, as the memory ran out"
    assert read == list(range(9))
    assert (results - whole).abs().max() <= 20 * ROUNDING  # of other bands


def test_out_of_memory_in_the_source_is_raised():
    def source():
        yield from noise(5, 9, 10)
        raise MemoryError("no room to read")

    for workers in (1, 2):
        upscaler = Upscaler(lively_network(), EngineOptions(batch=2, workers=workers))
        with pytest.raises(MemoryError, match="no room to read"):
            list(upscaler.stream(source()))
        assert upscaler.plan(9, 10).batch == 2


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_an_error_is_raised_when_the_parts_are_the_smallest(error):
    upscaler = Upscaler(lively_network(), ONE)
    fail(upscaler.model, "decode", set(range(100)), error)
    with pytest.raises(type(error), match="memory"):
        list(upscaler.stream(noise(5, 80, 80)))
    assert upscaler.plan(80, 80).tile == 40


def test_other_errors_are_raised_at_once():
    upscaler = Upscaler(lively_network(), ONE)
    fail(upscaler.model, "decode", {0}, RuntimeError("a broken kernel"))
    with pytest.raises(RuntimeError, match="a broken kernel"):
        list(upscaler.stream(noise(5, 40, 40)))
    assert upscaler.plan(40, 40).why == "the whole frame fits"
