"""Image and video quality metrics, as the super-resolution literature defines them.

    PSNR = 10 log10(255^2 / mean((a - b)^2))                                      in dB
    SSIM = mean of (2 ma mb + C1) (2 sab + C2) / ((ma^2 + mb^2 + C1) (sa^2 + sb^2 + C2))

ma, sa^2 and sab are means, variances and covariance under an 11x11 Gaussian of standard deviation
1.5, only where that window lies inside the frame; C1 = (.01 * 255)^2, C2 = (.03 * 255)^2. RGB
values are averaged over the channels; with y_channel both use luma only, as in BasicSR. LPIPS is
version 0.1 on AlexNet, from the `lpips` package. Two metrics of steadiness compare neighboring
frames: tOF is the mean distance between the optical flow of the originals and that of the enlarged
frames; the warping error is what remains between two enlarged frames after the flow of their
originals is compensated.
"""

import warnings
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

PEAK = 255
SSIM_WINDOW = 11
LPIPS_SMALLEST = 31  # pixels a side that AlexNet's two poolings need
FLOW_SMALLEST = 64  # pixels a side that the pyramid of the half-size frames needs
FLOW_RADIUS = 7  # of the flow that `warping_error` compensates, in pixels
AGREEMENT = 0.03  # of white: where warped originals differ more, the flow is wrong or occluded
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class BackboneError(ValueError):
    """A file that does not hold AlexNet's features."""


class LPIPSUnavailable(Exception):
    """The package or AlexNet's weights cannot be had; the message says how to get them."""


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
    from skimage.metrics import structural_similarity  # slow to import

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
    return float(cast("float", value))  # a tuple only with a map or gradient


class LPIPS:
    """Learned perceptual distance of two frames, version 0.1 on AlexNet; 0 for identical frames.

    Args:
        backbone: a .safetensors file with the features.* tensors of torchvision's AlexNet. None
            takes the file in torch's hub folder, which is downloaded (233 MB) on first use.

    Raises:
        LPIPSUnavailable: the package is not installed, or the weights cannot be downloaded.
        BackboneError: backbone is not such a file.
    """

    def __init__(self, backbone: Path | None = None):
        lpips = _import_lpips()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated")
            warnings.filterwarnings("ignore", "Arguments other than a weight enum")
            self.net = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        state = _download_alexnet() if backbone is None else _read_alexnet(backbone)
        features = self.net.net
        try:  # slice2.3.weight is features.3.weight
            names = {name: f"features.{name.partition('.')[2]}" for name in features.state_dict()}
            features.load_state_dict({name: state[source] for name, source in names.items()})
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise BackboneError(
                f"{backbone or ALEXNET} must hold the features.* of torchvision's AlexNet, "
                f"got: {reason}; pass another --lpips-backbone"
            ) from error

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


def _import_lpips():
    try:
        try:
            import lpips  # pyright: ignore[reportMissingImports]
        except RuntimeError:
            # PyPI's torchvision is a CUDA build: next to a CPU build of torch its library does not
            # load, and its import needs these operators, which AlexNet does not use, to exist
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "() -> ()")
            import lpips  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise LPIPSUnavailable(
            f"LPIPS needs the package lpips ({error}); run: pip install lpips"
        ) from error
    return lpips


def _download_alexnet() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            ALEXNET, progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise LPIPSUnavailable(
            f"LPIPS needs AlexNet's weights, and the download failed ({error}); "
            f"put {ALEXNET} into {folder}, or pass --lpips-backbone FILE.safetensors"
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


def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Optical flow from one frame to the next by iterative Lucas-Kanade, at half the resolution.

    Args:
        a, b: [H, W, 3] uint8 RGB.

    Returns:
        [2, H // 2, W // 2] float32: (dy, dx) in pixels of the full resolution.
    """
    from skimage.registration import optical_flow_ilk  # slow to import

    a, b = (_half_luma(x) for x in _comparable(a, b, True, 0, smallest=FLOW_SMALLEST))
    return 2 * optical_flow_ilk(a, b, dtype=np.float32)


def _half_luma(y: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels in [0, 1]: [H // 2, W // 2] float32."""
    height, width = (n // 2 * 2 for n in y.shape)
    blocks = rearrange(y[:height, :width], "(h i) (w j) -> h w (i j)", i=2, j=2)
    return (blocks.mean(axis=-1) / PEAK).astype(np.float32)


def tof(enlarged: np.ndarray, originals: np.ndarray) -> float:
    """Mean distance in pixels between two flows from `flow`; 0 if they are equal.

    Args:
        enlarged, originals: [2, h, w], the flow between two enlarged frames and between their
            originals.
    """
    return float(np.linalg.norm(enlarged - originals, axis=0).mean())


def warping_error(
    enlarged: tuple[np.ndarray, np.ndarray], originals: tuple[np.ndarray, np.ndarray]
) -> float | None:
    """How much two neighboring enlarged frames differ once the motion is compensated.

    The dense flow from original t+1 to original t (iterative Lucas-Kanade, radius 7) moves frame t
    onto frame t+1. Only pixels count where the moved original agrees with the original within .03
    of white: elsewhere the flow is wrong or the scene is occluded.

    Args:
        enlarged, originals: frames t and t+1, [H, W, 3] uint8 RGB each.

    Returns:
        Mean absolute difference in steps of 8 bits; None if the originals agree nowhere.
    """
    from skimage.registration import optical_flow_ilk  # slow to import
    from skimage.transform import warp

    _comparable(*enlarged, False, 0, smallest=FLOW_SMALLEST)
    before, after = (x.astype(np.float32) / PEAK for x in originals)
    lumas = [x @ np.array([0.299, 0.587, 0.114], np.float32) for x in (after, before)]
    motion = optical_flow_ilk(*lumas, radius=FLOW_RADIUS, dtype=np.float32)
    places = np.indices(lumas[0].shape, dtype=np.float32) + motion

    def moved(frame: np.ndarray) -> np.ndarray:
        return np.stack([warp(x, places, mode="edge") for x in np.moveaxis(frame, -1, 0)], -1)

    agree = np.abs(moved(before) - after).mean(axis=-1) < AGREEMENT
    if not agree.any():
        return None
    first, second = (x.astype(np.float32) for x in enlarged)
    return float(np.abs(moved(first) - second)[agree].mean())


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
