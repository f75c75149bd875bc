"""Train MANA on videos, folders of frames, Vimeo-90K or still pictures.

Three stages, as in the paper: everything but the memory branch (L1), the memory branch alone
(distance of its output to the queries), everything (L1). The weights' moving average is rounded
to float16, validated, and exported to OUT/best.safetensors. The same command continues from
OUT/last.pt and OUT/optimizer-N.pt, with the same result as a run that was never interrupted.
OUT/log.jsonl holds what was measured.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mana_triton import checkpoint
from mana_triton.attention import BACKENDS, choose_backend
from mana_triton.checkpoint import CheckpointError
from mana_triton.data import (
    DEGRADATIONS,
    SCALE,
    WINDOW,
    Clip,
    DataError,
    Sampler,
    degrade,
    open_clips,
    upscale_bicubic,
)
from mana_triton.metrics import psnr
from mana_triton.model import MANA, MANAConfig

LOG_EVERY = 100
PSNR_CAP = 100.0  # dB, for frames that are reproduced exactly

# flags that change the result; a run cannot be continued with another value
FIXED_FLAGS = (
    "crop", "batch", "stage1", "stage2", "stage3", "lr", "lr2", "lr3", "betas", "schedule",
    "warmup", "ema", "clip_grad", "still_fraction", "degradation", "seed", "precision",
    "val_frames", "init_from",
)  # fmt: skip


class TrainingError(ValueError):
    """Training cannot start or go on; the message says what to do about it."""


# ---- validation


class Validation:
    """Whole frames of some clips, enlarged and compared with the originals.

    Args:
        clips: any clips; their frames are cropped to multiples of 4.
        frames: how many frames of each clip, evenly spaced.
        degradation: see `data.degrade`.
    """

    def __init__(self, clips: list[Clip], frames: int, degradation: str):
        self.clips, self.frames, self.degradation = clips, frames, degradation
        self.bicubic_psnr = self._mean_psnr(
            lambda lr: upscale_bicubic(_to_uint8(lr[0, WINDOW // 2]))
        )

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean PSNR in dB of the model, and of the model fed the center frame seven times."""

        @torch.no_grad()
        def enlarge(lr: Tensor) -> Tensor:
            return _to_uint8(model(lr.to(device))[0].cpu())

        def enlarge_alone(lr: Tensor) -> Tensor:
            return enlarge(repeat(lr[:, WINDOW // 2], "b c h w -> b t c h w", t=WINDOW))

        return {
            "psnr_db": self._mean_psnr(enlarge),
            "center_only_psnr_db": self._mean_psnr(enlarge_alone),
            "bicubic_psnr_db": self.bicubic_psnr,
        }

    def seconds(self, model: nn.Module, device: torch.device) -> float:
        """About how long `measure` takes, from one window of the first clip."""
        began = time.monotonic()
        lr, _ = next(self._windows(self.clips[0]))
        with torch.no_grad():
            _to_uint8(model(lr.to(device))[0].cpu())
        pixels = sum(min(self.frames, c.shape[0]) * c.shape[1] * c.shape[2] for c in self.clips)
        per_pixel = (time.monotonic() - began) / (self.clips[0].shape[1] * self.clips[0].shape[2])
        return 2 * per_pixel * pixels

    def _mean_psnr(self, enlarge: Callable[[Tensor], Tensor]) -> float:
        """PSNR of enlarge(lr [1, 7, 3, h, w]) -> [4h, 4w, 3] uint8, over frames, then clips."""
        scores = []
        for clip in self.clips:
            frames = [
                min(PSNR_CAP, psnr(enlarge(lr).numpy(), hr)) for lr, hr in self._windows(clip)
            ]
            scores.append(np.mean(frames))
        return float(np.mean(scores))

    def _windows(self, clip: Clip) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield lr [1, 7, 3, h, w] float32 in [0, 1] and the center's hr [H, W, 3] uint8."""
        T, H, W, _ = clip.shape
        H, W = H // SCALE * SCALE, W // SCALE * SCALE
        for center in np.linspace(0, T - 1, min(self.frames, T)).round().astype(int):
            times = [reflect(center + i - WINDOW // 2, T) for i in range(WINDOW)]
            hr = clip.frames[times, :H, :W]
            lr = degrade(torch.from_numpy(hr), self.degradation)
            lr = rearrange(lr, "t h w c -> 1 t c h w").float() / 255
            yield lr, hr[WINDOW // 2]


def reflect(index: int, length: int) -> int:
    """Frame index mirrored into 0..length-1; the first and last frames are not repeated."""
    period = max(1, 2 * (length - 1))
    return min(index % period, period - index % period)


def _to_uint8(frame: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> [H, W, 3] uint8."""
    return rearrange(frame.float().mul(255).round().clamp(0, 255), "c h w -> h w c").byte()


# ---- what a run writes and shows


class Log:
    """OUT/log.jsonl, and event files where TensorBoard is installed.

    Entries after `iteration` come from a part of the run that is about to be repeated; they go.
    """

    def __init__(self, out: Path, iteration: int):
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _is_entry_until(line, iteration)]
        _write_atomically(self.path, lambda part: part.write_text("".join(x + "\n" for x in kept)))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(out), purge_step=iteration + 1)

    def add(self, iteration: int, **values: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, iteration)
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _is_entry_until(line: str, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except json.JSONDecodeError:  # the last line of a killed run may be incomplete
        return False


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, then rename it: a file with that name is always complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Display:
    """Progress on stderr: a bar on a terminal, a line every 100 iterations elsewhere."""

    def __init__(self, done: int, total: int):
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.plain = not self.console.is_terminal
        self.last_psnr = ""
        self.total = total
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=self.plain,
        )
        self.task = self.bar.add_task("training", total=total, completed=done)

    def update(self, iteration: int, stage: int, loss: float, per_second: float) -> None:
        text = f"stage {stage}  loss {loss:.5f}  {per_second:.2f} it/s{self.last_psnr}"
        self.bar.update(self.task, description=text)
        if self.plain:
            left = int((self.total - iteration) / per_second)
            eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            self.say(f"iteration {iteration}/{self.total}  {text}  ETA {eta}")

    def advance(self, iteration: int) -> None:
        self.bar.update(self.task, completed=iteration)

    def validated(self, iteration: int, scores: dict[str, float]) -> None:
        self.last_psnr = f"  val {scores['psnr_db']:.3f} dB"
        self.say(
            f"iteration {iteration}: validation {scores['psnr_db']:.3f} dB, center frame alone "
            f"{scores['center_only_psnr_db']:.3f}, bicubic {scores['bicubic_psnr_db']:.3f}"
        )

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the iteration; a second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def _receive(self, number: int, frame) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---- training


class Trainer:
    """The state of a run, and the loop.

    Args:
        args: the flags, see `parse_args`.
        config: of the model.
    """

    def __init__(self, args: argparse.Namespace, config: MANAConfig):
        self.began = time.monotonic()
        self.args, self.out = args, args.out
        self.device = _device(args.device)
        self.backend = _backend(args.backend, self.device)
        clips = open_clips(args.data, args.cache / "clips")
        stills = open_clips(args.stills, args.cache / "stills", kind="still")
        val = open_clips(args.val, args.cache / "val", split="test")
        self.settings = {name: getattr(args, name) for name in FIXED_FLAGS}
        self.settings["betas"] = list(args.betas)
        self.settings |= {"data": _names(clips), "stills": _names(stills), "val": _names(val)}
        self.settings |= {"model": dataclasses.asdict(config)}
        self.sampler = Sampler(
            clips,
            stills,
            crop=args.crop,
            batch=args.batch,
            seed=args.seed,
            degradation=args.degradation,
            still_fraction=args.still_fraction,
        )
        self.model = _new_model(args, config).to(self.device)
        self.settings["init_from"] = _fingerprint(self.model) if args.init_from else None
        self.ema = copy.deepcopy(self.model) if args.ema else self.model
        self.lengths = (args.stage1, args.stage2, args.stage3)
        self.total = sum(self.lengths)
        self.iteration = 0
        self.best = {"iteration": 0, "psnr_db": None, "center_only_psnr_db": None}
        self.losses: list[Tensor] = []  # since the last log entry
        self.resume()
        self.validation = Validation(val, args.val_frames, args.degradation) if val else None
        self.step_seconds = 0.0  # the longest iteration since the last validation
        self.closing_seconds = 0.0  # what validating takes
        if args.minutes and self.validation:
            self.closing_seconds = self.validation.seconds(self.ema, self.device)

    # the paper's stages

    def stage(self) -> tuple[int, int]:
        """The stage (1, 2 or 3) of the next iteration and the iteration it starts at."""
        start = 0
        for stage, length in enumerate(self.lengths, 1):
            if self.iteration < start + length:
                return stage, start
            start += length
        return 3, start - self.lengths[2]

    def _begin_stage(self, stage: int) -> None:
        """Freeze what the stage does not train and make its optimizer."""
        memory = {id(p) for p in self.model.memory_parameters()}
        for p in self.model.parameters():
            p.requires_grad_(stage == 3 or (id(p) in memory) == (stage == 2))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, betas=tuple(self.args.betas))
        if self.iteration > self.stage()[1]:
            self._restore_optimizer()

    def _rate(self, stage: int, start: int) -> float:
        """The learning rate of the next iteration."""
        args = self.args
        k, length = self.iteration - start, self.lengths[stage - 1]
        rate = (args.lr, args.lr2, args.lr3)[stage - 1]
        if args.schedule == "cosine":
            rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * k / length)) / 2
        return rate * min(1.0, (k + 1) / args.warmup) if args.warmup else rate

    def _step(self, lr: Tensor, hr: Tensor, stage: int, rate: float) -> None:
        """One iteration: the gradient of the whole batch, part by part, and one step along it."""
        parts = self.args.accumulate
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for x, y in zip(lr.chunk(parts), hr.chunk(parts), strict=True):
            part = self._loss(x, y, stage) / parts
            part.backward()
            loss += part.detach()
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1
        if self.args.ema:
            # a young average forgets faster, or the initial weights would stay in it
            decay = min(self.args.ema, (1 + self.iteration) / (10 + self.iteration))
            average = get_ema_multi_avg_fn(decay)
            average(list(self.ema.parameters()), list(self.model.parameters()), None)
        self.losses.append(loss)

    def _loss(self, lr: Tensor, hr: Tensor, stage: int) -> Tensor:
        """Mean loss [] of some samples; weights and loss are float32 in every precision."""
        lr = lr.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, self.args.precision == "bf16"):
            if stage == 2:
                return self.model.memory_loss(lr)
            return F.l1_loss(self.model(lr), hr.to(self.device, non_blocking=True))

    # the loop

    def run(self) -> dict:
        """Train to the end, or for --minutes; returns what main() prints."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out, self.iteration)
        self.display = Display(self.iteration, self.total)
        self._describe()
        try:
            with self.display.bar, StopSignal() as self.stop:
                last = self.iteration == self.total
                while not last:
                    last = self._run_stage()
        finally:
            self.log.close()
        return {
            "best_psnr_db": self.best["psnr_db"],
            "bicubic_psnr_db": self.validation and self.validation.bicubic_psnr,
            "center_only_psnr_db": self.best["center_only_psnr_db"],
            "best_iteration": self.best["iteration"],
            "iterations": self.iteration,
            "finished": self.iteration == self.total,
            "seconds": round(time.monotonic() - self.began, 1),
            "weights": str(self.out / "best.safetensors"),
        }

    def _run_stage(self) -> bool:
        """Train to the end of the stage; true if the run is over, or its time is up."""
        args, last = self.args, False
        stage, start = self.stage()
        self._begin_stage(stage)
        self._start_clock()
        end = start + self.lengths[stage - 1]
        with closing(self.sampler.batches(self.iteration, end, args.workers)) as batches:
            began = time.monotonic()
            for lr, hr in batches:
                rate = self._rate(stage, start)
                self._step(lr, hr, stage, rate)
                self.step_seconds = max(self.step_seconds, time.monotonic() - began)
                self._report(stage, rate)
                last = self.iteration == self.total or self._out_of_time()
                if last or self.iteration % args.val_every == 0:
                    self._validate()
                    self._start_clock()
                if last or self.iteration % args.save_every == 0 or self.stop.received:
                    self.save()
                if self.stop.received:
                    raise TrainingError(
                        f"stopped at iteration {self.iteration} of {self.total}, saved in "
                        f"{self.out / 'last.pt'}; run the same command to continue"
                    )
                if last:
                    break
                began = time.monotonic()
        return last

    def _out_of_time(self) -> bool:
        """True if another iteration would leave too little of --minutes to validate and save."""
        if not self.args.minutes:
            return False
        elapsed = time.monotonic() - self.began
        return elapsed + self.step_seconds + self.closing_seconds > 60 * self.args.minutes

    def _start_clock(self) -> None:
        self.shown = time.monotonic()
        self.clock = (self.shown, self.iteration)

    def _report(self, stage: int, rate: float) -> None:
        """Show the mean loss, on a terminal every two seconds; log it every 100 iterations."""
        self.display.advance(self.iteration)
        now, due = time.monotonic(), self.iteration % LOG_EVERY == 0
        if not due and (self.display.plain or now < self.shown + 2):
            return
        self.shown = now
        loss = torch.stack(self.losses).float().mean().item()
        began, first = self.clock
        per_second = (self.iteration - first) / (now - began)
        self.display.update(self.iteration, stage, loss, per_second)
        if due:
            self._check_finite()
            self.losses = []
            self.log.add(
                self.iteration, stage=stage, loss=loss, rate=rate, iterations_per_second=per_second
            )

    def _check_finite(self) -> None:
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()])
        if not finite.all():
            raise TrainingError(
                f"weights became infinite by iteration {self.iteration}; use another --out with a "
                f"lower --lr or with --clip-grad ({self.out / 'last.pt'} has the last good state)"
            )

    def _validate(self) -> None:
        """Measure the averaged weights as a file holds them; export them if they are the best."""
        self._check_finite()
        began = time.monotonic()
        scores: dict = {"psnr_db": None, "center_only_psnr_db": None}
        better = True
        model = _rounded(self.ema)
        if self.validation:
            scores = self.validation.measure(model, self.device)
            self.log.add(self.iteration, **scores)
            self.display.validated(self.iteration, scores)
            better = self.best["psnr_db"] is None or scores["psnr_db"] > self.best["psnr_db"]
        if better:
            self.best = {key: scores[key] for key in ("psnr_db", "center_only_psnr_db")}
            self.best["iteration"] = self.iteration
            iteration, score = str(self.iteration), str(scores["psnr_db"])
            path = self.out / "best.safetensors"
            checkpoint.save(model, path, dtype=torch.float16, iteration=iteration, psnr=score)
        self.closing_seconds = time.monotonic() - began
        self.step_seconds = 0.0

    def _describe(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        where = f"{self.device.type}, attention by {self.backend}"
        clips, stills = len(self.sampler.clips), len(self.sampler.stills)
        self.display.say(f"{parameters} parameters on {where}; {clips} clips, {stills} stills")
        if self.iteration:
            self.display.say(f"continuing from iteration {self.iteration} of {self.total}")

    # what is kept between runs

    def save(self) -> None:
        """Write OUT/optimizer-N.pt, then OUT/last.pt; a kill leaves the old or the new pair."""
        self._check_finite()
        state = {
            "settings": self.settings,
            "iteration": self.iteration,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.args.ema else None,
            "rng": torch.get_rng_state(),
        }
        optimizer = self._optimizer_file()
        _write_atomically(optimizer, lambda part: torch.save(self.optimizer.state_dict(), part))
        _write_atomically(self.out / "last.pt", lambda part: torch.save(state, part))
        for old in set(self.out.glob("optimizer-*.pt")) - {optimizer}:
            old.unlink()

    def resume(self) -> None:
        """Continue from OUT/last.pt if there is one."""
        path = self.out / "last.pt"
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved = state["settings"]
        except checkpoint.UNREADABLE as error:
            raise TrainingError(f"{path} is not a saved run; use another --out") from error
        _refuse_changes(path, saved, self.settings)
        self.model.load_state_dict(state["model"])
        if self.args.ema:
            self.ema.load_state_dict(state["ema"])
        self.iteration, self.best = state["iteration"], state["best"]
        torch.set_rng_state(state["rng"])

    def _optimizer_file(self) -> Path:
        return self.out / f"optimizer-{self.iteration}.pt"

    def _restore_optimizer(self) -> None:
        """Adam's averages in the middle of a stage; a new stage begins without any."""
        path = self._optimizer_file()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        except checkpoint.UNREADABLE as error:
            raise TrainingError(
                f"{path} must hold the optimizer's state to continue, it does not; copy it there, "
                f"or use another --out with --init-from {self.out / 'best.safetensors'}"
            ) from error


def _rounded(model: MANA) -> MANA:
    """A copy whose weights are those of a float16 file."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in copied.parameters():
            p.copy_(p.half())
    return copied


def _refuse_changes(path: Path, saved: dict, settings: dict) -> None:
    changes = []
    for name in sorted(saved.keys() | settings.keys()):
        old, new = saved.get(name), settings.get(name)
        if old != new:
            flag = "--preset" if name == "model" else "--" + name.replace("_", "-")
            brief = isinstance(new, int | float | str | list) and name not in ("data", "stills")
            changes.append(f"{flag} (was {old}, now {new})" if brief else flag)
    if changes:
        raise TrainingError(
            f"{path} was made with other settings: {', '.join(changes)}; "
            "use the same ones or another --out"
        )


def _fingerprint(model: nn.Module) -> str:
    """A short text that differs when the weights do."""
    digest = hashlib.sha256()
    for x in model.state_dict().values():
        digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _names(clips: list[Clip]) -> str:
    """A short text that differs when the clips do."""
    text = "\n".join(f"{clip.name} {clip.shape}" for clip in clips)
    return f"{len(clips)} clips, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda needs a CUDA GPU, there is none; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # without this, a run that was resumed would differ from one that was not
    torch.backends.cudnn.deterministic = True
    return torch.device(name)


def _backend(name: str, device: torch.device) -> str:
    try:
        backend, reason = choose_backend(name, device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return f"{backend} ({reason})"


def _new_model(args: argparse.Namespace, config: MANAConfig) -> MANA:
    """The model with its first weights, the same for the same seed."""
    torch.manual_seed(args.seed)
    model = checkpoint.load(args.init_from) if args.init_from else MANA(config)
    if model.config != config:
        raise TrainingError(
            f"{args.init_from} must hold a model of the preset {args.preset}, it holds "
            f"{model.config}; change --preset"
        )
    model.backend = args.backend
    return model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# ---- command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.train",
        description=__doc__,
        formatter_class=_HelpFormatter,
    )
    _add_data_flags(parser)
    _add_training_flags(parser)
    _add_run_flags(parser)
    args = parser.parse_args(argv)
    if not args.data and not args.stills:
        parser.error("pass --data or --stills")
    for name in ("crop", "batch", "accumulate", "val_every", "val_frames", "save_every", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch % args.accumulate:
        parser.error("--batch must be a multiple of --accumulate")
    if min(args.stage1, args.stage2, args.stage3) < 0 or not 0 <= args.ema < 1:
        parser.error("iterations must be at least 0, and 0 <= --ema < 1")
    if args.stage1 + args.stage2 + args.stage3 == 0:
        parser.error("at least one of --stage1, --stage2, --stage3 must be above 0")
    args.out = args.out or Path("runs") / args.preset
    args.cache = args.cache or args.out.parent / "cache"
    return args


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    paths = {"type": Path, "nargs": "+", "default": [], "metavar": "PATH"}
    add("--data", help="videos, folders of videos or frames, Vimeo-90K, decoded caches", **paths)
    add("--stills", help="pictures, which become clips by synthetic motion", **paths)
    add("--still-fraction", type=float, default=0.3, help="share of samples from stills")
    add("--val", help="clips for validation, as --data", **paths)
    add("--cache", type=Path, help="folder for decoded clips (default: cache beside OUT)")
    add("--degradation", choices=tuple(DEGRADATIONS), default="matlab_bicubic", help="x1/4 method")
    add("--crop", type=int, default=64, help="low-resolution pixels of a sample")
    add("--batch", type=int, default=16, help="samples per iteration")
    add("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    add("--workers", type=int, default=1, help="threads that prepare batches")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--preset", choices=("tiny", "small", "paper", "official"), default="tiny", help="model")
    add("--init-from", type=Path, metavar="FILE", help="weights to start from")
    for stage, (iterations, rate) in enumerate([(90000, 1e-4), (30000, 1e-4), (30000, 1e-5)], 1):
        add(f"--stage{stage}", type=int, default=iterations, help=f"iterations of stage {stage}")
        flag = "--lr" if stage == 1 else f"--lr{stage}"
        add(flag, type=float, default=rate, help=f"learning rate of stage {stage}")
    add("--betas", type=float, nargs=2, default=(0.5, 0.99), help="of Adam")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of every stage")
    add("--warmup", type=int, default=0, help="iterations of linear warm-up of every stage")
    add("--ema", type=float, default=0.999, help="decay of the weights' average, 0 for none")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient, 0 for any")
    add("--seed", type=int, default=0, help="of everything random")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, help="folder of the run (default: runs/PRESET)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--backend", choices=BACKENDS, default="auto", help="of the attention")
    add("--threads", type=int, default=0, help="of PyTorch on the CPU, 0 for its own choice")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the iterations")
    add("--val-every", type=int, default=2000, help="iterations between validations")
    add("--val-frames", type=int, default=10, help="frames of each clip, evenly spaced")
    add("--save-every", type=int, default=500, help="iterations between saved states")
    add("--minutes", type=float, default=0, help="stop, validated and saved, after this time")


def train(args: argparse.Namespace, config: MANAConfig) -> dict:
    """Train a model of `config` with the flags `args`; the last line of stdout as a dict."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return Trainer(args, config).run()


def main() -> None:
    """Command line."""
    args = parse_args()
    try:
        summary = train(args, MANAConfig.preset(args.preset))
    except (DataError, TrainingError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is too small; lower --batch or --crop")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to continue from the last saved state")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
