"""What a training run writes: its log, its saved states, and how it is asked to stop."""

import json
import signal
from pathlib import Path

import numpy as np
import torch

from mana_triton.checkpoint import UNREADABLE
from mana_triton.files import write_atomically


class TrainingError(ValueError):
    """Training cannot start or go on; the message says what to do about it."""


class Log:
    """OUT/log.jsonl, and event files where TensorBoard is installed.

    Entries after `iteration` are of a part of the run that will be repeated; they are removed.
    """

    def __init__(self, out: Path, iteration: int):
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _is_entry_until(line, iteration)]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(out), purge_step=iteration + 1)

    def add(self, iteration: int, **values: float | None) -> None:
        """One entry; None stands for what cannot be measured."""
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


def write_state(path: Path, state: dict) -> None:
    """Save tensors, complete and on the disk before the file gets its name."""
    write_atomically(path, lambda part: torch.save(state, part))


def read_state(path: Path, settings: dict) -> dict | None:
    """A saved run, None if there is none.

    Raises:
        TrainingError: the file is something else, or its run had other settings.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except UNREADABLE as error:
        raise TrainingError(f"{path} is not a saved run; use another --out") from error
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
    return state


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
