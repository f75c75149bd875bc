"""Write the network for other programs: an ONNX file, or a PyTorch program without our operators.

    python -m mana_triton.export tiny -o model.onnx --size 112x64   # for ONNX Runtime
    python -m mana_triton.export tiny -o model.pt2 --size 112x64    # for torch.export.load

WEIGHTS is a shipped name or a file, --size the WIDTHxHEIGHT of the low-resolution frames. The graph
has one input `frames` [batch, 7, 3, H, W] in [0, 1], float32, with any batch, and one output
`enlarged` [batch, 3, 4H, 4W], not clamped: the center frame, four times larger. Windows at the
ends of a clip are the caller's task: mirrored, see `mana_triton.engine.window`.

Exactness. The attention of `tiled.py` chooses its windows from the data, which a fixed graph
cannot. Here every square of 16 x 16 queries meets the keys within a fixed radius: with
match="cosine" no logit exceeds the learned temperature tau, so all keys beyond the radius together
weigh less than 1e-6 of those within, for any frames (the certificate of `tiled.py` with its largest
spread, 2 tau). With match="dot", whose logits have no bound, and in the gate form the radius covers
the whole frame. Results differ from the model's by rounding only; before the file is written, it
enlarges one window, and the difference is printed.

Memory. The logits of one square, its queries times the keys in the radius times T frames, are held
three times (plain, with the Gaussian, softmax); the command prints how much that is. The decoder
sees the whole frame. Seven frames are encoded for each window; `mana_triton.upscale` encodes each
frame once, and is faster.

The metadata holds the configuration, the SHA-256 of the weights, the scale, the radius and the
version of torch. The last line of stdout is one JSON object. Exit codes: 0 done, 1 failed or
stopped (one line says why), 2 wrong usage.
"""

import argparse
import copy
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from rich.console import Console
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.export import Dim, ExportedProgram

from mana_triton.attention import TOLERANCE
from mana_triton.checkpoint import WEIGHTS, CheckpointError, load, named_weights
from mana_triton.files import content_hash, write_atomically
from mana_triton.kernels.reference import inv_2sigma2
from mana_triton.kernels.strips import certified_radius, log_gaussian_outside
from mana_triton.model import MANA
from mana_triton.resize import SCALE

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
SIDE = 16  # of the squares of queries
LARGEST = 1 << 30  # bytes of a square's logits
ALLOWED = 1e-4  # of [0, 1] by which a frame may differ: a fortieth of a step of 8 bits

console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


class ExportError(Exception):
    """A model cannot be exported; the message is one line for the user."""


class Layout(NamedTuple):
    """How the attention of a graph is divided."""

    radius: int  # pixels around a square of queries within which keys are visited
    nbytes: int  # of a square's logits, for one clip


def layout(model: MANA, height: int, width: int) -> Layout:
    """The division for a frame size.

    Raises:
        ExportError: the logits of a square would take too much memory.
    """
    radius = window_radius(model, max(height, width))
    keys = min(SIDE + 2 * radius, height) * min(SIDE + 2 * radius, width)
    nbytes = 4 * model.config.frames * SIDE**2 * keys
    if nbytes > LARGEST:
        raise ExportError(
            f"the attention must take at most {LARGEST >> 30} GiB at once, this model's visits "
            f"{keys} keys and takes {nbytes / 2**30:.1f} GiB at {width}x{height}; take a smaller "
            "--size, or weights whose configuration has match='cosine' and gaussian='bias'"
        )
    return Layout(radius, nbytes)


def window_radius(model: MANA, longest: int) -> int:
    """Pixels beyond which all keys weigh less than 1e-6 for any frames; at most `longest`."""
    sigma = model.sigma.detach().double()
    if model.config.match != "cosine" or model.config.gaussian != "bias" or sigma.isinf():
        return longest
    # a logit is at most tau, and that of the query's own pixel at least -tau
    spread = 2 * model.temperature.detach().double().abs()
    outside = log_gaussian_outside(inv_2sigma2(sigma).item(), longest)
    return int(certified_radius(spread, outside, TOLERANCE[torch.float32]))


def static_attention(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, gaussian: str, offsets: bool,
    *_: Any, division: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator mana::cross_frame_attention with fixed windows, in PyTorch's own operators.

    Arguments and results are the operator's, for whole frames. Only what the network uses, o and
    the displacement, is computed.
    """
    (b, height, width, d), t, side = q.shape, k.shape[1], SIDE
    near = [min(side + 2 * division.radius, n) for n in (height, width)]  # rows, columns of keys
    tops, lefts = (torch.arange(0, n, side, device=q.device) for n in (height, width))
    down, across = tops.numel(), lefts.numel()
    padded = F.pad(q * scale, (0, 0, 0, across * side - width, 0, down * side - height))
    # clips and frames are one axis: nothing in the loop may depend on the size of the batch
    squares = repeat(padded, "b (Y y) (X x) d -> (Y X) (b t) (y x) d", y=side, x=side, t=t)
    flat_k, flat_v = (rearrange(x.contiguous(), "b t h w d -> (b t) (h w) d") for x in (k, v))
    c = 1 / (2 * sigma.clamp(min=1e-15).square())

    def square(carry: Tensor, x: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One square of queries: o and the displacement; nothing is carried."""
        own, top, left = x  # [B T, side^2, D], [], []
        ys, xs = (
            (start - division.radius).clamp(0, n - m) + torch.arange(m, device=q.device)
            for start, n, m in ((top, height, near[0]), (left, width, near[1]))
        )
        index = (ys[:, None] * width + xs).flatten()
        k_near, v_near = (x.index_select(1, index) for x in (flat_k, flat_v))
        places = torch.arange(side, device=q.device)
        # the Gaussian is a product of two: one for rows, one for columns
        rows, cols = (
            -c * (places[:, None] - z).to(q.dtype).square() for z in (ys - top, xs - left)
        )
        bell = (rows[:, None, :, None] + cols[None, :, None, :]).flatten(2).flatten(0, 1)
        s = torch.bmm(own, k_near.mT)  # [B T, side^2, keys]
        a = (s + bell).softmax(-1) if gaussian == "bias" else s.softmax(-1) * bell.exp()
        o = torch.bmm(a, v_near)
        if offsets:
            of_keys = torch.stack(torch.meshgrid(ys - top, xs - left, indexing="ij"), -1)
            of_own = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)
            of_keys, of_own = (x.flatten(0, 1).to(q.dtype) for x in (of_keys, of_own))
            o = torch.cat([o, a @ of_keys - a.sum(-1, keepdim=True) * of_own], -1)
        return carry.clone(), o

    grid = (x.flatten() for x in torch.meshgrid(tops, lefts, indexing="ij"))
    _, parts = scan(square, q.new_zeros(()), (squares, *grid))
    result = rearrange(
        parts, "(Y X) (b t) (y x) d -> b t (Y y) (X x) d", Y=down, X=across, y=side, x=side, t=t
    )[:, :, :height, :width]
    return (
        result[..., :d].contiguous(), result[..., d:].contiguous() if offsets else q.new_empty(0),
        q.new_full((b, t, height, width), math.nan), q.new_full((), math.nan, dtype=torch.float64),
        q.new_empty(0, dtype=torch.int32),
    )  # fmt: skip


def program(model: MANA, height: int, width: int) -> ExportedProgram:
    """The network for frames [B, T, 3, height, width], any B, in PyTorch's own operators."""
    division = layout(model, height, width)
    model = copy.deepcopy(model).eval().float().cpu()
    frames = torch.zeros(2, model.config.frames, 3, height, width)
    # traces of other sizes would make the sizes of the loop symbolic
    torch.compiler.reset()
    with torch.no_grad():
        exported = torch.export.export(model, (frames,), dynamic_shapes=({0: Dim("batch", min=1)},))
        operator = torch.ops.mana.cross_frame_attention.default
        replaced = functools.partial(static_attention, division=division)
        return exported.run_decompositions({operator: replaced})


def onnx_bytes(exported: ExportedProgram, about: dict[str, str]) -> bytes:
    """The ONNX file of a program, with `about` as its metadata."""
    import onnx  # pyright: ignore[reportMissingImports]

    made = torch.onnx.export(
        exported, input_names=["frames"], output_names=["enlarged"], opset_version=OPSET,
        dynamo=True, verbose=False,
    )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def program_bytes(exported: ExportedProgram, about: dict[str, str]) -> bytes:
    """The .pt2 file of a program, with `about` as its extra file about.json."""
    buffer = BytesIO()
    torch.export.save(exported, buffer, extra_files={"about.json": json.dumps(about)})
    return buffer.getvalue()


def open_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime on the CPU: frames [B, T, 3, H, W] -> [B, 3, 4H, 4W]."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about unused constants
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["enlarged"], {"frames": x.numpy()})[0])


def open_program(content: bytes) -> Callable[[Tensor], Tensor]:
    """PyTorch, from a .pt2 file: frames [B, T, 3, H, W] -> [B, 3, 4H, 4W]."""
    return torch.no_grad()(torch.export.load(BytesIO(content)).module())


def export(
    model: MANA, height: int, width: int, kind: str, about: dict[str, str]
) -> tuple[bytes, float]:
    """The content of a file, and the largest difference of its result from the model's.

    Args:
        model: the network.
        height, width: of the low-resolution frames.
        kind: of file, ".onnx" or ".pt2".
        about: strings to store in the file in addition to `describe`'s.

    Raises:
        ExportError: see `layout`; a package is missing; the file's result differs too much.
    """
    missing = [name for name in NEEDED if find_spec(name) is None] if kind == ".onnx" else []
    if missing:
        raise ExportError(
            f"ONNX files need {', '.join(NEEDED)}, there is no {' and no '.join(missing)}; "
            f"run pip install {' '.join(missing)}, or write a .pt2 file"
        )
    about = describe(model, height, width) | about
    write, open_file = (onnx_bytes, open_onnx) if kind == ".onnx" else (program_bytes, open_program)
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(1, model.config.frames, 3, height, width, generator=generator)
    model = copy.deepcopy(model).eval().float().cpu()
    with warnings.catch_warnings():
        # of PyTorch's own exporter
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        content = write(program(model, height, width), about)
        enlarged = open_file(content)(frames)
    with torch.no_grad():
        worst = float((enlarged - model(frames)).abs().max())
    if not worst <= ALLOWED:
        raise ExportError(
            f"the file must give the frames of the model within {ALLOWED:g}, it differs by "
            f"{worst:.1e}; please report this with the versions of torch, onnx and onnxruntime"
        )
    return content, worst


def describe(model: MANA, height: int, width: int) -> dict[str, str]:
    """The metadata of a file."""
    return {
        "format": "mana_triton/1",
        "config": json.dumps(asdict(model.config)),
        "scale": str(SCALE),
        "frames": f"[batch, {model.config.frames}, 3, {height}, {width}] float32, RGB in [0, 1]",
        "enlarged": f"[batch, 3, {SCALE * height}, {SCALE * width}] float32, not clamped",
        "radius": str(layout(model, height, width).radius),
        "torch": torch.__version__,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    shipped = ", ".join(named_weights())
    parser.add_argument("weights", metavar="WEIGHTS", help=f"shipped ({shipped}) or a file")
    parser.add_argument("-o", "--output", type=_output, required=True, metavar="OUT",
        help="the file, .onnx or .pt2")  # fmt: skip
    parser.add_argument("--size", type=_size, required=True, metavar="WIDTHxHEIGHT",
        help="of the low-resolution frames, as 112x64")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args(argv)


def _output(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(SUFFIXES)}, got {text!r}")
    return Path(text)


def _size(text: str) -> tuple[int, int]:
    """Height and width."""
    if not re.fullmatch("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT as 112x64, got {text!r}")
    width, height = map(int, text.split("x"))
    return height, width


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file; returns the content of the JSON line."""
    (height, width), output = args.size, args.output
    if output.exists() and not args.overwrite:
        raise ExportError(f"{output} exists; pass --overwrite to replace it")
    if not output.parent.is_dir():
        raise ExportError(f"-o must lie in an existing folder, got {output}")
    model = load(args.weights)
    named = args.weights in named_weights()
    file = WEIGHTS / f"{args.weights}.safetensors" if named else Path(args.weights)
    about = {"weights": args.weights, "weights_sha256": content_hash(file)}
    division = layout(model, height, width)
    console.print(
        f"keys within {division.radius} pixels, 3 times {division.nbytes / 2**20:.0f} MiB of "
        "logits at once for each clip of a batch"
    )
    content, worst = export(model, height, width, output.suffix, about)
    write_atomically(output, content)
    size = f"{len(content) / 2**20:.1f} MiB"
    console.print(f"{output}: {size}, within {worst:.1e} of the model's frames", markup=False)
    return {
        "output": str(output), "bytes": len(content),
        "opset": OPSET if output.suffix == ".onnx" else None,
        "input": ["batch", model.config.frames, 3, height, width],
        "output_shape": ["batch", 3, SCALE * height, SCALE * width],
        "radius": division.radius, "square_mib": round(division.nbytes / 2**20, 1),
        "largest_difference": worst, **about,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    args = parse_args()
    try:
        summary = run(args)
    except (ExportError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except MemoryError:
        sys.exit("error: the memory is too small for this frame size; take a smaller --size")
    except KeyboardInterrupt:
        sys.exit("error: stopped")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
