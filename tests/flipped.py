"""Read data sets of which bytes were flipped at random, in a process of its own.

    python tests/flipped.py DIRECTORY FIRST_SEED CASES SECONDS

It prints the seed of each case before it tries it, so that a crash has a name, and stops at the
first error that is not actctx's own.
"""

import contextlib
import io
import random
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from stored import lance, pa, write

from actctx import ActctxError
from actctx._cli.commands import info
from actctx._store.destination import Destination
from actctx.dataset import ActivationDataset

ROWS = 300
TAIL = 1500
"""The bytes at the end of a file, where Lance says what lies in it."""


def write_base(path, *, long):
    """Write what is flipped: several files, columns that others added, and rows that are gone."""
    write(path, ROWS, commits=3, width=2000 if long else 0)
    at = np.arange(ROWS)
    others = {
        "u32": pa.array(at, pa.uint32()),
        "holes": pa.array([None if each % 7 == 3 else int(each) for each in at], pa.int32()),
        "floats": pa.array(at / 3),
        "when": pa.array(at, pa.timestamp("us")),
        "words": pa.array([["a"] * (each % 4) for each in at.tolist()]),
        "pairs": pa.array([{"a": each, "b": str(each)} for each in at.tolist()]),
    }
    lance.dataset(path).add_columns(pa.table(others).to_reader())
    lance.dataset(path).delete("position = 5")
    return path


def flip(path, draw):
    """Change some bytes of one file, or cut it off."""
    file = draw.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    found = bytearray(file.read_bytes())
    if not found:
        return
    first = max(0, len(found) - TAIL) if draw.random() < 0.7 else 0
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(first, len(found))
        found[at] = draw.choice([0, 127, 128, 255, found[at] ^ 1 << draw.randrange(8)])
    if draw.random() < 0.1:
        del found[draw.randrange(len(found)) :]
    file.write_bytes(found)


def uses(path):
    """Give what people do with a data set."""
    yield lambda: info(str(path))
    with contextlib.suppress(ActctxError):
        data = ActivationDataset(path)
        if len(data) <= 2 * ROWS:  # it may say that there are more than anybody waits for
            yield lambda: data[:]
            yield lambda: data[len(data) - 1]
            yield lambda: [*data.loader(64, pool=128)]
            yield lambda: data.read("text")
            yield lambda: ActivationDataset(path, where="position > 3 AND label = 1")[:]
            yield lambda: data.to_saelens(f"{path}.saelens", context=5)
            yield lambda: data.to_safetensors(f"{path}.safetensors")
            yield lambda: repr(data)
    yield lambda: resume(path)


def resume(path):
    """Open a data set as whoever writes more to it does, and read what has to be compared."""
    destination = Destination(path)
    try:
        contents = destination.contents
        for _ in contents.origins():
            pass
        contents.tidy()
        contents.record_finished(finished=False)
    finally:
        destination.release()


def use(path):
    for move in uses(path):
        with contextlib.suppress(ActctxError), contextlib.redirect_stdout(io.StringIO()):
            move()


def main(directory, first, cases, seconds):
    """Try cases until there are no more, or no more time; tell whether all ended as they should."""
    warnings.simplefilter("ignore")  # of values that do not fit, which are flipped
    torch.set_num_threads(1)
    bases = [write_base(directory / f"base{k}.lance", long=bool(k)) for k in range(2)]
    end = time.monotonic() + seconds
    for seed in range(first, first + cases):
        if time.monotonic() > end:
            break
        say(f"seed {seed}")
        path = directory / f"{seed}.lance"
        shutil.copytree(bases[seed % 2], path)
        flip(path, random.Random(seed))  # noqa: S311  it keeps no secret
        try:
            use(path)
        except BaseException:  # noqa: BLE001  any of them is what is looked for
            say(traceback.format_exc())
            return 1
        for each in directory.glob(f"{seed}.*"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    say("done")
    return 0


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
