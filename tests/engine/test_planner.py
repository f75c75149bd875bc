"""Memory: plans fit their budget, are what is measured, and running out of it loses no frame."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import CONFIG, ROUNDING, noise, random_model, run
from torch import Tensor

from eval import bench
from mana_triton.engine import plan as planner
from mana_triton.engine.plan import Plan, choose, parse_bytes, predict
from mana_triton.engine.upscaler import Upscaler
from mana_triton.model import MANAConfig

LEFT = 2e-3  # of what the attention's tolerance of 0.03 leaves, in a network with large weights
GIB = 2**30
PRESETS = ("tiny", "small", "paper")


def plan_of(preset: str, height: int, width: int, room: float, **options) -> Plan:
    given = {"asked": True, "workers": None, "tile": None, "threads": 4, "batch": 0} | options
    config = MANAConfig.preset(preset)
    return choose(config, 4, height, width, room=int(room), **given)


def divided(frames: Tensor, plan: Plan, config: MANAConfig = CONFIG) -> Tensor:
    """What a stream with this plan gives."""
    upscaler = Upscaler(random_model(config), scene_cuts=False, workers=plan.workers)
    upscaler.plans[frames.shape[2], frames.shape[3]] = plan
    upscaler.radius = 2  # too little at first
    return torch.stack([torch.as_tensor(x) for x in upscaler.stream(frames)])


# --- plans


@settings(max_examples=200, deadline=None)
@given(
    preset=st.sampled_from(PRESETS),
    height=st.integers(16, 2200),
    width=st.integers(16, 4000),
    room=st.floats(0.01, 64),
    workers=st.sampled_from([None, 1, 3]),
    tile=st.sampled_from([None, 0, 64]),
    batch=st.sampled_from([0, 1, 7]),
)
def test_a_plan_fits_or_is_refused(preset, height, width, room, workers, tile, batch):
    options = {"workers": workers, "tile": tile, "batch": batch}
    try:
        plan = plan_of(preset, height, width, room * GIB, **options)
    except ValueError as error:
        assert "need" in str(error) and "raise it" in str(error)
        smallest = plan_of(preset, height, width, room * GIB, asked=False, **options)
        assert smallest.peak > room * GIB
        return
    config = MANAConfig.preset(preset)
    assert plan.peak == predict(config, 4, height, width, plan) <= room * GIB
    assert plan.batch <= batch
    assert workers is None or plan.batch or plan.workers == workers
    assert tile is None or plan.batch or plan.tile == tile


def test_more_room_is_used_for_speed():
    plans = [plan_of("tiny", 1080, 1920, room * GIB) for room in (16, 4.5, 1.5)]
    assert not plans[0].rows and plans[0].why == "256 MiB at once"
    assert 0 < plans[1].tile <= plans[0].tile
    assert plans[2].rows
    assert plan_of("tiny", 64, 112, GIB).workers == 4
    assert plan_of("tiny", 64, 112, 0.05 * GIB).workers == 1
    batches = [plan_of("tiny", 64, 112, room * GIB, batch=7).batch for room in (1, 0.2, 0.05)]
    assert batches[0] == 7 > batches[1] > batches[2] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_1080p_fits_eight_gibibytes(preset):
    plan = plan_of(preset, 1080, 1920, 7 * GIB)  # one is for the program and its encoder
    assert plan.peak <= 7 * GIB
    assert bool(plan.rows) == (preset != "tiny")


def test_plain_attention_and_the_gate_need_whole_frames():
    config = replace(MANAConfig.preset("tiny"), gaussian="gate")
    for other in (config, replace(config, gaussian="bias", sigma=math.inf)):
        with pytest.raises(ValueError, match=r"1920x1080 frames need .* GiB beside"):
            choose(other, 4, 1080, 1920, room=GIB, asked=True, workers=1, tile=None, threads=1,
                   batch=0)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8G", 8 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("800 MB", 800 * 2**20),
        ("123", 123),
        ("4k", 4096),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "8 apples", "-1G", "0", "G", "1e9"])
def test_wrong_sizes_are_named(text):
    with pytest.raises(ValueError, match="must be a size such as 8G"):
        parse_bytes(text)


def test_a_budget_is_kept_or_refused():
    model = random_model()
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"memory_budget must be None or a number of bytes"):
            Upscaler(model, memory_budget=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the memory budget leaves 0\.00"):
        list(Upscaler(model, memory_budget=1).stream(noise(2, 20, 20)))
    assert len(list(Upscaler(model, memory_budget=64 * GIB).stream(noise(2, 20, 20)))) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
@pytest.mark.parametrize("case", [bench.PLANS[i] for i in (1, 4, 8)], ids=str)
def test_the_prediction_is_what_a_stream_takes(case):
    preset, height, width, plan = case
    predicted = predict(MANAConfig.preset(preset), 4, height, width, Plan(*plan)) / 2**20
    measured = bench.peak_of(f"plan_peak({preset!r}, {height}, {width}, {plan})", threads=1)
    assert measured <= predicted * 1.2
    assert predicted <= measured * 1.2


# --- divided work


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(33, 70),
    width=st.integers(20, 50),
    rows=st.sampled_from([5, 16, 40]),
    tile=st.sampled_from([0, 16, 30]),
    match=st.sampled_from(["dot", "cosine"]),
)
def test_bands_give_what_whole_frames_give(height, width, rows, tile, match):
    config = replace(CONFIG, match=match, offsets=match == "cosine")
    frames = noise(4, height, width)
    whole = divided(frames, Plan(1, 0), config)
    bands = divided(frames, Plan(1, tile, band=8, rows=rows), config)
    assert (bands - whole).abs().max() <= LEFT


def test_bands_do_not_see_other_scenes_and_side_by_side_is_the_same():
    frames = noise(9, 40, 30)
    alone = divided(frames, Plan(1, 0, rows=16))
    together = divided(frames, Plan(2, 0, rows=16))
    # which radius a band begins with depends on the one before it
    assert (alone - together).abs().max() <= LEFT
    cuts = [i == 4 for i in range(9)]
    upscaler = Upscaler(random_model(), workers=1)
    upscaler.plans[40, 30] = Plan(1, 0, rows=16)
    remaining = iter(cuts)
    joined = upscaler.stream(frames, is_cut=lambda _: next(remaining))
    first = divided(frames[:4], Plan(1, 0))
    start = torch.stack([torch.as_tensor(x) for x in joined][:4])
    assert (start - first).abs().max() <= LEFT


def test_bands_of_the_demo_clip_differ_by_a_hundredth_of_a_step():
    frames = torch.from_numpy(bench.demo_frames((64, 112), 8)).permute(0, 3, 1, 2) / 255
    results = []
    for plan in (Plan(1, 0), Plan(1, 48, band=16, rows=32)):
        upscaler = Upscaler("tiny", scene_cuts=False, workers=1)
        upscaler.plans[64, 112] = plan
        results.append(torch.stack([torch.as_tensor(x) for x in upscaler.stream(frames)]))
    assert 255 * (results[0] - results[1]).abs().max() <= 0.01


# --- memory that runs out

ERRORS = (
    MemoryError("no memory"),
    torch.OutOfMemoryError("no memory on the GPU"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED, no memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED, no memory"),
)


def failing(function: Callable, chance: float, seed: int, error: Exception) -> Callable:
    """The function, which at random moments has no memory."""
    draw = random.Random(seed)

    def run(*args, **kwargs):
        if draw.random() < chance:
            raise error
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 3}], ids=str)
def test_no_frame_is_lost_when_memory_runs_out(seed, options):
    frames = noise(9, 70, 40)
    model = random_model()
    whole = run(model, frames, scene_cuts=False, workers=1)
    upscaler = Upscaler(model, scene_cuts=False, **options)
    stage = ("encode", "fuse", "decode", "keys_values", "extract", "fuse")[seed]
    function, calls = getattr(upscaler.model, stage), itertools.count()
    # a batch calls a stage three times in all
    moments = set(random.Random(seed).sample(range(3 if "batch" in options else 6), 1 + seed % 2))

    def sometimes(*args, **kwargs):
        if (call := next(calls)) in moments:
            moments.remove(call)
            raise ERRORS[seed % len(ERRORS)]
        return function(*args, **kwargs)

    setattr(upscaler.model, stage, sometimes)
    results = torch.stack([torch.as_tensor(x) for x in upscaler.stream(frames)])
    assert not moments, "it must have failed"
    assert upscaler.plan_for(70, 40).why == "halved, as the memory ran out"
    assert (results - whole).abs().max() <= LEFT


@pytest.mark.parametrize("moments", [{0}, {3}, {0, 1}, {2, 3, 4}], ids=str)
def test_batches_start_again_from_the_next_result(moments):
    """Down to no batch at all, with scene cuts where they were."""
    frames, cuts = noise(20, 9, 10), {0, 6, 13}
    model, read = random_model(), []

    def source():
        for number, frame in enumerate(frames):
            read.append(number)
            yield frame

    def enlarged(upscaler: Upscaler) -> Tensor:
        numbers = itertools.count()
        results = upscaler.stream(source(), is_cut=lambda _: next(numbers) in cuts)
        return torch.stack([torch.as_tensor(x) for x in results])

    whole = enlarged(Upscaler(model, workers=1))
    read.clear()
    upscaler = Upscaler(model, batch=4)
    decode, calls = upscaler.model.decode, itertools.count()

    def sometimes(z: Tensor) -> Tensor:
        if next(calls) in moments:
            raise MemoryError
        return decode(z)

    upscaler.model.decode = sometimes
    results = enlarged(upscaler)
    assert upscaler.plan_for(9, 10).batch == 4 >> len(moments)
    assert read == list(range(20)), "every frame is read once"
    assert (results - whole).abs().max() <= ROUNDING


def test_memory_that_runs_out_in_the_source_is_its_own_affair():
    def source():
        yield from noise(5, 9, 10)
        raise MemoryError("no room to read")

    upscaler = Upscaler(random_model(), batch=2)
    with pytest.raises(MemoryError, match="no room to read"):
        list(upscaler.stream(source()))
    assert upscaler.plan_for(9, 10).batch == 2


def test_parts_are_halved_down_to_bands_and_no_further():
    assert Plan(1, 0, batch=5).halved(9, 10) == Plan(
        1, 0, batch=2, why="halved, as the memory ran out"
    )
    plan, sizes = Plan(1, 0), []
    while plan := plan.halved(1080, 1920):
        sizes.append((plan.tile, plan.band, plan.rows))
    assert sizes[:3] == [(960, 32, 0), (480, 16, 0), (240, 8, 0)]
    assert sizes[-3:] == [(32, 8, 64), (32, 8, 32), (32, 8, 16)]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_without_any_memory_the_error_comes_out(stage, error):
    upscaler = Upscaler(random_model(), workers=1)
    for name in {stage, "extract"} if stage == "encode" else {stage}:
        setattr(upscaler.model, name, failing(getattr(upscaler.model, name), 1.0, 0, error))
    with pytest.raises(type(error), match="memory"):
        list(upscaler.stream(noise(5, 40, 40)))


def test_other_errors_are_not_taken_for_it():
    upscaler = Upscaler(random_model(), workers=1)
    wrong = RuntimeError("a broken kernel")
    upscaler.model.decode = failing(upscaler.model.decode, 1.0, 0, wrong)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        list(upscaler.stream(noise(5, 40, 40)))
    assert upscaler.plan_for(40, 40).why == "the whole frame fits"


def test_tiles_that_were_halved_change_nothing_but_rounding():
    frames = noise(5, 70, 90)
    model = random_model()
    whole = run(model, frames, workers=1)
    upscaler = Upscaler(model, workers=1)
    decode, left = upscaler.model.decode, iter([True])

    def once(z: Tensor) -> Tensor:
        if next(left, False):
            raise MemoryError
        return decode(z)

    upscaler.model.decode = once
    results = torch.stack([torch.as_tensor(x) for x in upscaler.stream(frames)])
    assert upscaler.plan_for(70, 90).tile == 45
    # bands of other heights begin with other halos
    assert (results[0] - whole[0]).abs().max() <= ROUNDING
    assert (results - whole).abs().max() <= LEFT


def test_sizes_of_this_machine():
    cpu = torch.device("cpu")
    assert 2**20 < planner.held(cpu) < (planner.size(cpu) or math.inf)
