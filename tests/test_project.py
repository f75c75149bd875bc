"""What a newcomer relies on: a quick import, one package, a consistent set of versions, a demo."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace, Interpolation
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mana_triton.metrics import psnr

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo.mp4"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORT = """
import sys, time
import torch

def refuse(*args, **kwargs):
    raise AssertionError("the GPU was queried")

for name in ("is_available", "device_count", "current_device", "get_device_capability",
             "get_device_name", "get_device_properties", "init"):
    setattr(torch.cuda, name, refuse)
before = set(sys.modules)
start = time.process_time()
import mana_triton
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_is_quick_and_touches_neither_triton_nor_the_gpu():
    def run():
        command = [sys.executable, "-c", IMPORT]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        seconds, modules = result.stdout.splitlines()
        return float(seconds), set(modules.split())

    run()  # compiles the bytecode
    seconds, modules = run()
    assert seconds <= 1.5
    assert "mana_triton" in modules
    assert not modules & {"triton", "av", "skimage", "scipy", "lpips", "torchvision", "matplotlib"}


def test_kernels_are_one_package_under_one_name():
    link = ROOT / "mana_triton" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("mana_triton.kernels.reference")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).name == "reference.py"
    # a top-level `kernels` belongs to another project
    assert "kernels" not in PROJECT["tool"]["setuptools"]["packages"]
    owners = importlib.metadata.packages_distributions()
    assert "mana-triton" not in owners.get("kernels", [])


def test_constraints_fit_the_requirements():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
            pins[canonicalize_name(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    for line in PROJECT["project"]["dependencies"] + extras["onnx"]:
        need = Requirement(line)
        assert canonicalize_name(need.name) in pins, f"{need.name} has no pin"
        version = pins[canonicalize_name(need.name)]
        assert need.specifier.contains(version), f"{need} excludes the pin {version}"
    for line in extras["dev"]:
        assert re.fullmatch(r"[\w\[\]-]+==[\d.]+", line), f"{line} is not an exact version"
        need = Requirement(line)  # a version that stands in both files must be the same
        assert need.specifier.contains(pins.get(need.name, str(need.specifier)[2:])), line


def test_constraints_hold_what_the_installed_dependencies_need():
    """Each pin satisfies every other pinned distribution that is installed here."""
    text = (ROOT / "constraints.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    seen = 0
    for name, version in pins.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version.partition("+")[0] != version:
            continue
        for need in map(Requirement, distribution.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                pin = pins.get(canonicalize_name(need.name))
                assert pin is not None, f"{name} needs {need}, which has no pin"
                assert need.specifier.contains(pin), f"{name} needs {need}, the pin is {pin}"
                seen += 1
    if not seen:
        pytest.skip("no pinned version is installed")


def test_no_file_names_a_place_on_someones_machine():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(r"(?<![\w.~-])/(?:home|Users|root|tmp|work)/\w+|\b[A-Z]:\\Users")
    assert place.search("cd /" + "home/me") and not place.search("a/home/me https://x.org/home/y")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_symlink():
            assert not path.readlink().is_absolute(), f"{name} links to an absolute path"
        elif path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                found += [f"{name}: {m[0]}" for m in place.finditer(content.decode())]
    assert not found


def test_demo_plays_and_looks_like_what_was_rendered():
    assert DEMO.stat().st_size <= 400_000
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(str(DEMO)) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height, context.pix_fmt) == (320, 180, "yuv420p")
        assert (context.colorspace, context.color_range) == (Colorspace.ITU709, 1)
        frames = [
            frame.reformat(format="rgb24", interpolation=exact).to_ndarray()
            for frame in container.decode(video=0)
        ]
    with av.open(str(DEMO)) as container:
        sound = np.concatenate([x.to_ndarray() for x in container.decode(audio=0)], axis=1)
    assert len(frames) == 75
    assert abs(sound.shape[1] - 3 * 48000) < 2048
    assert 0.1 < np.abs(sound).max() < 0.9

    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "examples" / "make_demo.py")
    assert spec is not None and spec.loader is not None
    make_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_demo)
    for frame, (name, view, _) in zip(frames[::25], make_demo.SCENES, strict=True):
        picture = getattr(make_demo.skimage.data, name)()
        # read as BT.601, or written so, the reds lose 6 dB
        assert psnr(frame, make_demo.render(picture, view)) > 35
    likeness = [psnr(a, b) for a, b in pairwise(frames)]
    assert [i + 1 for i, value in enumerate(likeness) if value < 12] == [25, 50]  # scene cuts
    assert max(likeness) < 45  # every frame moves
