"""Read data sets of which bytes were flipped at random; run by itself, so that a crash is seen.

    python tests/flipped.py DIRECTORY FIRST_SEED SECONDS CASES

It prints the seed of each case before it is tried, and ends at the first error that is not actctx's.
"""

import contextlib
import io
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from stored import write

from actctx import ActctxError
from actctx._cli.commands import info
from actctx._store.destination import Target
from actctx.dataset import ActivationDataset

ROWS = 300
TAIL = 1500  # bytes at the end of a file, where Lance says what lies in it


def flip(path, draw):
    """Change some bytes of one file."""
    files = sorted(
        p for p in path.rglob("*") if p.suffix in {".lance", ".manifest"} and p.is_file()
    )
    file = draw.choice(files)
    found = bytearray(file.read_bytes())
    first = max(0, len(found) - TAIL) if draw.random() < 0.7 else 0
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(first, len(found))
        found[at] = draw.choice([0, 127, 128, 255, found[at] ^ 1 << draw.randrange(8)])
    if draw.random() < 0.1:
        del found[draw.randrange(len(found)) :]
    file.write_bytes(found)


def read_all(path):
    """Read a data set in every way that there is."""
    data = ActivationDataset(path)
    if len(data) > 2 * ROWS:  # more than there are bytes for
        return
    yield lambda: data[:]
    yield lambda: data[len(data) - 1]
    yield lambda: [*data.loader(64, pool=128)]
    yield lambda: data.read("text")
    yield lambda: ActivationDataset(path, where="position > 3")[:]
    yield lambda: data.to_saelens(f"{path}.saelens", context=5)
    yield lambda: data.to_safetensors(f"{path}.safetensors")
    yield lambda: repr(data)


def write_on(path):
    """Open a data set as whoever resumes it does."""
    target = Target(path)
    try:
        for _ in target.stored():
            pass
    finally:
        target.release()


def try_all(path):
    for start in (
        lambda: [*read_all(path)],
        lambda: [lambda: info(str(path))],
        lambda: [lambda: write_on(path)],
    ):
        with contextlib.suppress(ActctxError):
            for move in start():
                with contextlib.suppress(ActctxError), contextlib.redirect_stdout(io.StringIO()):
                    move()


def main(directory, first, seconds, cases):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) < 7:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Lance prints its panics
    base = write(directory / "base.lance", ROWS, commits=3)
    end = time.monotonic() + seconds
    for seed in range(first, first + cases):
        if time.monotonic() > end:
            break
        print("seed", seed, flush=True)
        path = directory / f"{seed}.lance"
        shutil.copytree(base, path)
        flip(path, random.Random(seed))
        try:
            try_all(path)
        except BaseException as error:
            import traceback

            print("raw", repr(error)[:300], traceback.format_exc()[-600:], flush=True)
            sys.exit(1) if len(sys.argv) < 6 else None
        for each in directory.glob(f"{seed}.*"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
