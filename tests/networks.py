"""Networks for tests that ask for no quality, only that nothing in them is lost."""

import torch

from mana_triton.model import MANA, MANAConfig


def random_network(config: MANAConfig) -> MANA:
    """A network without a zero in it, in which no two parameters are alike."""
    torch.manual_seed(0)
    model = MANA(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x), alpha=0.05)
    return model
