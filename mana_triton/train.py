"""Train MANA on videos, folders of frames, Vimeo-90K or still pictures.

    python -m mana_triton.train --data VIDEOS --stills PICTURES --val CLIPS --out runs/tiny
    torchrun --nproc-per-node N -m mana_triton.train ...

Three stages, as in the paper: everything but the memory branch (L1), the memory alone (distance of
its output to the queries), everything (L1). The moving average of the weights is rounded to
float16, validated, and exported to OUT/best.safetensors. The same command continues from
OUT/last.pt and OUT/optimizer-N.pt, with the same result as a run that was never interrupted.
OUT/log.jsonl holds the measurements.

With torchrun every batch is split among N processes, one for each GPU; a run may be continued with
another number of them.
"""

import json
import sys

import torch

from mana_triton.checkpoint import CheckpointError
from mana_triton.training.clips import DataError
from mana_triton.training.options import TrainingOptions, parse_options
from mana_triton.training.progress import TrainingError
from mana_triton.training.trainer import Trainer


def options_of(argv: list[str] | None = None) -> TrainingOptions:
    """The flags; wrong usage exits with code 2."""
    return parse_options(TrainingOptions, "python -m mana_triton.train", __doc__, argv)


def main() -> None:
    """Command line."""
    options = options_of()
    try:
        summary = Trainer(options).run()
    except (DataError, TrainingError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is too small; lower --batch or --crop")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to continue from the last saved state")
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
