"""Train MANA on videos, folders of frames, Vimeo-90K or still pictures.

Three stages, as in the paper: everything but the memory branch (L1), the memory branch alone
(distance of its output to the queries), everything (L1). The weights' moving average is rounded
to float16, validated, and exported to OUT/best.safetensors. The same command continues from
OUT/last.pt and OUT/optimizer-N.pt, with the same result as a run that was never interrupted.
OUT/log.jsonl holds what was measured.

`torchrun --nproc-per-node N -m mana_triton.train ...` splits every batch among N processes, one
to a GPU; a run may go on with another number of them.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mana_triton import checkpoint
from mana_triton.attention import BACKENDS, choose_backend
from mana_triton.checkpoint import CheckpointError
from mana_triton.model import MANA, MANAConfig
from mana_triton.training.clips import DEGRADATIONS, Clip, DataError, Sampler, open_clips
from mana_triton.training.degradation import VALIDATION, LowClip, open_low_clips, training_recipes
from mana_triton.training.growth import GrowthError, grow
from mana_triton.training.parallel import Processes
from mana_triton.training.progress import Display, Log, StopSignal, write_atomically
from mana_triton.training.validation import Validation, attention_statistics

LOG_EVERY = 100

# flags that change the result; a run cannot be continued with another value
FIXED_FLAGS = (
    "crop", "batch", "stage1", "stage2", "stage3", "lr", "lr2", "lr3", "betas", "schedule",
    "warmup", "ema", "clip_grad", "still_fraction", "degradation", "seed", "precision",
    "val_frames", "init_from",
)  # fmt: skip


class TrainingError(ValueError):
    """Training cannot start or go on; the message says what to do about it."""


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
        self.processes = Processes()
        self.leads = self.processes.rank == 0
        self.device = _device(args.device, self.processes.local_rank)
        self.backend = _backend(args.backend, self.device)
        if args.batch % (args.accumulate * self.processes.count):
            raise TrainingError(
                f"--batch must be a multiple of --accumulate times the processes, got "
                f"{args.batch}, {args.accumulate} and {self.processes.count}; change --batch"
            )
        with self.processes.first_of_node():
            clips = open_clips(args.data, args.cache / "clips")
            stills = open_clips(args.stills, args.cache / "stills", kind="still")
            val = open_clips(args.val, args.cache / "val", split="test")
            low, low_val = None, None
            if args.degradation == "real":
                place = args.cache / "real"
                low = open_low_clips(clips + stills, place, training_recipes)
                low_val = open_low_clips(val, place, lambda name: [VALIDATION])
        self.settings = {name: getattr(args, name) for name in FIXED_FLAGS}
        self.settings["betas"] = list(args.betas)
        self.settings |= {"data": _names(clips, low), "stills": _names(stills, low)}
        self.settings["val"] = _names(val)
        self.settings |= {"model": dataclasses.asdict(config)}
        self.sampler = Sampler(
            clips,
            stills,
            crop=args.crop,
            batch=args.batch,
            seed=args.seed,
            degradation=args.degradation,
            still_fraction=args.still_fraction,
            low=low,
        )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.model = _new_model(args, config).to(self.device)
        # an infinite sigma is no weight: it must neither be stepped nor averaged
        self.learned = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.loss = torch.compile(_loss) if args.compile else _loss
        self.settings["init_from"] = _fingerprint(self.model) if args.init_from else None
        self.ema = copy.deepcopy(self.model) if args.ema else self.model
        self.lengths = (args.stage1, args.stage2, args.stage3)
        self.total = sum(self.lengths)
        self.iteration = 0
        self.best = {"iteration": 0, "psnr_db": None, "center_only_psnr_db": None}
        self.losses: list[Tensor] = []  # since the last log entry
        self.resume()
        self.validation = None
        if val and self.leads:
            self.validation = Validation(val, args.val_frames, args.degradation, low_val)
        # of process 0, which decides when the time is up
        self.step_seconds = 0.0  # the longest iteration since the last validation
        self.validating_seconds = 0.0  # what the last one took
        self.saving_seconds = 0.0
        if args.minutes and self.validation:
            self.validating_seconds = self.validation.seconds(self.ema, self.device)

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
        for p in self._weights(self.model):
            p.requires_grad_(stage == 3 or (id(p) in memory) == (stage == 2))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise TrainingError("stage 2 trains the memory, --preset has none; pass --stage2 0")
        self.optimizer = torch.optim.Adam(trained, betas=tuple(self.args.betas))
        if self.iteration > self.stage()[1]:
            self._restore_optimizer()

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """What training may change, in whichever stage."""
        return [model.get_parameter(name) for name in self.learned]

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
            part = self._loss_of(x, y, stage) / parts
            part.backward()
            loss += part.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.processes.average([*gradients, loss])
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1
        if self.args.ema:
            # a young average forgets faster, or the initial weights would stay in it
            decay = min(self.args.ema, (1 + self.iteration) / (10 + self.iteration))
            get_ema_multi_avg_fn(decay)(self._weights(self.ema), self._weights(self.model), None)
        self.losses.append(loss)

    def _loss_of(self, lr: Tensor, hr: Tensor, stage: int) -> Tensor:
        """Mean loss [] of some samples; weights and loss are float32 in every precision."""
        lr, hr = (x.to(self.device, non_blocking=True) for x in (lr, hr))
        with torch.autocast(self.device.type, torch.bfloat16, self.args.precision == "bf16"):
            return self.loss(self.model, lr, hr, stage, self.args.backend)

    # the loop

    def run(self) -> dict | None:
        """Train to the end, or for --minutes; returns what main() prints, in process 0 alone."""
        if self.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.out, self.iteration)
            self.display = Display(self.iteration, self.total)
            self._describe()
        try:
            with self.display if self.leads else nullcontext(), StopSignal() as self.stop:
                last = self.iteration == self.total
                while not last:
                    last = self._run_stage()
        finally:
            if self.leads:
                self.log.close()
        self.processes.leave()
        return self._summary() if self.leads else None

    def _summary(self) -> dict:
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
        share = self.processes.share(args.batch)
        with closing(
            self.sampler.batches(self.iteration, end, args.workers, share, self.device)
        ) as batches:
            began = time.monotonic()
            for lr, hr in batches:
                self._check_loss()
                rate = self._rate(stage, start)
                self._step(lr, hr, stage, rate)
                if self.leads:
                    self._report(stage, rate, lr)
                self.step_seconds = max(self.step_seconds, time.monotonic() - began)
                validate = self.iteration % args.val_every == 0
                save = self.iteration % args.save_every == 0
                late = self.leads and self._out_of_time(validate, save)
                stop, late = self.processes.any(self.stop.received, late)
                last = self.iteration == self.total or late
                if self.leads and (last or validate):
                    self._validate()
                    self._start_clock()
                if self.leads and (last or stop or save):
                    self.save()
                if stop:
                    self.processes.meet()  # or torchrun would end the one that saves
                    raise TrainingError(
                        f"stopped at iteration {self.iteration} of {self.total}, saved in "
                        f"{self.out / 'last.pt'}; run the same command to continue"
                    )
                if last:
                    break
                began = time.monotonic()
        return last

    def _out_of_time(self, validate: bool, save: bool) -> bool:
        """True if another iteration would leave too little of --minutes to validate and save.

        Where this iteration is to validate or save as well, that is done twice before the end.
        """
        if not self.args.minutes:
            return False
        seconds = time.monotonic() - self.began + self.step_seconds
        seconds += self.validating_seconds * (1 + validate) + self.saving_seconds * (1 + save)
        return seconds > 60 * self.args.minutes

    def _start_clock(self) -> None:
        self.shown = time.monotonic()
        self.clock = (self.shown, self.iteration)

    def _report(self, stage: int, rate: float, lr: Tensor) -> None:
        """Show the mean loss, on a terminal every two seconds; log it every 100 iterations."""
        self.display.advance(self.iteration)
        now, due = time.monotonic(), self.iteration % LOG_EVERY == 0
        if not due and (self.display.plain or now < self.shown + 2):
            return
        self.shown = now
        loss = torch.stack(self.losses).float().mean().item()
        began, first = self.clock
        pace = {
            "step_per_second": (self.iteration - first) / (now - began),
            "loader_per_second": self.sampler.per_second(self.args.workers),
        }
        self.display.update(self.iteration, stage, loss, pace)
        if due:
            self._check_finite()
            self.losses = self.losses[-1:]  # not yet checked
            measured = {
                "gradient_noise": gradient_noise(self.optimizer, self.args.batch),
                **attention_statistics(self.model, lr[:1].to(self.device)),
            }
            self.display.measured(measured)
            self.log.add(self.iteration, stage=stage, loss=loss, rate=rate, **pace, **measured)

    def _check_loss(self) -> None:
        """Look at the last iteration's loss only now: a GPU has worked on meanwhile."""
        if self.losses and not self.losses[-1].isfinite():
            raise TrainingError(self._diverged(f"the loss is {self.losses[-1].item()}"))

    def _diverged(self, what: str) -> str:
        return (
            f"{what} at iteration {self.iteration}; use another --out with a lower --lr or with "
            f"--clip-grad ({self.out / 'last.pt'} has the last good state)"
        )

    def _check_finite(self) -> None:
        finite = torch.stack([p.isfinite().all() for p in self._weights(self.model)])
        if not finite.all():
            raise TrainingError(self._diverged("weights are no longer finite"))

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
            if self.log.writer:
                picture = self.validation.picture(model, self.device)
                self.log.picture(self.iteration, "bicubic, ours, original", picture)
            better = self.best["psnr_db"] is None or scores["psnr_db"] > self.best["psnr_db"]
        if better:
            self.best = {key: scores[key] for key in ("psnr_db", "center_only_psnr_db")}
            self.best["iteration"] = self.iteration
            iteration, score = str(self.iteration), str(scores["psnr_db"])
            path = self.out / "best.safetensors"
            checkpoint.save(model, path, dtype=torch.float16, iteration=iteration, psnr=score)
        self.validating_seconds = time.monotonic() - began
        self.step_seconds = 0.0

    def _describe(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        where = f"{self.processes.count} x {self.device.type}, attention by {self.backend}"
        clips, stills = len(self.sampler.clips), len(self.sampler.stills)
        self.display.say(f"{parameters} parameters on {where}; {clips} clips, {stills} stills")
        if self.sampler.short_scenes:
            self.display.say(f"{self.sampler.short_scenes} scenes of fewer than 7 frames left out")
        if self.iteration:
            self.display.say(f"continuing from iteration {self.iteration} of {self.total}")

    # what is kept between runs

    def save(self) -> None:
        """Write OUT/optimizer-N.pt, then OUT/last.pt; a kill leaves the old or the new pair."""
        self._check_finite()
        began = time.monotonic()
        state = {
            "settings": self.settings,
            "iteration": self.iteration,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.args.ema else None,
            "rng": torch.get_rng_state(),
        }
        optimizer = self._optimizer_file()
        write_atomically(optimizer, lambda part: torch.save(self.optimizer.state_dict(), part))
        write_atomically(self.out / "last.pt", lambda part: torch.save(state, part))
        for old in set(self.out.glob("optimizer-*.pt")) - {optimizer}:
            old.unlink()
        self.saving_seconds = time.monotonic() - began

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


def _names(clips: list[Clip], low: dict[Path, list[LowClip]] | None = None) -> str:
    """A short text that differs when the clips, or the recipes of their variants, do."""
    recipes = [[variant.recipe for variant in low[clip.path]] if low else [] for clip in clips]
    parts = [(c.name, c.shape, *c.cuts, *drawn) for c, drawn in zip(clips, recipes, strict=True)]
    text = "\n".join(" ".join(map(str, part)) for part in parts)
    return f"{len(clips)} clips, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _loss(model: MANA, lr: Tensor, hr: Tensor, stage: int, backend: str) -> Tensor:
    """Mean loss [] of a stage: lr [B, 7, 3, h, w] and the center's hr [B, 3, 4h, 4w]."""
    if stage == 2:
        return model.memory_loss(lr, backend=backend)
    return F.l1_loss(model(lr, backend=backend), hr)


def gradient_noise(optimizer: torch.optim.Adam, batch: int) -> float | None:
    """The number of samples whose mean gradient is as much noise as signal.

    Adam keeps averages m and v of the gradient and its square. Were the gradient of constant mean
    and of variance s^2, m would have the variance s^2 (1 - b1) / (1 + b1), so that m^2 and v give
    both. None where the mean vanishes in the noise.
    """
    first, second = 0.0, 0.0
    beta, beta2 = optimizer.param_groups[0]["betas"]
    for state in optimizer.state.values():
        age = float(state["step"])
        first += (state["exp_avg"] / (1 - beta**age)).square().sum().item()
        second += (state["exp_avg_sq"] / (1 - beta2**age)).sum().item()
    noise = (second - first) * (1 + beta) / (2 * beta) if beta else math.nan
    signal = second - noise
    return batch * noise / signal if noise > 0 and signal > 0 else None


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda needs a CUDA GPU, there is none; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # without this, a run that was resumed would differ from one that was not
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


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
        try:
            model = grow(model, config)
        except GrowthError as error:
            raise TrainingError(
                f"{args.init_from} must hold a model of the preset {args.preset} or one that can "
                f"grow into it: {error}; change --preset"
            ) from error
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
    if not args.clip_grad >= 0:
        parser.error("--clip-grad must be at least 0, and 0 does not clip")
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
    add("--degradation", choices=(*DEGRADATIONS, "real"), default="matlab_bicubic",
        help="x1/4 method; real: blur, noise and lossy codecs, made once by PyAV")  # fmt: skip
    add("--crop", type=int, default=64, help="low-resolution pixels of a sample")
    add("--batch", type=int, default=16, help="samples per iteration")
    add("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    add("--workers", type=int, default=1, help="threads that prepare batches")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--preset", choices=("tiny", "small", "paper", "official"), default="tiny", help="model")
    add("--init-from", type=Path, metavar="NAME|FILE", help="weights to start from; a smaller"
        " network's grow into a larger one with the same function")  # fmt: skip
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
    add("--compile", action="store_true", help="compile the network first, which takes minutes")
    add("--threads", type=int, default=0, help="of PyTorch on the CPU, 0 for its own choice")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the iterations")
    add("--val-every", type=int, default=2000, help="iterations between validations")
    add("--val-frames", type=int, default=10, help="frames of each clip, evenly spaced")
    add("--save-every", type=int, default=500, help="iterations between saved states")
    add("--minutes", type=float, default=0, help="stop, validated and saved, after this time")


def train(args: argparse.Namespace, config: MANAConfig) -> dict | None:
    """Train a model of `config` with the flags `args`; the last line of stdout as a dict.

    None in every process but the first.
    """
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
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
