"""What a training run shows and measures: the panel, the pictures, the attentions' statistics."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from mana_triton.model import MANA, MANAConfig
from mana_triton.training.progress import Display, Log, sparkline
from mana_triton.training.validation import attention_statistics

CONFIG = MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8)


def test_a_terminal_shows_a_panel():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    with Display(0, 1000, console) as display:
        display.update(500, 1, 0.02, {"step_per_second": 0.25, "loader_per_second": 8.0})
        display.measured({"sigma": 2.5, "temperature": None, "memory_dead": 3.0})
        display.validated(
            500, {"psnr_db": 27.5, "center_only_psnr_db": 27.0, "bicubic_psnr_db": 25.0}
        )
        display.advance(501)
    text = written.getvalue()
    for shown in ("iteration 501 of 1000", "0.02000", "0.25, the loader 8.00", "0:33:20", "2.5"):
        assert shown in text
    assert "memory dead" in text and "temperature" not in text and "27.500 dB" in text


def test_elsewhere_plain_lines_are_written():
    written = io.StringIO()
    with Display(0, 1000, Console(file=written, width=200)) as display:
        display.update(500, 1, 0.02, {"step_per_second": 0.25, "loader_per_second": 8.0})
        display.measured({"sigma": 2.5})
    assert written.getvalue() == (
        "iteration 500/1000  stage 1  loss 0.02000  it/s 0.25, the loader 8.00  ETA 0:33:20\n"
    )


def test_a_curve_follows_its_values():
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 3.5, 7.0, 1.0]) == "▁▅█▂"


def test_the_log_takes_what_cannot_be_known_and_pictures(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path, 0)
    log.add(3, loss=0.5, gradient_noise=None)
    log.picture(3, "view", np.full((4, 6, 3), 200, np.uint8))
    log.close()
    assert json.loads(log.path.read_text()) == {"iteration": 3, "loss": 0.5, "gradient_noise": None}
    events = loader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    [image] = events.Images("view")
    assert (image.step, image.height, image.width) == (3, 4, 6)


# ---- the attentions


def test_a_uniform_memory_attention_has_full_entropy():
    torch.manual_seed(0)
    model = MANA(CONFIG)
    with torch.no_grad():
        model.memory.zero_()
    statistics = attention_statistics(model, torch.rand(1, 7, 3, 8, 8))
    assert statistics["memory_entropy"] == pytest.approx(1)
    assert statistics["memory_dead"] == 0
    assert statistics["sigma"] == 4 and "temperature" not in statistics


def test_entries_that_no_pixel_attends_to_are_dead():
    """Two entries lie along all queries, the other six far on the other side."""
    torch.manual_seed(0)
    model = MANA(CONFIG)
    with torch.no_grad():
        model.phi.weight.zero_()
        torch.nn.init.ones_(model.phi.bias)  # pyright: ignore[reportArgumentType]
        model.memory.fill_(-10)
        model.memory[:, :2] = 10
    statistics = attention_statistics(model, torch.rand(2, 7, 3, 8, 8))
    assert statistics["memory_dead"] == 6
    assert statistics["memory_entropy"] == pytest.approx(np.log(2) / np.log(8), abs=1e-6)


def test_a_narrow_gaussian_visits_fewer_pairs():
    torch.manual_seed(0)
    model = MANA(CONFIG)
    lr = torch.rand(1, 7, 3, 48, 48)
    visited = []
    for sigma in (0.5, 50.0):
        with torch.no_grad():
            model.sigma.fill_(sigma)
        visited.append(attention_statistics(model, lr)["visited"])
    assert 0 < visited[0] < 0.5 < visited[1] <= 1


def test_without_a_memory_there_are_no_statistics_of_it():
    torch.manual_seed(0)
    config = MANAConfig(
        channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=0, match="cosine"
    )
    statistics = attention_statistics(MANA(config), torch.rand(1, 7, 3, 8, 8))
    assert statistics.keys() == {"sigma", "temperature", "visited"}
    assert statistics["temperature"] == 12
