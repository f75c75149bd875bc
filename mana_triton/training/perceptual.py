# ruff: noqa: RUF009  (`flag` makes a field)
r"""Perceptual training: from faithful weights to sharp ones, on realistic degradations.

    python -m mana_triton.training.perceptual --init tiny-real --data DATA/train \
        --stills DATA/stills --lpips-backbone alexnet.safetensors --out runs/real

The loss of outputs s with originals y, and D the discriminator:

    l1 |s - y|  +  perceptual LPIPS(s, y)  +  adversarial softplus(-D(s))  +  temporal |e' - e|

The temporal term compares the errors e and e' of two neighboring outputs along the optical flow.
OUT/ema.safetensors holds the moving average of the weights, OUT/log.jsonl the mean losses. The same
command continues from OUT/last.pt, with the same result as a run that was never interrupted.
"""

import copy
import dataclasses
import json
import math
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mana_triton import checkpoint
from mana_triton.checkpoint import CheckpointError
from mana_triton.metrics import LPIPS, BackboneError, LPIPSUnavailable
from mana_triton.model import MANA
from mana_triton.training.clips import DataError, open_clips
from mana_triton.training.degradation import open_low_clips, training_recipes
from mana_triton.training.losses import (
    PatchDiscriminator,
    shifted_lpips,
    temporal_loss,
)  # fmt: skip
from mana_triton.training.options import flag, parse_options
from mana_triton.training.progress import Log, StopSignal, TrainingError, read_state, write_state
from mana_triton.training.sampler import Pairs, prepared
from mana_triton.training.trainer import choose_device, fingerprint, names

LOG_EVERY, SAVE_EVERY = 50, 250
WARMUP = 50
DECAY = 0.999  # of the weights' average
TERMS = ("l1", "lpips", "adversarial", "temporal", "discriminator")


@dataclass(frozen=True)
class PerceptualOptions:
    """What to train, on what, and the weights of the loss."""

    init: str = flag(..., "name or file of the weights to start from")
    out: Path = flag(..., "folder of the run")
    data: tuple[Path, ...] = flag((), "videos, folders of videos or frames, Vimeo-90K, caches")
    stills: tuple[Path, ...] = flag((), "pictures")
    lpips_backbone: Path | None = flag(None, ".safetensors file of AlexNet's features")
    cache: Path | None = flag(None, "folder for decoded clips (cache next to OUT)")
    variants: int = flag(2, "degraded variants of each clip; a still has one")
    iterations: int = flag(6000, "iterations")
    crop: int = flag(32, "low-resolution pixels of a sample")
    pairs: int = flag(3, "pairs of neighboring windows from clips in a batch")
    singles: int = flag(2, "windows from stills in a batch")
    lr: float = flag(3e-4, "learning rate of the network; it falls along a cosine")
    lr_discriminator: float = flag(4e-4, "learning rate of the discriminator")
    l1: float = flag(1.5, "weight of the distance of pixels")
    perceptual: float = flag(0.2, "weight of LPIPS")
    adversarial: float = flag(0.01, "weight of the discriminator's verdict")
    temporal: float = flag(1.0, "weight of the flicker")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "where to train", "auto", "cpu", "cuda")
    threads: int = flag(0, "of PyTorch on the CPU, 0 for its own choice")
    precision: str = flag("fp32", "of the iterations", "fp32", "bf16")

    def __post_init__(self):
        if not self.data or not self.stills:
            raise ValueError("pass both --data and --stills")
        if min(self.iterations, self.crop, self.pairs, self.singles, self.variants) < 1:
            raise ValueError("iterations, crop, pairs, singles and variants must be at least 1")

    def fixed(self) -> dict:
        """What decides the result: a run cannot be continued with other values."""
        free = {"init", "data", "stills", "lpips_backbone", "out", "cache", "device", "threads"}
        return {k: x for k, x in dataclasses.asdict(self).items() if k not in free}


def neighbors(model: MANA, frames: Tensor) -> Tensor:
    """Two neighboring outputs: frames [B, T + 1, 3, H, W] -> [B, 2, 3, 4H, 4W]."""
    b, T = len(frames), model.config.frames
    encoded = model.encode(rearrange(frames, "b t c h w -> (b t) c h w"))
    f, k, v, scale, shift = (rearrange(x, "(b t) ... -> b t ...", b=b) for x in encoded)
    c = T // 2
    center = [rearrange(x[:, c : c + 2], "b n ... -> (b n) ...") for x in (f, scale, shift)]
    k, v = (torch.stack([x[:, :T], x[:, 1 : T + 1]], 1).flatten(0, 1) for x in (k, v))
    z = model.fuse(center[0], model.queries(*center), k, v)
    s = model.decode(z) + model.skip(frames[:, c : c + 2].flatten(0, 1))
    return rearrange(s, "(b n) c h w -> b n c h w", n=2)


class PerceptualTrainer:
    """The state of a run, and the loop; errors as of `Trainer`."""

    def __init__(self, options: PerceptualOptions):
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.options, self.out = options, options.out
        self.device = choose_device(options.device)
        cache = options.cache or options.out.parent / "cache"
        clips = open_clips(options.data, cache / "clips")
        stills = open_clips(options.stills, cache / "stills", kind="still")
        several = partial(training_recipes, variants=options.variants)
        low = open_low_clips(clips, cache / "real", several)
        low |= open_low_clips(stills, cache / "real", partial(training_recipes, variants=1))
        sizes = {"crop": options.crop, "pairs": options.pairs, "singles": options.singles}
        self.pairs = Pairs(clips, stills, low, **sizes, seed=options.seed)
        model = checkpoint.load(options.init).train()
        model.sigma.requires_grad_(False)
        self.settings = options.fixed() | {"init": fingerprint(model)}
        self.settings |= {"data": names(clips, low), "stills": names(stills, low)}
        layout = {"device": self.device, "memory_format": torch.channels_last}
        self.model: MANA = model.to(**layout)
        self.discriminator: nn.Module = PatchDiscriminator().to(**layout)
        lpips = LPIPS(options.lpips_backbone).net.eval().requires_grad_(False)
        self.lpips = lpips.to(self.device)
        self.ema = copy.deepcopy(self.model)
        self.learned: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.averaged: list[Tensor] = [p for p in self.ema.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.learned, betas=(0.9, 0.99))
        self.critic_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=options.lr_discriminator, betas=(0.5, 0.99)
        )
        self.parts = {
            "model": self.model, "ema": self.ema, "discriminator": self.discriminator,
            "optimizer": self.optimizer, "critic_optimizer": self.critic_optimizer,
        }  # fmt: skip
        self.iteration = 0
        self.sums: list[list[float]] = []  # since the last log entry
        self._resume()

    def run(self) -> dict:
        """Train to the end; returns what `main` prints."""
        self.out.mkdir(parents=True, exist_ok=True)
        log, began = Log(self.out, self.iteration), time.monotonic()
        end = self.options.iterations
        with (
            closing(log),
            StopSignal() as stop,
            closing(prepared(self.pairs.load, self.iteration, end, 1)) as batches,
        ):
            for batch in batches:
                self._step(*(x.to(self.device) for x in batch))
                if self.iteration % LOG_EVERY == 0:
                    means = np.mean(self.sums, 0).round(5).tolist()
                    log.add(self.iteration, **dict(zip(TERMS, means, strict=True)))
                    pace = len(self.sums) / (time.monotonic() - began)
                    print(f"iteration {self.iteration}/{end}  {pace:.2f} it/s", file=sys.stderr)
                    self.sums, began = [], time.monotonic()
                if stop.received or self.iteration % SAVE_EVERY == 0 or self.iteration == end:
                    self._save()
                if stop.received:
                    raise TrainingError(
                        f"stopped at iteration {self.iteration} of {end}, saved in "
                        f"{self.out / 'last.pt'}; run the same command to continue"
                    )
        return {"iterations": self.iteration, "weights": str(self.out / "ema.safetensors")}

    def _step(
        self, x: Tensor, y: Tensor, flow: Tensor, mask: Tensor, xs: Tensor, ys: Tensor
    ) -> None:
        """One iteration of both networks; arguments as of `Pairs.load`."""
        options, D = self.options, self.discriminator
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * self._rate()
        torch.manual_seed(options.seed * 1_000_003 + self.iteration)
        autocast = torch.autocast(self.device.type, torch.bfloat16, options.precision == "bf16")
        with autocast:
            pairs, singles = neighbors(self.model, x), self.model(xs)
        pairs, singles = pairs.float(), singles.float()
        s, t = torch.cat([pairs.flatten(0, 1), singles]), torch.cat([y.flatten(0, 1), ys[:, 0]])
        with autocast:
            perceptual = shifted_lpips(self.lpips, s, t)
            D.requires_grad_(False)
            adversarial = F.softplus(-D(s)).mean()
        temporal, l1 = temporal_loss(pairs, y, flow, mask), F.l1_loss(s, t)
        loss = options.l1 * l1 + options.perceptual * perceptual
        loss = loss + options.adversarial * adversarial + options.temporal * temporal
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        D.requires_grad_(True)
        with autocast:
            critic = F.softplus(-D(t)).mean() + F.softplus(D(s.detach())).mean()
        terms = [x.item() for x in (l1, perceptual, adversarial, temporal, critic)]
        if not np.isfinite(terms).all():
            raise TrainingError(
                f"a loss is not finite at iteration {self.iteration + 1}; use another --out with "
                f"a lower --lr ({self.out / 'last.pt'} has the last good state)"
            )
        self.optimizer.step()
        self.critic_optimizer.zero_grad()
        critic.backward()
        self.critic_optimizer.step()
        self.iteration += 1
        decay = min(DECAY, (1 + self.iteration) / (10 + self.iteration))
        get_ema_multi_avg_fn(decay)(self.averaged, self.learned, None)
        self.sums.append(terms)

    def _rate(self) -> float:
        """The learning rate's factor: linear warm-up, and a cosine down to 0.02."""
        cosine = (1 + math.cos(math.pi * self.iteration / self.options.iterations)) / 2
        return min(1, (self.iteration + 1) / WARMUP) * (0.02 + 0.98 * cosine)

    def _save(self) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        kept = {"iteration": self.iteration, "sums": self.sums, "settings": self.settings}
        checkpoint.save(self.ema, self.out / "ema.safetensors")
        write_state(self.out / "last.pt", kept | parts)

    def _resume(self) -> None:
        state = read_state(self.out / "last.pt", self.settings)
        if state:
            self.iteration, self.sums = state["iteration"], state["sums"]
            for name, part in self.parts.items():
                part.load_state_dict(state[name])


def main() -> None:
    """Command line."""
    program = "python -m mana_triton.training.perceptual"
    options = parse_options(PerceptualOptions, program, __doc__, None)
    try:
        summary = PerceptualTrainer(options).run()
    except (
        DataError, TrainingError, CheckpointError, LPIPSUnavailable, BackboneError, OSError
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to continue from the last saved state")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
