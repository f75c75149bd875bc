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

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from eval.report import MEMORY_SIZES, PAPER
from mana_triton import checkpoint, train
from mana_triton.checkpoint import CheckpointError
from mana_triton.model import MANA, MANAConfig
from mana_triton.training.clips import DataError
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


def flags(args: argparse.Namespace, config: MANAConfig, seed: int, out: Path) -> list[str]:
    """The flags of one training that differ from the defaults of `train`."""
    paths = {"--data": args.data, "--stills": args.stills, "--val": args.val}
    given = [str(x) for flag, value in paths.items() if value for x in (flag, *value)]
    numbers = {f"--stage{n}": k for n, k in enumerate(stages(args.iterations, config), 1)}
    numbers |= {"--lr": args.lr, "--lr2": 10 * args.lr, "--lr3": args.lr / 2}
    numbers |= {"--crop": args.crop, "--batch": args.batch, "--seed": seed, "--out": out}
    numbers |= {"--cache": args.cache, "--threads": args.threads, "--device": args.device}
    numbers |= {"--val-frames": args.val_frames, "--val-every": args.iterations, "--clip-grad": 1}
    numbers |= {"--warmup": 20, "--schedule": "cosine", "--save-every": 50}
    numbers |= {"--init-from": out / "start.safetensors"}
    return given + [str(x) for item in numbers.items() for x in item]


def run_name(config: MANAConfig) -> str:
    """The first variant with this configuration, which is trained once for all its names."""
    variants = (item for group in GROUPS.values() for item in group.items())
    return next(name for name, other in variants if other == config)


def measure(
    group: str, variant: str, config: MANAConfig, seed: int, args: argparse.Namespace
) -> dict:
    """Train one variant, or continue, and read the validation from its log."""
    out = args.out / f"{run_name(config)}-{seed}"
    first, start = first_weights(config, seed, args.init_from), out / "start.safetensors"
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
    Trainer(train.options_of(flags(args, config, seed, out)), config).run()
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


def markdown(rows: list[dict], args: argparse.Namespace) -> str:
    """The table, the paths, and the size of this training."""
    share = args.iterations * args.batch * args.crop**2 / PAPER_SAMPLES
    start = f"those of {args.init_from}" if args.init_from else "equal random ones"
    lines = [
        f"Trained on 1/{1 / share:,.0f} of the paper's pixels ({args.iterations} iterations of "
        f"{args.batch} crops of {args.crop}x{args.crop}; the paper: 150,000 of 16 of 64x64) with a "
        "network of 0.3 M parameters instead of 14 M: this shows which variant learns faster, not "
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    paths = {"type": Path, "nargs": "+", "default": [], "metavar": "PATH"}
    add("--data", help="as of mana_triton.train", **paths)
    add("--stills", help="as of mana_triton.train", **paths)
    add("--val", help="as of mana_triton.train; required", **{**paths, "required": True})
    add("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="all")
    add("--init-from", metavar="NAME|FILE", help="weights whose encoder and decoder all start from")
    add("--iterations", type=int, default=1000, help="of each training (1000)")
    add("--seeds", type=int, nargs="+", default=[0], help="one training for each (0)")
    add("--crop", type=int, default=32, help="low-resolution pixels (32)")
    add("--batch", type=int, default=8, help="samples (8)")
    add("--lr", type=float, default=1e-3, help="learning rate of stage 1 (1e-3)")
    add("--val-frames", type=int, default=8, help="frames of each clip (8)")
    add("--out", type=Path, default=Path("runs/ablate"), help="folder (runs/ablate)")
    add("--cache", type=Path, help="decoded clips (OUT/cache)")
    add("--threads", type=int, default=0, help="of PyTorch, 0 for its own choice")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train (auto)")
    args = parser.parse_args(argv)
    if args.iterations < 5:
        parser.error("--iterations must be at least 5, one for each share")
    args.cache = args.cache or args.out / "cache"
    return args


def main() -> None:
    """Command line."""
    args = parse_args()
    rows = []
    try:
        for group in args.groups:
            for variant, config in GROUPS[group].items():
                rows += [measure(group, variant, config, seed, args) for seed in args.seeds]
                (args.out / "ablation.md").write_text(markdown(rows, args))
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
    print((args.out / "ablation.md").read_text())
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
