"""Growth: the larger network computes the same, can learn more, and is larger in every respect."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import random_network
from oracle import assert_as_accurate
from torch import Tensor

from mana_triton.model import MANA, MANAConfig
from mana_triton.training.growth import GrowthError, grow

SMALL = MANAConfig(
    channels=8, encoder_blocks=1, decoder_blocks=2, memory_slots=6, match="cosine", offsets=True
)
TWICE = {"channels": 16, "encoder_blocks": 2, "decoder_blocks": 3, "memory_slots": 12, "sigma": 2.0}
GROWTHS = {
    "twice": (SMALL, TWICE),
    "three-times": (SMALL, TWICE | {"channels": 24, "memory_slots": 18}),
    "wider": (SMALL, {"channels": 16}),
    "deeper": (SMALL, {"encoder_blocks": 3, "decoder_blocks": 4}),
    "more-memory": (SMALL, {"memory_slots": 18}),
    "first-memory": (replace(SMALL, memory_slots=0), TWICE),
    "no-memory": (replace(SMALL, memory_slots=0), TWICE | {"memory_slots": 0}),
    "dot": (replace(SMALL, match="dot"), TWICE),
    "official": (replace(SMALL, match="dot", gaussian="gate", logit_scale=1.0), TWICE),
    "no-offsets": (replace(SMALL, offsets=False), TWICE),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def clip() -> Tensor:
    return torch.rand(1, 7, 3, 6, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("small", "larger"), GROWTHS.values(), ids=GROWTHS)
def test_a_grown_network_computes_the_same(small, larger):
    model = random_network(small)
    grown = grow(model, replace(small, **larger), part=0.0)
    assert grown.config == replace(small, **larger)
    with torch.no_grad():
        actual, eager = grown(clip()), model(clip())
        exact = model.double()(clip().double())
    assert_as_accurate("frames", actual, eager, exact, torch.float32)
    assert torch.equal(grown.sigma, model.sigma.float())  # and not where the preset's starts


def test_noise_in_the_memory_changes_little():
    model = random_network(SMALL)
    with torch.no_grad():
        change = grow(model, replace(SMALL, **TWICE))(clip()) - model(clip())
    assert 0 < change.abs().max() < 0.01


def test_twins_learn_different_things():
    """Equal channels with equal gradients would stay one channel for ever."""
    grown = grow(random_network(SMALL), replace(SMALL, **TWICE)).train()
    twins = ("conv_first", "encoder.0.conv1", "decoder.1.conv2", "g", "upconv1", "upconv2")
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.l1_loss(grown(clip()), torch.zeros(1, 3, 24, 36)).backward()
        optimizer.step()
    for name in twins:
        bias = grown.get_parameter(f"{name}.bias")
        one, other = bias.detach().chunk(2)
        assert (one != other).all(), name
    one, other = grown.memory.detach().chunk(2, dim=1)
    assert (one != other).all()
    # the new blocks, which begin as the identity, have begun to do something
    assert grown.get_parameter("decoder.2.conv2.weight").any()


@pytest.mark.parametrize(
    ("larger", "message"),
    [
        ({"channels": 12}, "channels must be a multiple of 8 to grow, got 12"),
        ({"channels": 4}, "channels must be a multiple of 8 to grow, got 4"),
        ({"memory_slots": 0}, "memory_slots must be a multiple of 6 to grow, got 0"),
        ({"decoder_blocks": 1}, "decoder_blocks must be at least 2 to grow, got 1"),
        ({"offsets": False}, "apart from its size the network must stay .*offsets=True.*, got"),
        ({"sigma": float("inf")}, "apart from its size the network must stay .*sigma=4.0.*, got"),
    ],
)
def test_what_is_not_larger_is_refused(larger, message):
    with pytest.raises(GrowthError, match=message):
        grow(MANA(SMALL), replace(SMALL, **larger))
