"""Extractions that end early: in this process, and in one that is killed."""

import os
import subprocess
import sys

from extracted import RESID, TESTS, Read, Z, batches
from models import bridge

from actctx.extract import extract

BATCHES = 60


# What is killed: a batch a hundredth of a second, a commit every few of them.
CHILD = f"""
import sys, time
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract
writer._COMMIT_BYTES = 10_000
append = writer.Contents.append

def told(self, batches):
    append(self, batches)
    print("committed", flush=True)

writer.Contents.append = told

def batches():
    print("begun", flush=True)
    for seed in range({BATCHES}):
        time.sleep(0.01)
        yield tokens(5, 7, seed)

extract(bridge(), batches(), {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})
print("ended", flush=True)
"""


def unbroken(path, count=BATCHES, **options):
    extract(bridge(), batches(count), [RESID, Z], path, drop={"position": [0]}, **options)
    return Read(path)


def child(out):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
