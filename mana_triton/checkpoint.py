"""Weights files: safetensors with the configuration in the metadata, and the official layout.

A checkpoint of mana_triton is a safetensors file whose metadata holds {"format": "mana_triton/1",
"config": JSON of MANAConfig, ...}; fields that a file lacks take their defaults. A .pt or .pth file
in the official layout is read with torch's weights-only loader, never as a raw pickle, and its
names are mapped to ours.
"""

import json
import pickle
import re
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mana_triton.files import write_atomically
from mana_triton.model import MANA, MANAConfig

FORMAT = "mana_triton/1"
WEIGHTS = Path(__file__).parent / "weights"
WRAPPERS = ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net")
OFFICIAL = {  # nonloc_spatial.* -> ours
    "g": "g", "theta": "theta", "phi": "phi", "W_z": "w_z", "W_z1": "w_z1",
    "norm": "norm", "std": "sigma", "mb": "memory",
}  # fmt: skip
# what torch's weights-only unpickler raises on damaged bytes, in addition to its own error
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ArithmeticError, AssertionError,
    AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class CheckpointError(Exception):
    """A weights file that cannot be used; the message is one line for the user."""


def named_weights() -> list[str]:
    """Names of the shipped weights."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | Path) -> MANA:
    """Load a model, in float32, on the CPU, in evaluation mode.

    Args:
        name_or_path: a shipped name such as "tiny", a .safetensors file written by `save`, or a
            .pt or .pth file in the official layout.

    Raises:
        CheckpointError: no such file, not a checkpoint, or a tensor that does not fit.
    """
    path = Path(name_or_path)
    if str(name_or_path) in named_weights():
        path = WEIGHTS / f"{name_or_path}.safetensors"
    elif not path.is_file():
        shipped = ", ".join(named_weights()) or "none"
        raise CheckpointError(
            f"weights must be a shipped name ({shipped}) or an existing file, got '{name_or_path}'"
        )
    read = _read_safetensors if path.suffix == ".safetensors" else _read_official
    config, state = read(path)
    try:
        model = MANA(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_configuration(path, error) from error
    _check(path, state, model.state_dict())
    model.load_state_dict({name: x.float() for name, x in state.items()})
    return model.eval()


def save(
    model: MANA, path: str | Path, *, dtype: torch.dtype = torch.float32, **metadata: str
) -> None:
    """Write a checkpoint atomically.

    Args:
        model: the model to save.
        path: the .safetensors file.
        dtype: stored type of the weights; float16 halves the file.
        metadata: strings to store with the configuration, such as training results.
    """
    state = {k: x.detach().to("cpu", dtype).contiguous() for k, x in model.state_dict().items()}
    info = {"format": FORMAT, "config": json.dumps(asdict(model.config)), **metadata}
    write_atomically(Path(path), safetensors.torch.save(state, info))


def metadata(path: str | Path) -> dict[str, str]:
    """The strings stored in a safetensors file.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from error


def _read_safetensors(path: Path) -> tuple[MANAConfig, dict[str, Tensor]]:
    info = metadata(path)
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a checkpoint of mana_triton ({FORMAT} in its metadata), "
            f"got format {info.get('format')}"
        )
    try:
        config = MANAConfig(**json.loads(info["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _no_configuration(path, error) from error
    with safetensors.safe_open(path, "pt") as file:
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _no_configuration(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} holds no readable configuration ({_reason(error)})")


def _read_official(path: Path) -> tuple[MANAConfig, dict[str, Tensor]]:
    """The configuration deduced from a file in the official layout, and its weights renamed."""
    try:
        # mapped, because the unused table D can be larger than the memory
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} must be a .safetensors file or a PyTorch file of plain tensors: "
            f"{_reason(error)}"
        ) from error
    state = _map_official(path, _unwrap(path, content))
    first, memory = state["conv_first.weight"], state.get("memory", torch.empty(0, 0))
    if first.ndim != 4 or first.shape[0] % 4:
        raise CheckpointError(
            f"{path}: tensor conv_first.weight must have shape [C, 3, 3, 3], C a multiple of 4, "
            f"got {list(first.shape)}"
        )
    if memory.ndim != 2:
        shape = list(memory.shape)
        raise CheckpointError(f"{path}: tensor memory must have shape [D, N], got {shape}")
    count = {part: _blocks(state, part) for part in ("encoder", "decoder")}
    config = MANAConfig(
        channels=first.shape[0], encoder_blocks=count["encoder"], decoder_blocks=count["decoder"],
        memory_slots=memory.shape[1], gaussian="gate", logit_scale=1.0,
    )  # fmt: skip
    return config, state


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict inside wrappers such as {"state_dict": ...}, without the prefix `module.`."""
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise CheckpointError(
            f"{path} must hold a state dict of tensors, got {type(content).__name__}"
        )
    return {re.sub(r"^(module\.)+", "", name): x for name, x in content.items()}


def _map_official(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    mapped = {}
    for name, x in state.items():
        if name.startswith("nonloc_spatial."):
            _, part, *rest = name.split(".")
            if part == "D":  # a table of distances, [HW, HW]
                continue
            name = ".".join([OFFICIAL.get(part, part), *rest])
        # that network uses only the square of std
        mapped[name] = x.reshape(()).abs() if name == "sigma" and x.numel() == 1 else x
    if "conv_first.weight" not in mapped or "sigma" not in mapped:
        missing = "conv_first.weight" if "conv_first.weight" not in mapped else "nonloc_spatial.std"
        raise CheckpointError(f"{path} is not in MANA's official layout: it has no {missing}")
    return mapped


def _blocks(state: dict[str, Tensor], part: str) -> int:
    """Number of residual blocks of the encoder or decoder."""
    found = (re.match(rf"{part}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def _check(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        if name not in state:
            raise CheckpointError(f"{path} has no tensor {name}, expected {list(x.shape)}")
        if state[name].shape != x.shape:
            raise CheckpointError(
                f"{path}: tensor {name} must have shape {list(x.shape)}, "
                f"got {list(state[name].shape)}"
            )
    for name, x in state.items():
        if name not in expected:
            shape = list(x.shape)
            raise CheckpointError(f"{path} holds {name} {shape}, which this model does not have")
        # the configuration may ask for an infinite sigma
        if not (x.isfinite() | (x == expected[name])).all():
            raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
