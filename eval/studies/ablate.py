# ruff: noqa: RUF009  (`flag` makes a field)
"""What each part of the network contributes: the same short training with variants of it.

    python eval/studies/ablate.py --data DATA/train --stills DATA/stills --val DATA/val

trains `tiny` and its variants from the same weights on the same samples, one after the other (a
configuration with several names only once), and prints a table of their validation: the sizes of
the memory in the paper's Table 2 (0 to 1024 entries), the form of the Gaussian (bias, gate, none),
dot or cosine matching, offsets on or off. With --init-from, encoder and decoder start from trained
weights and only the attention starts untrained, so short trainings say more about its variants.
The three stages have the paper's shares of the iterations.
`neighbors_db` is the gain of seven real frames over the center frame seven times. The same command
continues a stopped run; finished variants are not repeated. OUT holds ablation.md with the table,
the paths of sigma and the temperature, and the size of this training next to the paper's; the last
line of stdout is the same as JSON.
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from eval.report import MEMORY_SIZES, PAPER
from mana_triton import checkpoint
from mana_triton.checkpoint import CheckpointError
from mana_triton.model import MANA, MANAConfig
from mana_triton.training.clips import DataError
from mana_triton.training.options import TrainingOptions, flag, parse_options
from mana_triton.training.progress import TrainingError
from mana_triton.training.trainer import Trainer

TINY = MANAConfig.preset("tiny")
GROUPS: dict[str, dict[str, MANAConfig]] = {
    "memory": {f"memory-{n}": replace(TINY, memory_slots=n) for n in MEMORY_SIZES},
    "weighting": {
        "bias": TINY,
        "gate": replace(TINY, gaussian="gate"),
        "none": replace(TINY, sigma=math.inf),
    },
    "matching": {
        f"{match}{'-offsets' if offsets else ''}": replace(TINY, match=match, offsets=offsets)
        for match in ("dot", "cosine")
        for offsets in (False, True)
    },
}
# what the variants change; everything else starts with the same weights in all of them
ATTENTION = ("phi", "theta", "g", "w_z", "w_z1", "sigma", "temperature", "memory")
SHAPE = ("channels", "frames", "encoder_blocks", "decoder_blocks")
SHARES = (0.6, 0.2, 0.2)  # the paper's 90k, 30k and 30k iterations
PAPER_SAMPLES = 150_000 * 16 * 64 * 64  # iterations, batch, pixels of a crop
COLUMNS = ("group", "variant", "seed", "parameters", "psnr_db", "gain_db", "neighbors_db", "paper")


@dataclass(frozen=True)
class AblationOptions:
    """Which variants to train, on what, and for how long."""

    val: tuple[Path, ...] = flag((), "as of mana_triton.train")
    data: tuple[Path, ...] = flag((), "as of mana_triton.train")
    stills: tuple[Path, ...] = flag((), "as of mana_triton.train")
    groups: tuple[str, ...] = flag(tuple(GROUPS), "variants to train", *GROUPS)
    init_from: str | None = flag(None, "weights whose encoder and decoder all start from")
    iterations: int = flag(1000, "of each training")
    seeds: tuple[int, ...] = flag((0,), "one training for each")
    crop: int = flag(32, "low-resolution pixels")
    batch: int = flag(8, "samples")
    lr: float = flag(1e-3, "learning rate of stage 1")
    val_frames: int = flag(8, "frames of each validation clip")
    out: Path = flag(Path("runs/ablate"), "folder")
    cache: Path | None = flag(None, "decoded clips (OUT/cache)")
    threads: int = flag(0, "of PyTorch, 0 for its own choice")
    device: str = flag("auto", "where to train", "auto", "cpu", "cuda")

    def __post_init__(self):
        if not self.val:
            raise ValueError("pass --val")
        if self.iterations < 5:
            raise ValueError("--iterations must be at least 5, one for each share")

    def training(self, config: MANAConfig, seed: int, out: Path) -> TrainingOptions:
        """The options of one training."""
        first, second, third = stages(self.iterations, config)
        return TrainingOptions(
            data=self.data, stills=self.stills, val=self.val, out=out, seed=seed,
            cache=self.cache or self.out / "cache", crop=self.crop, batch=self.batch,
            stage1=first, stage2=second, stage3=third,
            lr=self.lr, lr2=10 * self.lr, lr3=self.lr / 2, schedule="cosine", warmup=20,
            clip_grad=1.0, init_from=str(out / "start.safetensors"), threads=self.threads,
            device=self.device, val_every=self.iterations, val_frames=self.val_frames,
            save_every=50,
        )  # fmt: skip


def stages(iterations: int, config: MANAConfig) -> tuple[int, int, int]:
    """Iterations of each stage; without a memory, stage 2 has nothing to train."""
    first, second = (round(share * iterations) for share in SHARES[:2])
    second = second if config.memory_slots else 0
    return first, second, iterations - first - second


def first_weights(config: MANAConfig, seed: int, trained: str | None) -> MANA:
    """A variant before training; with one seed, what it does not change is equal in all variants.

    Args:
        config: of the variant.
        seed: of the random weights.
        trained: weights whose encoder and decoder are copied; None: random ones.
    """
    torch.manual_seed(seed)
    model = MANA(config)
    torch.manual_seed(seed)
    plain = replace(config, memory_slots=0, match="dot", offsets=False, gaussian="bias", sigma=2.0)
    base = checkpoint.load(trained) if trained else MANA(plain)
    if any(getattr(base.config, x) != getattr(config, x) for x in SHAPE):
        raise CheckpointError(
            f"{trained} must have the channels and blocks of tiny; pass other weights"
        )
    shared = {
        name: x for name, x in base.state_dict().items() if name.split(".")[0] not in ATTENTION
    }
    model.load_state_dict(model.state_dict() | shared)
    return model


def run_name(config: MANAConfig) -> str:
    """The first variant with this configuration, which is trained once for all its names."""
    variants = (item for group in GROUPS.values() for item in group.items())
    return next(name for name, other in variants if other == config)


def measure(
    group: str, variant: str, config: MANAConfig, seed: int, options: AblationOptions
) -> dict:
    """Train one variant, or continue, and read the validation from its log."""
    out = options.out / f"{run_name(config)}-{seed}"
    first, start = first_weights(config, seed, options.init_from), out / "start.safetensors"
    if start.exists():
        before = checkpoint.load(start).state_dict()
        if any(not torch.equal(before[name], x) for name, x in first.state_dict().items()):
            raise CheckpointError(
                f"{start} must hold this variant's first weights, it holds others; "
                "choose another --out"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.save(first, start)
    Trainer(options.training(config, seed, out), config).run()
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = next(entry for entry in reversed(entries) if "psnr_db" in entry)
    return {
        "group": group,
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in first.parameters()),
        "psnr_db": last["psnr_db"],
        "gain_db": last["psnr_db"] - last["bicubic_psnr_db"],
        "neighbors_db": last["psnr_db"] - last["center_only_psnr_db"],
        "paper": _published(config) if group == "memory" else "-",
        "paths": {
            name: [(e["iteration"], round(e[name], 4)) for e in entries if name in e]
            for name in ("sigma", "temperature")
            if any(name in e for e in entries)
        },
    }


def _published(config: MANAConfig) -> str:
    """The paper's PSNR on Vimeo-90K for this size of the memory."""
    return f"{PAPER['Table 2'][str(config.memory_slots)]['Vimeo-90K'][0]:.2f}"


def markdown(rows: list[dict], options: AblationOptions) -> str:
    """The table, the paths, and the size of this training."""
    share = options.iterations * options.batch * options.crop**2 / PAPER_SAMPLES
    start = f"those of {options.init_from}" if options.init_from else "equal random ones"
    lines = [
        f"Trained on 1/{1 / share:,.0f} of the paper's pixels ({options.iterations} iterations of "
        f"{options.batch} crops of {options.crop}x{options.crop}; the paper: 150,000 of 16 of "
        "64x64), 0.3 M parameters instead of 14 M: this shows which variant learns faster, not "
        f"where each would end. The first encoder and decoder are {start}. psnr_db is validation "
        "in RGB; paper is its PSNR on Vimeo-90K (Table 2), to compare differences only.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        cells = (f"{x:.3f}" if isinstance(x := row[key], float) else str(x) for key in COLUMNS)
        lines.append(f"| {' | '.join(cells)} |")
    seeds = {row["seed"] for row in rows}
    if len(seeds) > 1:
        by_variant: dict[str, list[float]] = {}
        for row in rows:
            by_variant.setdefault(row["variant"], []).append(row["psnr_db"])
        spread = np.mean([np.std(scores, ddof=1) for scores in by_variant.values()])
        lines += ["", f"Deviation between seeds: {spread:.3f} dB."]
    lines += ["", "Paths (iteration: value):", ""]
    for row in rows:
        for name, path in row["paths"].items():
            steps = path[:: max(1, len(path) // 8)]
            text = ", ".join(f"{iteration}: {value:g}" for iteration, value in steps)
            lines.append(f"- {row['variant']}, seed {row['seed']}, {name}: {text}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    options = parse_options(AblationOptions, "python eval/studies/ablate.py", __doc__, None)
    rows, table = [], options.out / "ablation.md"
    try:
        for group in options.groups:
            for variant, config in GROUPS[group].items():
                rows += [measure(group, variant, config, seed, options) for seed in options.seeds]
                table.write_text(markdown(rows, options))
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table.read_text())
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
