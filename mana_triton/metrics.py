"""PSNR and SSIM of one frame, as the super-resolution literature computes them (BasicSR).

    PSNR = 10 log10(255^2 / mean((a - b)^2))                                      in dB
    SSIM = mean of (2 ma mb + C1) (2 sab + C2) / ((ma^2 + mb^2 + C1) (sa^2 + sb^2 + C2))

ma, sa^2 and sab are means, variances and covariance under an 11x11 Gaussian of standard deviation
1.5, taken only where that window lies inside the frame; C1 = (.01 * 255)^2, C2 = (.03 * 255)^2.
RGB values are averaged over the channels; with y_channel both are computed on luma alone.
"""

from typing import cast

import numpy as np

PEAK = 255
SSIM_WINDOW = 11


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
