# ruff: noqa: RUF009  (`flag` makes a field)
"""Options of the training programs: a frozen dataclass is the only list of a program's flags."""

import argparse
import types
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from mana_triton.attention import BACKENDS
from mana_triton.training.degradation import DEGRADATIONS

T = TypeVar("T")


def flag(default: Any, help: str, *choices: str) -> Any:
    """A field that is a flag of the command line; `...` for no default."""
    return field(
        default=MISSING if default is ... else default,
        metadata={"help": help, "choices": choices or None},
    )


def parse_options(cls: type[T], prog: str, description: str | None, argv: list[str] | None) -> T:
    """The options of a command line; wrong usage exits with code 2.

    A tuple takes several values, a bool none. A field without a default is required, and a tuple
    without one has no flag before it. A ValueError of the dataclass is wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in fields(cls):  # pyright: ignore[reportArgumentType]
        name, default = f"--{option.name.replace('_', '-')}", option.default
        text, kind = option.metadata["help"], option.type
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        more: dict[str, Any] = {"choices": option.metadata["choices"]}
        if get_origin(kind) is tuple:
            more["nargs"] = "+"
        if isinstance(kind, types.UnionType) or "nargs" in more:
            kind = get_args(kind)[0]
        if default is not MISSING:
            more["default"] = default
            text += f" ({default})" if default not in (None, ()) else ""
        elif "nargs" in more:
            name = option.name
        else:
            more["required"] = True
        parser.add_argument(name, type=kind, help=text, **more)
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{k: tuple(x) if isinstance(x, list) else x for k, x in values.items()})
    except ValueError as error:
        parser.error(str(error))


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, and how; the defaults are the paper's."""

    data: tuple[Path, ...] = flag((), "videos, folders of videos or frames, Vimeo-90K, caches")
    stills: tuple[Path, ...] = flag((), "pictures, which become clips by synthetic motion")
    still_fraction: float = flag(0.3, "share of samples from stills")
    val: tuple[Path, ...] = flag((), "clips for validation, as --data")
    cache: Path | None = flag(None, "folder for decoded clips (cache next to OUT)")
    degradation: str = flag(
        "matlab_bicubic", "x1/4 method; real: blur, noise and lossy codecs", *DEGRADATIONS, "real"
    )
    crop: int = flag(64, "low-resolution pixels of a sample")
    batch: int = flag(16, "samples per iteration, of all processes together")
    accumulate: int = flag(1, "parts of a batch, one after the other")
    workers: int = flag(1, "threads that prepare batches")
    preset: str = flag("tiny", "model", "tiny", "small", "paper", "official")
    init_from: str | None = flag(None, "name or file of the weights to start from")
    stage1: int = flag(90_000, "iterations of stage 1, everything but the memory branch")
    stage2: int = flag(30_000, "iterations of stage 2, the memory alone")
    stage3: int = flag(30_000, "iterations of stage 3, everything")
    lr: float = flag(1e-4, "learning rate of stage 1")
    lr2: float = flag(1e-4, "learning rate of stage 2")
    lr3: float = flag(1e-5, "learning rate of stage 3")
    betas: tuple[float, ...] = flag((0.5, 0.99), "of Adam")
    schedule: str = flag("constant", "of every stage", "constant", "cosine")
    warmup: int = flag(0, "iterations of linear warm-up of every stage")
    ema: float = flag(0.999, "decay of the weights' average, 0 for none")
    clip_grad: float = flag(0.0, "largest norm of the gradient, 0 for any")
    seed: int = flag(0, "of everything random")
    out: Path | None = flag(None, "folder of the run (runs/PRESET)")
    device: str = flag("auto", "where to train", "auto", "cpu", "cuda")
    backend: str = flag("auto", "of the attention", *BACKENDS)
    compile: bool = flag(False, "compile the network first, which takes minutes")
    threads: int = flag(0, "of PyTorch on the CPU, 0 for its own choice")
    precision: str = flag("fp32", "of the iterations", "fp32", "bf16")
    val_every: int = flag(2000, "iterations between validations")
    val_frames: int = flag(10, "frames of each validation clip, evenly spaced")
    save_every: int = flag(500, "iterations between saved states")
    minutes: float = flag(0.0, "train for this time, then validate and save; 0 to the end")

    def __post_init__(self):
        if not self.data and not self.stills:
            raise ValueError("pass --data or --stills")
        for name in ("crop", "batch", "accumulate", "val_every", "val_frames", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.workers < 1 or len(self.betas) != 2:
            raise ValueError("--workers must be at least 1, and --betas two numbers")
        if self.batch % self.accumulate:
            raise ValueError("--batch must be a multiple of --accumulate")
        if min(self.lengths) < 0 or not 0 <= self.ema < 1 or not self.clip_grad >= 0:
            raise ValueError("iterations and --clip-grad must be at least 0, and 0 <= --ema < 1")
        if sum(self.lengths) == 0:
            raise ValueError("at least one of --stage1, --stage2, --stage3 must be above 0")

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Iterations of each stage."""
        return self.stage1, self.stage2, self.stage3

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.out or Path("runs") / self.preset

    def fixed(self) -> dict:
        """What decides the result: a run cannot be continued with other values."""
        free = {
            "data", "stills", "val", "cache", "out", "init_from", "preset", "device", "backend",
            "compile", "threads", "workers", "accumulate", "val_every", "save_every", "minutes",
        }  # fmt: skip
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        return kept | {"betas": list(self.betas)}
