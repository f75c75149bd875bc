"""What a training run writes and shows: the log, the panel of a terminal, requests to stop."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

CURVE = 60  # losses in the panel's curve
LEVELS = "▁▂▃▄▅▆▇█"


class Log:
    """OUT/log.jsonl, and event files where TensorBoard is installed.

    Entries after `iteration` come from a part of the run that is about to be repeated; they go.
    """

    def __init__(self, out: Path, iteration: int):
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _is_entry_until(line, iteration)]
        write_atomically(self.path, lambda part: part.write_text("".join(x + "\n" for x in kept)))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(out), purge_step=iteration + 1)

    def add(self, iteration: int, **values: float | None) -> None:
        """One entry; None stands for what cannot be known."""
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, iteration)
            self.writer.flush()

    def picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """A picture [H, W, 3] uint8 for TensorBoard."""
        if self.writer:
            self.writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _is_entry_until(line: str, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except json.JSONDecodeError:  # the last line of a killed run may be incomplete
        return False


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
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
    """Progress on stderr: a panel on a terminal, a line every 100 iterations elsewhere."""

    def __init__(self, done: int, total: int, console: Console | None = None):
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.plain = not self.console.is_terminal
        self.iteration, self.total = done, total
        self.shown: dict[str, str] = {}
        self.losses: list[float] = []
        self.live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "Display":
        if not self.plain:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        self.live.stop()

    def update(self, iteration: int, stage: int, loss: float, pace: dict[str, float]) -> None:
        """Show a mean loss and the pace: "step_per_second" and "loader_per_second"."""
        seconds = int((self.total - iteration) / pace["step_per_second"])
        self.losses = [*self.losses[1 - CURVE :], loss]
        self.shown |= {
            "stage": str(stage),
            "loss": f"{loss:.5f}",
            "it/s": f"{pace['step_per_second']:.2f}, the loader {pace['loader_per_second']:.2f}",
            "ETA": f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        }
        if self.plain:
            text = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            self.say(f"iteration {iteration}/{self.total}  {text}")

    def advance(self, iteration: int) -> None:
        self.iteration = iteration

    def measured(self, values: dict[str, float | None]) -> None:
        """Show more numbers on a terminal, under their names."""
        if not self.plain:
            self.shown |= {name: f"{x:.4g}" for name, x in values.items() if x is not None}

    def validated(self, iteration: int, scores: dict[str, float]) -> None:
        self.shown["val"] = f"{scores['psnr_db']:.3f} dB"
        self.say(
            f"iteration {iteration}: validation {scores['psnr_db']:.3f} dB, center frame alone "
            f"{scores['center_only_psnr_db']:.3f}, bicubic {scores['bicubic_psnr_db']:.3f}"
        )

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _panel(self) -> Panel:
        grid = Table.grid(padding=(0, 2))
        for name, value in self.shown.items():
            grid.add_row(name.replace("_", " "), value)
        grid.add_row("curve", sparkline(self.losses))
        grid.add_row("", ProgressBar(self.total, self.iteration, width=CURVE))
        return Panel(grid, title=f"iteration {self.iteration} of {self.total}", expand=False)


def sparkline(values: list[float]) -> str:
    """A line of text whose heights follow the values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    top = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((value - low) * top)] for value in values)


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
