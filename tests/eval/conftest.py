"""Fixtures of the tests of the evaluation."""

import math
from pathlib import Path

import pytest
import torch
from clips import ALEXNET
from safetensors.torch import save_file
from torch import nn

from mana_triton import checkpoint
from mana_triton.model import MANA, MANAConfig


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """Features of an AlexNet with random weights, so nothing is downloaded."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (out, inputs, side) in ALEXNET.items():
        weight = torch.randn(out, inputs, side, side, generator=generator)
        state[f"features.{index}.weight"] = weight / math.sqrt(inputs * side**2 / 2)
        state[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
    file = tmp_path_factory.mktemp("alexnet") / "features.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A small random network in which neighbors matter."""
    torch.manual_seed(0)
    model = MANA(MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=128))
    nn.init.normal_(model.w_z.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save(model, path)
    return path
