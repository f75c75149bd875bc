"""The training loop: stages, exact resume, validation, export."""

import copy
import dataclasses
import hashlib
import math
import time
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mana_triton import checkpoint
from mana_triton.attention import choose_backend
from mana_triton.model import MANA, MANAConfig
from mana_triton.training.clips import Clip, open_clips
from mana_triton.training.degradation import VALIDATION, LowClip, open_low_clips, training_recipes
from mana_triton.training.losses import StageLoss
from mana_triton.training.options import TrainingOptions
from mana_triton.training.parallel import Processes
from mana_triton.training.progress import Log, StopSignal, TrainingError, read_state, write_state
from mana_triton.training.sampler import Sampler
from mana_triton.training.validation import Validation

LOG_EVERY = 100


class Trainer:
    """The state of a run, and the loop.

    Args:
        options: of the run.
        config: of the model; None for that of the preset.

    Raises:
        DataError: the clips cannot be used.
        TrainingError: the options do not fit the machine, or the run that is to be continued.
        CheckpointError: the first weights cannot be read.
    """

    def __init__(self, options: TrainingOptions, config: MANAConfig | None = None):
        self.began = time.monotonic()
        self.options, self.out = options, options.folder
        config = config or MANAConfig.preset(options.preset)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.processes = Processes()
        self.leads = self.processes.rank == 0
        self.device = choose_device(options.device, self.processes.local_rank)
        try:
            self.backend, self.reason = choose_backend(options.backend, self.device)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        if options.batch % (options.accumulate * self.processes.count):
            raise TrainingError(
                f"--batch must be a multiple of --accumulate times the processes, got "
                f"{options.batch}, {options.accumulate} and {self.processes.count}; change --batch"
            )
        self.validation: Validation | None = None
        with self.processes.first_of_node():
            names = self._open_data()
        self.model = _new_model(options, config).to(self.device)
        self.settings = options.fixed() | names | {"model": dataclasses.asdict(config)}
        self.settings["init_from"] = fingerprint(self.model) if options.init_from else None
        # an infinite sigma has no gradient: it must be neither stepped nor averaged
        self.learned = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.ema = copy.deepcopy(self.model) if options.ema else self.model
        self.total = sum(options.lengths)
        self.iteration = 0
        self.best = {"iteration": 0, "psnr_db": None, "center_only_psnr_db": None}
        self.losses: list[Tensor] = []  # since the last log entry
        self._resume()

    def _open_data(self) -> dict:
        """Make the sampler and the validation; returns what the clips are recognized by."""
        options = self.options
        cache = options.cache or self.out.parent / "cache"
        clips = open_clips(options.data, cache / "clips")
        stills = open_clips(options.stills, cache / "stills", kind="still")
        val = open_clips(options.val, cache / "val", split="test")
        low, low_val = None, None
        if options.degradation == "real":
            low = open_low_clips(clips + stills, cache / "real", training_recipes)
            low_val = open_low_clips(val, cache / "real", lambda name: [VALIDATION])
        self.sampler = Sampler(
            clips, stills, crop=options.crop, batch=options.batch, seed=options.seed,
            degradation=options.degradation, still_fraction=options.still_fraction, low=low,
        )  # fmt: skip
        if val and self.leads:
            self.validation = Validation(val, options.val_frames, options.degradation, low_val)
        return {"data": names(clips, low), "stills": names(stills, low), "val": names(val)}

    # the paper's stages

    def stage(self) -> tuple[int, int]:
        """The stage (1, 2 or 3) of the next iteration and the iteration it starts at."""
        start = 0
        for stage, length in enumerate(self.options.lengths, 1):
            if self.iteration < start + length:
                return stage, start
            start += length
        return 3, start - self.options.stage3

    def _start_stage(self, stage: int) -> None:
        """Freeze what the stage does not train; make its loss and its optimizer."""
        options = self.options
        branch = {id(p) for p in self.model.memory_parameters()}
        for p in self._weights(self.model):
            p.requires_grad_(stage == 3 or (stage == 1 and id(p) not in branch))
        if stage == 2 and branch:
            self.model.memory.requires_grad_(True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise TrainingError("stage 2 trains the memory, --preset has none; pass --stage2 0")
        self.loss: nn.Module = StageLoss(self.model, stage, options.backend)
        if options.compile:
            self.loss.compile()
        self.optimizer = torch.optim.Adam(trained, betas=options.betas)  # pyright: ignore[reportArgumentType]
        if self.iteration > self.stage()[1]:
            self._restore_optimizer()

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """What training may change, in whichever stage."""
        return [model.get_parameter(name) for name in self.learned]

    def _rate(self, stage: int, start: int) -> float:
        """The learning rate of the next iteration."""
        options = self.options
        k, length = self.iteration - start, options.lengths[stage - 1]
        rate = (options.lr, options.lr2, options.lr3)[stage - 1]
        if options.schedule == "cosine":
            rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * k / length)) / 2
        return rate * min(1.0, (k + 1) / options.warmup) if options.warmup else rate

    def _step(self, lr: Tensor, hr: Tensor, rate: float) -> None:
        """One iteration: the gradient of the whole batch, part by part, and one step along it."""
        parts = self.options.accumulate
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for x, y in zip(lr.chunk(parts), hr.chunk(parts), strict=True):
            part = self._loss_of(x, y) / parts
            part.backward()
            loss += part.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.processes.average([*gradients, loss])
        if self.options.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1
        if self.options.ema:
            # a young average forgets faster, or the initial weights would stay in it
            decay = min(self.options.ema, (1 + self.iteration) / (10 + self.iteration))
            get_ema_multi_avg_fn(decay)(self._weights(self.ema), self._weights(self.model), None)
        self.losses.append(loss)

    def _loss_of(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Mean loss [] of some samples; weights and loss are float32 in every precision."""
        lr, hr = (x.to(self.device, non_blocking=True) for x in (lr, hr))
        bf16 = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, bf16):
            return self.loss(lr, hr)

    # the loop

    def run(self) -> dict | None:
        """Train to the end, or for --minutes.

        Returns:
            What `train` prints, in process 0 alone.

        Raises:
            TrainingError: the run was stopped, or it diverged.
        """
        with StopSignal() as self.stop, self._progress() as self.progress:
            if self.leads:
                self.out.mkdir(parents=True, exist_ok=True)
                self.log = Log(self.out, self.iteration)
                self._describe()
            try:
                last = self.iteration == self.total
                while not last:
                    last = self._run_stage()
            finally:
                if self.leads:
                    self.log.close()
        self.processes.leave()
        return self._summary() if self.leads else None

    def _progress(self) -> Progress:
        """A bar on a terminal; its console takes lines everywhere."""
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        text = TextColumn("{task.description}")
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
        shown = self.leads and console.is_terminal
        progress = Progress(*columns, console=console, disable=not shown)
        self.task = progress.add_task("", total=self.total, completed=self.iteration)
        return progress

    def _say(self, line: str) -> None:
        self.progress.console.print(line, markup=False)

    def _describe(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        clips, stills = len(self.sampler.clips), len(self.sampler.stills)
        self._say(
            f"{parameters} parameters on {self.processes.count} x {self.device.type}, attention by "
            f"{self.backend} ({self.reason}); {clips} clips, {stills} stills"
        )
        if self.sampler.short_scenes:
            self._say(f"{self.sampler.short_scenes} scenes of fewer than 7 frames left out")
        if self.iteration:
            self._say(f"continuing from iteration {self.iteration} of {self.total}")

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
        options, last = self.options, False
        stage, start = self.stage()
        self._start_stage(stage)
        end = start + options.lengths[stage - 1]
        share = self.processes.share(options.batch)
        self.clock = (time.monotonic(), self.iteration)
        with closing(self.sampler.batches(self.iteration, end, options.workers, share)) as batches:
            for lr, hr in batches:
                self._check_loss()
                rate = self._rate(stage, start)
                self._step(lr, hr, rate)
                if self.leads:
                    self._report(stage, rate)
                minutes = (time.monotonic() - self.began) / 60
                late = 0 < options.minutes <= minutes
                stop, late = self.processes.any(self.stop.received, late)
                last = self.iteration == self.total or late
                if self.leads:
                    if last or self.iteration % options.val_every == 0:
                        self._validate()
                    if last or stop or self.iteration % options.save_every == 0:
                        self.save()
                if stop:
                    self.processes.any()  # or torchrun would end the process that saves
                    raise TrainingError(
                        f"stopped at iteration {self.iteration} of {self.total}, saved in "
                        f"{self.out / 'last.pt'}; run the same command to continue"
                    )
                if last:
                    break
        return last

    def _report(self, stage: int, rate: float) -> None:
        """Log the mean loss every 100 iterations."""
        self.progress.update(self.task, completed=self.iteration)
        if self.iteration % LOG_EVERY:
            return
        self._check_finite()
        loss = torch.stack(self.losses).float().mean().item()
        self.losses = self.losses[-1:]  # not yet checked
        began, first = self.clock
        pace = (self.iteration - first) / (time.monotonic() - began)
        self.clock = (time.monotonic(), self.iteration)
        model, measured = self.model, {"stage": stage, "loss": loss, "rate": rate}
        if model.sigma.isfinite():
            measured["sigma"] = model.sigma.item()
        if model.config.match == "cosine":
            measured["temperature"] = model.temperature.item()
        self.log.add(self.iteration, step_per_second=pace, **measured)
        text = f"stage {stage}  loss {loss:.5f}  {pace:.2f} it/s"
        self.progress.update(self.task, description=text)
        if self.progress.disable:
            self._say(f"iteration {self.iteration}/{self.total}  {text}")

    def _check_loss(self) -> None:
        """Look at the last iteration's loss only now: a GPU has worked in the meantime."""
        if self.losses and not self.losses[-1].isfinite():
            self._diverged(f"the loss is {self.losses[-1].item()}")

    def _check_finite(self) -> None:
        if not all(p.isfinite().all() for p in self._weights(self.model)):
            self._diverged("weights are no longer finite")

    def _diverged(self, what: str) -> NoReturn:
        raise TrainingError(
            f"{what} at iteration {self.iteration}; use another --out with a lower --lr or with "
            f"--clip-grad ({self.out / 'last.pt'} has the last good state)"
        )

    def _validate(self) -> None:
        """Measure the averaged weights as a file holds them; export them if they are the best."""
        self._check_finite()
        scores: dict = {"psnr_db": None, "center_only_psnr_db": None}
        better = True
        model = _rounded(self.ema)
        if self.validation:
            scores = self.validation.measure(model, self.device)
            self.log.add(self.iteration, **scores)
            self._say(
                f"iteration {self.iteration}: validation {scores['psnr_db']:.3f} dB, "
                f"center frame alone {scores['center_only_psnr_db']:.3f}, "
                f"bicubic {scores['bicubic_psnr_db']:.3f}"
            )
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
        self.clock = (time.monotonic(), self.iteration)

    # what is kept between runs

    def save(self) -> None:
        """Write OUT/optimizer-N.pt, then OUT/last.pt; a kill leaves the old or the new pair."""
        self._check_finite()
        state = {
            "settings": self.settings,
            "iteration": self.iteration,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.options.ema else None,
            "rng": torch.get_rng_state(),
        }
        optimizer = self._optimizer_file()
        write_state(optimizer, self.optimizer.state_dict())
        write_state(self.out / "last.pt", state)
        for old in set(self.out.glob("optimizer-*.pt")) - {optimizer}:
            old.unlink()

    def _resume(self) -> None:
        """Continue from OUT/last.pt if there is one."""
        state = read_state(self.out / "last.pt", self.settings)
        if state:
            self.model.load_state_dict(state["model"])
            if self.options.ema:
                self.ema.load_state_dict(state["ema"])
            self.iteration, self.best = state["iteration"], state["best"]
            torch.set_rng_state(state["rng"])

    def _optimizer_file(self) -> Path:
        return self.out / f"optimizer-{self.iteration}.pt"

    def _restore_optimizer(self) -> None:
        """Adam's averages in the middle of a stage; a new stage starts without any."""
        path = self._optimizer_file()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        except checkpoint.UNREADABLE as error:
            raise TrainingError(
                f"{path} must hold the optimizer's state to continue, it does not; copy it there, "
                f"or use another --out with --init-from {self.out / 'best.safetensors'}"
            ) from error


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a process; "auto" is its GPU where there is one.

    Raises:
        TrainingError: "cuda" without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda needs a CUDA GPU, there is none; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # without this, a run that was resumed would differ from one that was not
    torch.backends.cudnn.deterministic = True
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _new_model(options: TrainingOptions, config: MANAConfig) -> MANA:
    """The model with its first weights, the same for the same seed."""
    torch.manual_seed(options.seed)
    model = checkpoint.load(options.init_from) if options.init_from else MANA(config)
    if model.config != config:
        raise TrainingError(
            f"--init-from must hold a model of --preset {options.preset} ({config}), "
            f"{options.init_from} is another ({model.config}); change --preset"
        )
    return model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _rounded(model: MANA) -> MANA:
    """A copy whose weights are those of a float16 file."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in copied.parameters():
            p.copy_(p.half())
    return copied


def fingerprint(model: nn.Module) -> str:
    """A short text that differs when the weights do."""
    digest = hashlib.sha256()
    for x in model.state_dict().values():
        digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def names(clips: list[Clip], low: dict[Path, list[LowClip]] | None = None) -> str:
    """A short text that differs when the clips, or the recipes of their variants, do."""
    recipes = [[variant.recipe for variant in low[clip.path]] if low else [] for clip in clips]
    parts = [(c.name, c.shape, *c.cuts, *drawn) for c, drawn in zip(clips, recipes, strict=True)]
    text = "\n".join(" ".join(map(str, part)) for part in parts)
    return f"{len(clips)} clips, {hashlib.sha256(text.encode()).hexdigest()[:12]}"
