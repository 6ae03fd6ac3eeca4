"""The peak memory of a capture, measured exactly, each case in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="exact peaks are read from Linux's /proc"
    ),
]

MIB = 2**20
CASE = """
import re, torch
from torch import nn
from actctx import capture

MIB = 2**20
torch.set_num_threads(1)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.next = nn.Identity(), nn.Identity()
    def forward(self, size):
        # `size` MiB of float32, pos 64
        hidden = self.wide(torch.ones(1, 64, size * MIB // 256))
        return self.next(hidden.narrow(1, 0, 1) + 1).sum()

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

model = Wide()
with capture(model, "wide", slice=(slice(None), -1), stop=True):
    model(1)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{body}
print(status("VmHWM") - before)
"""


def _peak(body):
    """Return the bytes above what the process held before."""
    run = subprocess.run(
        [sys.executable, "-c", CASE.format(body=body)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_a_selected_position_costs_no_second_activation():
    body = """
with capture(model, "wide", slice=(slice(None), -1)) as acts:
    for _ in range(8):
        model(64)
assert acts.tensor.shape == (8, 64 * MIB // 256)
"""
    assert _peak(body) < (64 + 8 * 1 + 1 + 6) * MIB


def test_what_is_not_selected_is_freed_when_the_forward_moves_on():
    body = """
kept = []
for _ in range(4):
    with capture(model, "wide", slice=(slice(None), -1), stop=True) as acts:
        model(64)
    kept.append(acts)
"""
    assert _peak(body) < (64 + 4 + 6) * MIB


def test_a_cast_makes_no_copy_in_the_dtype_before():
    body = """
with capture(model, "wide", dtype=torch.float16, stop=True) as acts:
    model(128)
"""
    assert _peak(body) < (128 + 64 + 6) * MIB


def test_joining_takes_the_payload_and_one_forward_more():
    body = """
with capture(model, "wide", stop=True) as acts:
    for _ in range(10):
        model(40)
tensor = acts.tensor
assert tensor.nbytes == 400 * MIB
"""
    assert _peak(body) < (400 + 40 + 8) * MIB


def test_the_measurement_would_notice_a_second_copy():
    body = """
kept = []
handle = model.wide.register_forward_hook(lambda *args: kept.append(args[2].detach().clone()))
for _ in range(10):
    model(40)
tensor = torch.cat(kept)
"""
    assert _peak(body) > (2 * 400 - 8) * MIB


@pytest.mark.parametrize("options", ["", ", capacity=64"])
def test_gathering_64_batches_takes_the_payload_and_one_batch(options):
    # Of a size that the C library keeps for later when it is freed.
    body = f"""
with capture(model, "wide", stop=True{options}) as acts:
    for _ in range(64):
        model(4)
tensor = acts.tensor
assert tensor.nbytes == 256 * MIB
"""
    assert _peak(body) < (256 + 4 + 32) * MIB
