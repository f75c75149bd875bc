"""The benchmark of run.py --bench: what it times is right, and what it prints is what it timed."""

import json
import math
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from oracle import assert_as_accurate
from torch.nn.attention.flex_attention import flex_attention

from eval import accuracy, bench, compare, run
from eval import baselines as peers
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.kernels import reference
from mana_triton.model import MANA, MANAConfig

CPU = torch.device("cpu")
SETTING = compare.Setting(CPU, "fp32", compare.Ceiling(1e7, 1e6))
SIZE = (12, 18)
PEERS = {"eager": bench.eager, "masked": peers.masked_sdpa, "augmented": peers.augmented_sdpa}

pytestmark = pytest.mark.usefixtures("one_thread")


def attention_inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, t, *SIZE, 16, generator=generator) for t in (1, 7, 7))
    return [x.to(dtype) for x in (q[:, 0], k, v, torch.tensor(3.0), torch.tensor(0.25))]


@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_bias_form(peer):
    inputs = attention_inputs()
    exact = reference.cross_frame_attention(*(x.double() for x in inputs)).o
    eager = reference.cross_frame_attention(*inputs).o
    assert_as_accurate(peer, PEERS[peer](*inputs), eager, exact, torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_bias_form(monkeypatch):
    monkeypatch.setattr(compare, "_compiled_flex", lambda: flex_attention)
    inputs = attention_inputs()
    exact = reference.cross_frame_attention(*(x.double() for x in inputs)).o
    eager = reference.cross_frame_attention(*inputs).o
    assert_as_accurate("flex", compare._flex(*inputs), eager, exact, torch.float32)


def test_naive_computes_the_official_gate_form():
    inputs = attention_inputs()
    inputs[-1] = torch.tensor(1.0)
    exact = reference.cross_frame_attention(*(x.double() for x in inputs), gaussian="gate").o
    eager = reference.cross_frame_attention(*inputs, gaussian="gate").o
    assert_as_accurate("naive", compare._official(*inputs[:4]), eager, exact, torch.float32)


def test_naive_network_is_the_official_network():
    config = MANAConfig.preset("tiny")
    window = torch.rand(1, 7, 3, *SIZE)
    model = compare.naive_network(config, CPU, torch.float32)
    assert (model.config.gaussian, model.config.logit_scale) == ("gate", 1.0)
    torch.nn.init.normal_(model.w_z.weight, std=0.3)
    with torch.inference_mode():
        actual = compare.naive_frame(model, window)
        eager = model(window)  # by the reference backend
        exact = model.double()(window.double())
    assert_as_accurate("frame", actual, eager, exact, torch.float32)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = compare.cross_frame_attention
    monkeypatch.setattr(compare, "cross_frame_attention", lambda *a, **k: 1.001 * right(*a, **k))
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(
        compare.BenchError, match=r"ours, tiled must be within .* nothing was timed"
    ):
        compare.compare_attention(SIZE, "tiled", SETTING, 0.0)


def test_floor_of_ours_is_that_of_the_pairs_it_visits(monkeypatch):
    measured: list[compare.Measured] = []
    measure = compare.measure
    monkeypatch.setattr(
        compare, "measure", lambda *args: measured.append(measure(*args)) or measured[-1]
    )
    size = 48, 64
    setting = SETTING._replace(ceiling=compare.Ceiling(1e3, 1e12))  # arithmetic only
    rows = {row["what"]: row for row in compare.compare_attention(size, "tiled", setting, 0.0)}
    every = 2 * 2 * 64 * 7 * math.prod(size) ** 2 / 1e3  # multiply and add, q k^T and p v
    ours, dense = rows["ours, tiled"], rows["dense eager"]
    visited = float(str(ours["note"]).split()[1]) / 100
    assert 0.01 < visited < 0.9
    for row, share, slack in ((dense, 1.0, 1e-9), (ours, visited, 0.06)):  # 2 digits in the note
        assert row["percent_of_floor"] == pytest.approx(100 * share * every / row["ms"], rel=slack)
    bound = rows[compare.BOUND]
    assert "another result" in bound["note"] and bound["relative_error"] is None


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_floor_counts_the_work_of_the_network(preset):
    config = MANAConfig.preset(preset)
    model = MANA(config).eval()
    flops = compare.floor_ms(config, SIZE, compare.Ceiling(1.0, math.inf), 4, visited=0.5)
    counted = {"encode": 0, "decode": 0}
    part = ""

    def count(layer, _, out: torch.Tensor) -> None:
        counted[part] += 2 * layer.weight.numel() * out[0, 0].numel()

    for layer in (x for x in model.modules() if isinstance(x, torch.nn.Conv2d)):
        layer.register_forward_hook(count)
    with torch.inference_mode():
        part = "encode"
        model.encode(torch.rand(1, 3, *SIZE))
        part = "decode"
        model.decode(torch.rand(1, config.channels, *SIZE))
    # keys and values are one product
    projections = model.theta.weight.numel() + model.g.weight.numel()
    assert flops["encoder"] == counted["encode"] + 2 * projections * math.prod(SIZE)
    assert flops["decoder"] + flops["upsampler"] == counted["decode"]
    # q k^T and p v, multiply and add, of half of the pairs
    pairs = 7 * math.prod(SIZE) ** 2 / 2
    assert flops["cross-frame attention"] == 2 * 2 * (config.channels // 2) * pairs


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    ceiling = compare.Ceiling(flop_per_ms=10.0, bytes_per_ms=2.0)
    assert ceiling.ms(100.0, 10.0) == 10.0
    assert ceiling.ms(100.0, 40.0) == 20.0


def test_variants_take_turns():
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    measured = compare.measure(variants, CPU, seconds=600.0)
    rounds = len(measured.ms["a"])
    # one round warms up; then each follows the other as often as it precedes it
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * (rounds // 2)
    assert len(measured.ms["b"]) == rounds == 30


def test_memory_is_that_of_the_run():
    mib = 64
    if (peak := compare._extra_peak(lambda: torch.ones(mib << 18), CPU)) is None:
        pytest.skip("this system does not say")
    # pages that were there and are used again do not count
    assert 0.8 * mib <= peak <= 1.2 * mib


def test_ratios_are_those_of_single_rounds():
    ms = {"slow": [100.0, 1000.0, 300.0], "fast": [50.0, 100.0, 150.0]}
    ms["fast, again"] = [40.0, 100.0, 120.0]
    measured = compare.Measured(ms, dict.fromkeys(ms, 1.0))
    slow, fast, again = compare.measured_rows(measured, "slow", {"fast": 25.0})
    assert again["noise_percent"] == pytest.approx(25.0)
    assert (slow["times_faster"], fast["times_faster"]) == (1.0, 2.0)
    assert fast["percent_of_floor"] == 25.0
    assert (fast["ms"], fast["runs"]) == (100.0, 3)


def test_stages_add_up(monkeypatch):
    whole: list[float] = []
    measure = compare.measure

    def keep(*args):
        measured = measure(*args)
        whole.extend(measured.ms["frame"])
        return measured

    monkeypatch.setattr(compare, "measure", keep)
    rows, visited = compare.compare_stages("tiny", SIZE, SETTING, seconds=0.0)
    assert [row["what"] for row in rows] == [*compare.STAGES, "rest"]
    assert visited == 1.0  # frames this small are dense
    assert all(row["ms"] > 0 for row in rows)
    # the frame's own clock runs a little longer than the sum of its stages
    assert 0.5 * whole[0] <= sum(row["ms"] for row in rows) <= whole[0]


def test_naive_is_left_out_where_its_tables_do_not_fit(monkeypatch):
    monkeypatch.setattr(compare, "_free_bytes", lambda _: 1 << 10)
    rows = compare.compare_frame("tiny", SIZE, SETTING, 1.0, seconds=0.0)
    assert {row["what"]: row["ms"] for row in rows}["naive"] is None
    assert "not run: its tables take" in str(rows[-1]["note"])
    assert all("times_faster" not in row for row in rows)


def test_several_frames_at_once_are_counted():
    clip = np.zeros((4, 8, 10, 3), np.uint8)
    for upscaler, name, together in (
        (Upscaler("tiny", EngineOptions(batch=3)), "ours, 3 in a batch", 3),
        (Upscaler("tiny", EngineOptions(workers=2)), "ours, 2 side by side", 4),
    ):
        several, count = compare._several(upscaler, clip)
        assert (list(several), count) == ([name], together)
        with torch.inference_mode():
            for _ in range(2):
                assert len(several[name]()) == together
    assert compare._several(Upscaler("tiny", EngineOptions(workers=1)), clip) == ({}, 1)


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "SIZE", SIZE)
    monkeypatch.setattr(compare, "SMALL_SIZES", ((8, 10), SIZE))
    monkeypatch.setattr(compare, "SECONDS", dict.fromkeys(compare.SECONDS, 0.0))
    paths = accuracy.paths
    monkeypatch.setattr(accuracy, "paths", lambda *of: {"bf16": paths(*of)["bf16"]})
    plot, copy = tmp_path / "plot.svg", tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--bench", "--plot", str(plot), "--json", str(copy)]
    )
    run.main()
    text = capsys.readouterr().out
    line = text.splitlines()[-1]
    assert copy.read_text() == f"{line}\n"
    result = json.loads(line)
    rows = result["rows"]
    assert {"device", "precision", "commit", "versions", "paper_ms"} <= set(result)
    assert [(row["what"], row["gate"]) for row in result["accuracy"]] == [("bf16", "met")]
    published = [row for row in rows if row["what"] == "paper, 2080 Ti, published"]
    assert [(row["ms"], row["dtype"]) for row in published] == [(59.0, None)]
    assert published[0]["note"] == "code path, type unpublished"
    ceilings = [row for row in rows if row["part"] == "ceiling"]
    assert rows[:2] == ceilings
    assert ceilings[0]["gflop_per_s"] > 0 and ceilings[1]["gb_per_s"] > 0
    weights = {(r["preset"], r["weights"]) for r in rows if "weights" in r}
    assert weights == {("tiny", "shipped"), ("paper", "random")}
    for words in (
        "shipped weights, frames of the demo clip, tolerance of ours 0.03, fp32",
        "random weights, frames of the demo clip",
        "latency: one frame at a time", "nearest-neighbor enlargement",
        "code path, type unpublished",
    ):  # fmt: skip
        assert words in text
    frames = {(r["preset"], r["width"], r["what"]) for r in rows if r["part"] == "frame"}
    for preset, width in (("paper", 72), ("tiny", 40), ("tiny", 72)):
        for what in ("naive, fp32", "ours, dense, 7 encodes", "ours, streamed"):
            assert (preset, width, what) in frames
    stages = {row["what"] for row in rows if row["part"] == "stage"}
    assert stages == {*compare.STAGES, "rest", "video in", "video out"}
    for row in rows:
        assert (row["ms"] is None) == ("not run" in str(row.get("note")))
    # a line for each preset and variant, beside the markers
    drawn = {x.get("id", "") for x in ElementTree.parse(plot).iter()}
    lines = {(row["preset"], row["what"]) for row in rows if row["part"] == "frame" and row["ms"]}
    lines = {(preset, what) for preset, what in lines if not what.endswith("again")}
    assert "legend_1" in drawn
    assert len(lines) == sum(name.startswith("series-") for name in drawn)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--bench", "--data", "a=b"], "--bench takes no --data"),
        (["--method", "bicubic"], "--data, --method (or --bench)"),
        (["--full", "--data", "a=b", "--method", "bicubic"], "--full belongs to --bench"),
        (["--bench", "--plot", "plot.jpg"], "--plot must end in .svg or .png, got plot.jpg"),
    ],
)
def test_wrong_usage(argv, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse_args(argv)
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_readme_shows_the_kept_measurement():
    kept = json.loads((run.ROOT / "eval" / "results" / "bench-cpu.json").read_text())
    readme = (run.ROOT / "README.md").read_text()

    def number(x: float) -> str:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    for row in kept["rows"]:
        if row.get("ms") is None or row["what"].endswith("again") or "published" in row["what"]:
            continue
        if row["part"] == "frame":
            name = f"{row['preset']}, {row['width']}x{row['height']} | {row['what']}"
            spread = f"({number(row['p20'])} to {number(row['p80'])})"
            assert f"| {name} | {number(row['ms'])} {spread} |" in readme
        if row["part"] == "attention":
            assert f"| {row['what']} | {number(row['ms'])} |" in readme
        if row["part"] == "stage":
            line = next(x for x in readme.splitlines() if x.startswith(f"| {row['what']} |"))
            assert f"| {number(row['ms'])} |" in line
