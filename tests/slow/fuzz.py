"""Feed damaged files to the readers, writers and the checkpoint loader, in a process of its own.

    python tests/slow/fuzz.py FOLDER FIRST LAST [CASE...]

FOLDER holds intact files. Case n damages file n % count by seed n. "ready" is printed when all is
loaded, before each case its number, and after it "bad <traceback>" unless it ended well or with the
one error that the API promises; "done" at the end. The caller watches for crashes and for silence.
The address space is limited to what is in use at the beginning and 1 GiB.
"""

import resource
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from mana_triton.checkpoint import CheckpointError, load
from mana_triton.video.encoder import EncodeOptions
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import open_reader
from mana_triton.video.writer import open_writer

ROOM = 1 << 30  # bytes a case may take
FRAMES = 30
WEIGHTS = (".safetensors", ".pt")
TARGETS = ("out.mkv", "out.mp4", "out.ts", "out")  # the last a folder of pictures


def damaged(data: bytes, seed: int) -> bytes:
    """One to four of: bytes changed, numbers made extreme, parts lost, doubled or overwritten."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        # half of the damage hits the header, where sizes and counts are
        end = max(1, min(len(out), 1000 if rng.random() < 0.5 else len(out)))
        at, length = int(rng.integers(end)), int(rng.integers(1, 64))
        match rng.integers(7):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                extreme = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000])
                out[at : at + 4] = int(extreme).to_bytes(4, rng.choice(["big", "little"]))
            case 3:
                out[at : at + length] = rng.bytes(length)
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length]
            case 6:
                del out[int(rng.integers(len(out) // 8, len(out) + 1)) :]
        if not out:
            return b""
    return bytes(out)


def attempt(source: Path, target: Path) -> None:
    """Load weights, or read, and write what comes with the pictures."""
    if source.suffix in WEIGHTS:
        load(source)
        return
    with open_reader(source.parent if is_picture(source) else source) as reader:
        fast = (("preset", "ultrafast"),) if target.suffix else ()
        size = 2 * (reader.width // 2 + 1), 2 * (reader.height // 2 + 1)
        if size[0] * size[1] > 2**20:  # large, and allowed: but not worth the time here
            return
        encode = EncodeOptions(options=fast)
        with open_writer(target, reader, *size, encode, overwrite=True) as writer:
            for number, frame in enumerate(reader):
                rgb = np.zeros((size[1], size[0], 3), frame.rgb.dtype)
                rgb[: reader.height, : reader.width] = frame.rgb
                writer.write(rgb, frame)
                if number == FRAMES:
                    break


def is_picture(path: Path) -> bool:
    return path.suffix in (".png", ".jpg", ".tif", ".bmp")


def main() -> None:
    files = sorted(Path(sys.argv[1]).iterdir())
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print("ready", flush=True)
        first, last, *others = map(int, sys.argv[2:])
        for case in (*range(first, last), *others):
            print(case, flush=True)
            file = files[case % len(files)]
            source = folder / "in" / f"in{file.suffix}"
            source.parent.mkdir(exist_ok=True)
            source.write_bytes(damaged(file.read_bytes(), case))
            try:
                attempt(source, folder / TARGETS[case % len(TARGETS)])
            except (MediaError, CheckpointError) as error:
                if "\n" in str(error):
                    print("bad", repr(str(error)), flush=True)
            except BaseException:
                print("bad", repr(traceback.format_exc()), flush=True)
            source.unlink()
        print("done", flush=True)


if __name__ == "__main__":
    main()
