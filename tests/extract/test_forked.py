"""Data sets in processes that were forked."""

import os
import subprocess
import sys

import pytest
from extracted import TESTS
from stored import RESID, write
from torch.utils.data import DataLoader

from actctx import OptionError
from actctx.dataset import ActivationDataset

pytestmark = pytest.mark.usefixtures("unchecked")


# Processes that were forked.

FORKED = f"""
import os, sys, warnings
sys.path.insert(0, {TESTS!r})
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from models import Mlp, tokens
from torch.utils.data import DataLoader
from actctx import OptionError
from actctx.dataset import ActivationDataset
from actctx.extract import extract

folder, used = sys.argv[1], sys.argv[2] == "used"
data = ActivationDataset(folder + "/a.lance") if used else None

def tries():
    yield lambda: extract(Mlp(), tokens(), "block", folder + "/b.lance", mask=None, progress=False)
    yield lambda: ActivationDataset(folder + "/a.lance")
    if used:
        yield lambda: data[0]
        yield lambda: next(iter(data.loader(4)))

child = os.fork()
if child:
    os.waitpid(child, 0)
    sys.exit()
for each in tries():
    try:
        each()
        print("done", flush=True)
    except OptionError as error:
        print(error, flush=True)
os._exit(0)
"""


def in_a_forked_process(folder, used):
    write(folder / "a.lance", 16)
    run = [sys.executable, "-c", FORKED, str(folder), used]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_was_forked_after_a_data_set_was_used_uses_none(tmp_path):
    anew = (
        "data sets cannot be used in a process that was forked from one that has used them, since "
        "Lance's threads do not survive a fork; start it another way, such as "
        "multiprocessing.get_context('spawn')"
    )
    opened = (
        f"'{tmp_path / 'a.lance'}' cannot be read in a process that was forked, since Lance's "
        "threads do not survive a fork; start workers another way: DataLoader(..., "
        "multiprocessing_context='spawn')"
    )
    assert in_a_forked_process(tmp_path, "used") == [anew, anew, opened, opened]
    assert not (tmp_path / "b.lance").exists()


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_was_forked_before_uses_them(tmp_path):
    assert in_a_forked_process(tmp_path, "unused") == ["done", "done"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", 100)


@pytest.fixture
def data(path):
    return ActivationDataset(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:lance is not fork-safe")
def test_forked_workers_of_a_dataloader_say_how_to_start_them(path):
    loader = DataLoader(
        ActivationDataset(path, sites=RESID), num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(OptionError, match="multiprocessing_context='spawn'"):
        next(iter(loader))
