"""Launch configurations: lookup, defaults, and an autotuning run on a fake GPU."""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch

from mana_triton.kernels import config

triton = pytest.importorskip("triton", reason="no Triton on this platform")

from mana_triton.kernels import tune  # noqa: E402
from mana_triton.kernels.inspect import Compiled  # noqa: E402

ROOT = Path(__file__).parents[2]
GPU, BF16 = "NVIDIA Imaginary 90", torch.bfloat16
DEVICE = torch.device("cuda", 0)
CONFIG = {
    "BLOCK_M": 64,
    "BLOCK_N": 32,
    "num_warps": 4,
    "num_stages": 3,
    "WARP_SPECIALIZE": False,
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A Hopper GPU that was never tuned."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(config, "TUNED", tmp_path / "tuned.json")
    config.forget()
    yield config.TUNED
    config.forget()


def entry(**changes) -> dict:
    case = {"gpu": GPU, "kernel": "memory_forward", "d": 64, "dtype": "bfloat16"}
    return {**case, "height": 64, "width": 112, "config": CONFIG, **changes}


def write(path: Path, *entries: dict) -> None:
    path.write_text(json.dumps(entries))
    config.forget()


def look_up(height=64, width=112, kernel="memory_forward", d=64, dtype=BF16) -> dict:
    return config.launch_config(kernel, d, dtype, height, width, DEVICE)


# --- lookup


def test_the_nearest_size_in_ratio_is_taken(gpu):
    small, large = ({**CONFIG, "num_stages": n} for n in (5, 6))
    write(gpu, entry(config=small, height=10, width=10), entry(config=large, height=100, width=100))
    assert look_up(10, 10) == look_up(30, 31) == small  # 930 is nearer to 100 than to 10000
    assert look_up(32, 32) == look_up(1000, 1000) == large
    assert look_up(5, 20) == small  # the same number of pixels


@pytest.mark.parametrize(
    "change",
    [{"gpu": "NVIDIA Other"}, {"kernel": "memory_backward"}, {"d": 32}, {"dtype": "float16"}],
    ids=lambda change: next(iter(change)),
)
def test_another_gpu_kernel_width_or_type_does_not_count(change, gpu):
    write(gpu, entry(**change))
    message = f"no tuned configuration of memory_forward for {GPU}"
    with pytest.warns(UserWarning, match=message):
        found = look_up()
    assert found == config.default_config("memory_forward", "sm_90", 64, BF16)


def test_one_warning_names_the_command(gpu):
    with pytest.warns(UserWarning, match=re.escape("python -m mana_triton.kernels.tune")) as record:
        for kernel, d in product(config.KERNELS, (16, 64)):
            look_up(kernel=kernel, d=d)
    assert len(record) == 1
    write(gpu, entry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look_up() == CONFIG


def test_the_interpreter_takes_a_default_without_a_warning(gpu):
    found = config.launch_config("memory_forward", 64, BF16, 8, 8, torch.device("cpu"))
    assert found == config.default_config("memory_forward", "cpu", 64, BF16)


def test_a_pinned_configuration_comes_first_within_its_context(gpu):
    write(gpu, entry())
    other, inner = {**CONFIG, "BLOCK_M": 16}, {**CONFIG, "BLOCK_M": 32}
    with config.pinned("memory_forward", other):
        assert look_up() == other
        with config.pinned("memory_forward", inner):
            assert look_up() == inner
        assert look_up() == other
    assert look_up() == CONFIG


@pytest.mark.parametrize(
    ("capability", "arch"),
    {(8, 0): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_80",
     (12, 0): "sm_89"}.items(),
)  # fmt: skip
def test_architecture(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert config.architecture(DEVICE) == arch


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5; use backend 'tiled'"):
        config.architecture(DEVICE)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"kernel must be one of cross_frame_forward, .*'attn'"):
        config.default_config("attn", "sm_90", 64, BF16)
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .* or cpu, got 'sm_75'"):
        config.default_config("memory_forward", "sm_75", 64, BF16)


# --- an autotuning run


def compiled(**changes) -> Compiled:
    sound = {
        "registers": 100, "spills": 0, "shared": 1000, "occupancy": 4, "matrix": "wgmma",
        "instructions": (8.0,), "exponentials": (1.0,), "bulk_copies": 0, "warps": 4,
        "warp_specialized": False,
    }  # fmt: skip
    return Compiled(**{**sound, **changes})


CASES = [tune.Case("memory_forward", 64, BF16, *size) for size in ((64, 112), (144, 180))]


class Machine:
    """Compiles and measures: time falls with BLOCK_N, and some configurations do not work."""

    def __init__(self):
        self.measured: list[tuple[tune.Case, dict]] = []
        self.compiled = 0
        self.wrong_block: int | None = None

    def compile_all(self, requests):
        self.compiled += len(requests)
        for request in requests:
            changes = {"spills": 64} if request.config["num_warps"] == 8 else {}
            if request.config["num_stages"] == 3:
                yield {request.kernel: "does not compile: by order"}
            else:
                yield {request.kernel: compiled(**changes)}

    def options(self, case):
        return config.launch_config(
            case.kernel, case.d, case.dtype, case.height, case.width, DEVICE
        )

    def wrong(self, case, device):
        return "wrong by 1" if self.options(case)["BLOCK_N"] == self.wrong_block else ""

    def measure(self, case, device):
        options = self.options(case)
        self.measured.append((case, options))
        ms = 1 / options["BLOCK_N"] + 1 / options["BLOCK_M"] / 1000
        return ms, 0.9 * ms, 1.1 * ms

    def tune(self, deadline=math.inf):
        return tune.tune(CASES, DEVICE, deadline, self.compile_all, self.measure, self.wrong)


def test_the_fastest_sound_candidate_wins(gpu, capsys):
    machine = Machine()
    entries = machine.tune()
    assert [x["config"]["BLOCK_N"] for x in entries] == [128, 128]
    assert all(x["config"]["num_warps"] == 4 and x["config"]["num_stages"] == 2 for x in entries)
    assert all(x["complete"] and x["gpu"] == GPU and x["registers"] == 100 for x in entries)
    assert all(x["p20"] < x["ms"] < x["p80"] for x in entries)
    # neither what spills nor what does not compile was timed, and sizes share the compilations
    assert {(c["num_warps"], c["num_stages"]) for _, c in machine.measured} == {(4, 2)}
    assert machine.compiled == len(tune.candidates("memory_forward", "sm_90", 64, BF16))
    reasons = capsys.readouterr().err
    assert "memory_forward: spills 64 bytes" in reasons
    assert "does not compile: by order" in reasons
    assert look_up() == entries[0]["config"]
    assert look_up(1000, 1000) == entries[1]["config"]


def test_a_wrong_candidate_is_not_timed(gpu, capsys):
    machine = Machine()
    machine.wrong_block = 128
    assert {x["config"]["BLOCK_N"] for x in machine.tune()} == {64}
    assert all(config["BLOCK_N"] != 128 for _, config in machine.measured)
    assert "wrong by 1" in capsys.readouterr().err


def test_a_second_run_measures_nothing_again(gpu):
    first = Machine().tune()
    text = gpu.read_text()
    again = Machine()
    assert again.tune() == first
    assert not again.measured and not again.compiled
    assert gpu.read_text() == text


def test_an_interrupted_run_continues(gpu):
    class Stopped(Machine):
        def measure(self, case, device):
            if case == CASES[1]:
                raise KeyboardInterrupt
            return super().measure(case, device)

    with pytest.raises(KeyboardInterrupt):
        Stopped().tune()
    machine = Machine()
    assert len(machine.tune()) == 2
    assert {case for case, _ in machine.measured} == {CASES[1]}


def test_when_time_runs_out_the_best_so_far_is_kept(gpu, monkeypatch):
    machine, clock = Machine(), iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    (entry,) = machine.tune(deadline=2)
    assert not entry["complete"] and len(machine.measured) == 3
    assert look_up() == entry["config"]
    assert all(x["complete"] for x in Machine().tune())


def test_other_versions_are_measured_again(gpu):
    Machine().tune()
    entries = json.loads(gpu.read_text())
    write(gpu, *({**x, "triton": "3.0.0"} for x in entries))
    machine = Machine()
    machine.tune()
    assert {case for case, _ in machine.measured} == set(CASES)
    assert len(json.loads(gpu.read_text())) == 2


def test_candidates_begin_with_the_default_and_are_distinct():
    for kernel, arch in product(config.KERNELS, config.ARCHITECTURES):
        found = tune.candidates(kernel, arch, 64, BF16)
        assert found[0] == config.default_config(kernel, arch, 64, BF16)
        assert len({str(x) for x in found}) == len(found) > 5
        specialized = any(x["WARP_SPECIALIZE"] for x in found)
        assert specialized == (kernel == "cross_frame_forward" and arch == "sm_90")


STEPS = """
import torch, triton
from mana_triton.kernels import config, reference, tune

tune.CHECK, tune.FRAMES, tune.ENTRIES = (5, 17), 1, 70
runs = []
triton.testing.do_bench = lambda run, **_: [runs.append(run()) or 3.0, 1.0, 2.0]
for kernel, results in (("memory_backward", 2), ("cross_frame_lse", 1), ("cross_frame_dq", 3)):
    case = tune.Case(kernel, 16, torch.float16, 8, 16)
    with config.pinned(kernel, config.launch_options(64, 64, 4, 1)):
        assert not tune.wrong(case, "cpu"), tune.wrong(case, "cpu")
        assert tune.measure(case, "cpu") == (2.0, 1.4, 2.6)
    assert len(runs.pop()) == results
for name, kernel in (("memory_attention", "memory_backward"),
                     ("cross_frame_attention", "cross_frame_forward")):
    whole = getattr(reference, name)
    setattr(reference, name, lambda q, *x, f=whole, **options: f(q * 1.02, *x, **options))
    assert tune.wrong(tune.Case(kernel, 16, torch.float16, 8, 16), "cpu").startswith("wrong by")
"""


def test_operations_are_checked_and_measured():
    """In the interpreter: each operation is right, and one that is off is detected."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# --- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes where there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    message = "error: tuning needs a GPU; --compile-only sm_80,sm_89,sm_90 does not"
    assert stopped.value.code == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "64"), "invalid shapes value: '64'"),
        (("--shapes", "0x5"), "invalid shapes value: '0x5'"),
        (("--kernels", "attention"), "invalid choice: 'attention'"),
        (("--compile-only", "sm_75"), "ARCH must be one of sm_80, sm_89, sm_90, gfx942, gfx90a"),
    ],
    ids=["one-number", "empty-frame", "kernel", "old-gpu"],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels compile only without the interpreter"
)
def test_compile_only_prints_each_result(monkeypatch, capsys):
    few = [config.launch_options(64, 64, 4, 2), config.launch_options(32, 32, 8, 2)]
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    monkeypatch.setattr(tune, "compile_pool", nullcontext)
    monkeypatch.setattr(tune, "compile_all", lambda _, every: map(tune.compile_request, every))
    arguments = ["--compile-only", "sm_80", "--kernels", "memory_forward", "--d", "16"]
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    tune.main()
    *lines, last = capsys.readouterr().out.splitlines()
    sound, double = json.loads(last)["rows"]
    assert sound["kernel"] == "memory_forward" and sound["matrix"] == "mma"
    assert not sound["flaws"] and sound["spills"] == 0
    assert 5 < sound["instructions"][0] < 9 and sound["occupancy"] > 1
    assert "exponentials per score" in double["flaws"][0]
    assert "64x64 w4 s2" in lines[0] and f"{sound['instructions'][0]:.2f}" in lines[0]
