"""Files of data sets that were damaged at random: no crash, and no error but actctx's own.

The night run takes `ACTCTX_FORGED_SECONDS` for each of its two tests, by default two minutes.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stored import RESID, Z, heads, lance, resid, write

from actctx import DataError
from actctx.dataset import ActivationDataset

pytestmark = pytest.mark.thorough

SECONDS = float(os.environ.get("ACTCTX_FORGED_SECONDS", "120"))
ROWS = 40


def run(directory, *, first, cases, seconds):
    """Read damaged data sets in a process of its own; return the cases that were tried."""
    script = Path(__file__).parents[1] / "flipped.py"
    command = [sys.executable, "-X", "faulthandler", script, directory]
    numbers = [str(first), str(cases), str(int(seconds))]
    done = subprocess.run([*command, *numbers], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("done\n"), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.count("seed ")


def test_damaged_files_are_said(tmp_path):
    assert run(tmp_path, first=0, cases=30, seconds=60) >= 1


@pytest.mark.slow
def test_files_that_are_damaged_all_night_are_said(tmp_path):
    first = random.SystemRandom().randrange(2**40)  # others each night; a failure tells its seed
    assert run(tmp_path, first=first, cases=10**9, seconds=SECONDS) >= 1


NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 6, 2**31 - 1, 2**31, 2**32, 2**63, 2**70])
TEXTS = st.sampled_from(
    ["", "token", "text", RESID, Z, "float16", "float32", "bfloat16", "int8", "\x1b[2J", "\ud800"]
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@st.composite
def forged(draw, found):
    """Change some places of an object of JSON."""
    found = json.loads(json.dumps(found))
    for _ in range(draw(st.integers(1, 3))):
        place = found
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = draw(st.sampled_from([*keys, "more" if isinstance(place, dict) else None]))
            deeper = key in keys and isinstance(place[key], dict | list) and place[key]
            if not deeper or draw(st.booleans()):
                break
            place = place[key]
        change = draw(st.sampled_from(["put", "drop", "double"]))
        if key is None or (change == "double" and isinstance(place, list) and place):
            place.append(draw(st.sampled_from(place)) if place else draw(VALUES))
        elif change == "drop" and key in keys:
            del place[key]
        else:
            place[key] = draw(VALUES)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", ROWS)


@pytest.fixture(scope="module")
def metadata(path):
    return json.loads(lance.dataset(path).schema.metadata[b"actctx"])


def read_forged(path, metadata):
    """Read a data set with other metadata: what is there, to the bit, or an error of ours."""
    lance.dataset(path).update_schema_metadata({"actctx": json.dumps(metadata)})
    try:
        data = ActivationDataset(path)
        rows = data[:]
    except DataError:
        return
    truth = {RESID: resid(torch.arange(ROWS)), Z: heads(torch.arange(ROWS))}
    columns = {name.replace(".", "/"): values for name, values in truth.items()}
    for name, site in data.sites.items():
        wanted = columns[site.column]
        assert rows[name].dtype == wanted.dtype
        assert torch.equal(rows[name].reshape(ROWS, -1), wanted.reshape(ROWS, -1))
    assert repr(data).replace("\n", "").isprintable()
    assert len([*data.loader(16)]) == 3


SETTINGS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=60, derandomize=True, phases=[Phase.generate], **SETTINGS)
@given(drawn=st.data())
def test_forged_metadata_shows_what_is_there_or_is_refused(path, metadata, drawn):
    read_forged(path, drawn.draw(forged(metadata)))


@pytest.mark.slow
def test_metadata_that_is_forged_all_night_shows_what_is_there_or_is_refused(path, metadata):
    end = time.monotonic() + SECONDS

    @settings(max_examples=200, phases=[Phase.generate, Phase.shrink], **SETTINGS)
    @given(drawn=st.data())
    def some(drawn):
        read_forged(path, drawn.draw(forged(metadata)))

    while time.monotonic() < end:
        some()
