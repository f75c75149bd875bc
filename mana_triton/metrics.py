"""How close a frame comes to its original, as the super-resolution literature measures it.

    PSNR = 10 log10(255^2 / mean((a - b)^2))                                      in dB
    SSIM = mean of (2 ma mb + C1) (2 sab + C2) / ((ma^2 + mb^2 + C1) (sa^2 + sb^2 + C2))

ma, sa^2 and sab are means, variances and covariance under an 11x11 Gaussian of standard deviation
1.5, taken only where that window lies inside the frame; C1 = (.01 * 255)^2, C2 = (.03 * 255)^2.
RGB values are averaged over the channels; with y_channel both are computed on luma alone: all as
BasicSR does. LPIPS is the distance that the `lpips` package defines, in AlexNet's features. tOF is
the mean distance between the optical flow of two originals and that of their enlargements.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

PEAK = 255
SSIM_WINDOW = 11
LPIPS_SMALLEST = 31  # pixels a side that AlexNet's two poolings need
FLOW_SMALLEST = 64  # pixels a side: the pyramid of the half-size frames needs some
# what torchvision's fake implementations attach to, even where its library cannot be loaded
NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class BackboneError(ValueError):
    """A file that does not hold AlexNet's features."""


class LPIPSUnavailable(Exception):
    """Its package or AlexNet's weights are out of reach; the message says how to get them."""


def rgb_to_y(rgb: np.ndarray) -> np.ndarray:
    """Luma of BT.601, limited range, not rounded.

    Args:
        rgb: [..., 3] uint8.

    Returns:
        [...] float64, 16 for black to 235 for white.
    """
    if rgb.dtype != np.uint8 or rgb.ndim < 1 or rgb.shape[-1] != 3:
        raise ValueError(
            f"rgb must be uint8 [..., 3], got {_kind(rgb)}; round and clip to 0..255 first"
        )
    return rgb @ (np.array([65.481, 128.553, 24.966]) / PEAK) + 16


def psnr(a: np.ndarray, b: np.ndarray, *, y_channel: bool = False, crop_border: int = 0) -> float:
    """Peak signal-to-noise ratio of two frames in dB; inf if they are identical.

    Args:
        a, b: [H, W, 3] uint8 RGB.
        y_channel: compare luma only.
        crop_border: pixels to leave out on each side.
    """
    a, b = _comparable(a, b, y_channel, crop_border, smallest=1)
    mse = np.mean((a - b) ** 2)
    return float(10 * np.log10(PEAK**2 / mse)) if mse else float("inf")


def ssim(a: np.ndarray, b: np.ndarray, *, y_channel: bool = False, crop_border: int = 0) -> float:
    """Structural similarity of two frames, at most 1; they need 11 pixels a side after cropping.

    Args:
        a, b: [H, W, 3] uint8 RGB.
        y_channel: compare luma only.
        crop_border: pixels to leave out on each side.
    """
    # slow to import, and only an evaluation needs it
    from skimage.metrics import structural_similarity

    a, b = _comparable(a, b, y_channel, crop_border, smallest=SSIM_WINDOW)
    value = structural_similarity(
        a,
        b,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=PEAK,
        channel_axis=None if y_channel else -1,
    )
    return float(cast("float", value))  # not a tuple: no map or gradient was asked for


class LPIPS:
    """Learned perceptual distance of two frames, version 0.1 on AlexNet; 0 for identical frames.

    Args:
        backbone: a .safetensors file of the features.* tensors of torchvision's AlexNet. None is
            the file that torchvision keeps in torch's hub folder, fetched (233 MB) if it must be.

    Raises:
        LPIPSUnavailable: the package is not installed, or None was given and the file is not
            there and cannot be fetched.
        BackboneError: backbone is not such a file.
    """

    def __init__(self, backbone: Path | None = None):
        _declare_torchvision_operators()
        try:
            import lpips  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise LPIPSUnavailable(
                f"LPIPS needs the package lpips ({error}); run: pip install lpips"
            ) from error

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated")
            warnings.filterwarnings("ignore", "Arguments other than a weight enum")
            self.net = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        state = _fetched_alexnet() if backbone is None else _read_alexnet(backbone)
        for part in self.net.net.children():
            for index, layer in part.named_children():
                for name, parameter in layer.named_parameters():
                    _fill(parameter, state, f"features.{index}.{name}", backbone)

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray, *, crop_border: int = 0) -> float:
        """The distance of two frames.

        Args:
            a, b: [H, W, 3] uint8 RGB.
            crop_border: pixels to leave out on each side.
        """
        pair = _comparable(a, b, False, crop_border, smallest=LPIPS_SMALLEST)
        a_unit, b_unit = (
            rearrange(torch.from_numpy(x).float(), "h w c -> 1 c h w") / (PEAK / 2) - 1
            for x in pair
        )
        return float(self.net(a_unit, b_unit))


def _declare_torchvision_operators() -> None:
    """Let torchvision be imported where its compiled library does not fit this build of torch.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its library does not load, and
    its import stops at two operators that nothing declared. AlexNet needs neither.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return  # importing it will say so
    library = next(Path(spec.origin).parent.glob("_C.*"), None)
    if library is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", NMS)


def _fetched_alexnet() -> dict[str, Tensor]:
    from torchvision.models import AlexNet_Weights  # pyright: ignore[reportMissingImports]

    url = AlexNet_Weights.IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(
            url, progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise LPIPSUnavailable(
            f"LPIPS needs AlexNet's weights, and fetching them failed ({error}); "
            f"put {url} into {folder}, or pass --lpips-backbone FILE.safetensors"
        ) from error


def _read_alexnet(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"the LPIPS backbone must be a readable .safetensors file, got {path} ({error})"
        ) from error


@torch.no_grad()
def _fill(parameter: Tensor, state: dict[str, Tensor], name: str, source: Path | None) -> None:
    if name not in state or state[name].shape != parameter.shape:
        got = list(state[name].shape) if name in state else "no such tensor"
        raise BackboneError(
            f"{source} must hold torchvision's AlexNet, {name} {list(parameter.shape)}, got {got}"
        )
    parameter.copy_(state[name])


def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Optical flow from one frame to the next by iterative Lucas-Kanade, at half the resolution.

    Args:
        a, b: [H, W, 3] uint8 RGB.

    Returns:
        [2, H // 2, W // 2] float32: (dy, dx) in pixels of the whole resolution.
    """
    # slow to import, and only an evaluation needs it
    from skimage.registration import optical_flow_ilk

    a, b = (_half_luma(x) for x in _comparable(a, b, True, 0, smallest=FLOW_SMALLEST))
    return 2 * optical_flow_ilk(a, b, dtype=np.float32)


def _half_luma(y: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels in [0, 1]: [H // 2, W // 2] float32."""
    height, width = (n // 2 * 2 for n in y.shape)
    blocks = rearrange(y[:height, :width], "(h i) (w j) -> h w (i j)", i=2, j=2)
    return (blocks.mean(axis=-1) / PEAK).astype(np.float32)


def tof(enlarged: np.ndarray, originals: np.ndarray) -> float:
    """Temporal consistency: mean distance in pixels between two flows from `flow`, 0 if equal.

    Args:
        enlarged, originals: [2, h, w], the flow between two enlarged frames and between their
            originals.
    """
    return float(np.linalg.norm(enlarged - originals, axis=0).mean())


def _comparable(
    a: np.ndarray, b: np.ndarray, y_channel: bool, crop_border: int, smallest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both frames as float64, [H, W] luma or [H, W, 3], without the border."""
    for name, x in ("a", a), ("b", b):
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3:
            raise ValueError(
                f"{name} must be one frame, uint8 [H, W, 3], got {_kind(x)}; "
                "pass frames one at a time, rounded and clipped to 0..255"
            )
    if a.shape != b.shape:
        raise ValueError(
            f"a and b must have the same size, got {_kind(a)} and {_kind(b)}; "
            "crop or enlarge one of them first"
        )
    if crop_border < 0 or min(a.shape[:2]) - 2 * crop_border < smallest:
        raise ValueError(
            f"at least {smallest}x{smallest} pixels must remain after cropping, "
            f"got {_kind(a)} and {crop_border=}; crop less"
        )
    inside = slice(crop_border, -crop_border or None)
    a, b = a[inside, inside], b[inside, inside]
    return (rgb_to_y(a), rgb_to_y(b)) if y_channel else (a.astype(float), b.astype(float))


def _kind(x: np.ndarray) -> str:
    return f"{x.dtype} {list(x.shape)}"
