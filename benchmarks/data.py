"""Speed of the stream over prepared records.

Command:  python -m benchmarks.data [--steps=N]
Last line: JSON with the rates of preparing and of reading.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from allattn.data import Stream, prepare


def measure(
    folder: Path, steps: int, batch: int, block: int, megabytes: int
) -> dict[str, float | int | str]:
    """Prepare random text in `folder` and read `steps` blocks of it in order.

    Returns:
      Rates in million tokens a second, and what was measured.
    """
    rng = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    for split, size in (("train", megabytes * 1_000_000), ("valid", 100_000), ("test", 100_000)):
        (texts / f"{split}.txt").write_bytes(rng.integers(97, 123, size, np.uint8).tobytes())

    # Prepare, then read.
    begin = time.perf_counter()
    tokens = prepare("files", data_dir=texts).tokens("train")
    prepared = time.perf_counter()
    stream = Stream(tokens, batch, block)
    read = sum(stream.block(step).inputs_BT.size for step in range(steps))
    seconds = time.perf_counter() - prepared
    return {
        "stream_mtokens_per_s": round(read / seconds / 1e6, 1),
        "prepare_mtokens_per_s": round(len(tokens) / (prepared - begin) / 1e6, 1),
        "batch": batch,
        "block": block,
        "steps": steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--megabytes", type=int, default=90)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALLATTN_DATA_DIR"] = folder
        result = measure(Path(folder), flags.steps, flags.batch, flags.block, flags.megabytes)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
