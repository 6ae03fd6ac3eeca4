"""Measure ways, each case in a new process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring.devices import meter_of
from benchmarks.measuring.probe import Order
from benchmarks.reporting.report import Result
from benchmarks.ways.models import Setup
from benchmarks.ways.tables import WAYS

# With glibc's dynamic threshold, it is random whether freed memory stays with the process, and
# peaks of the same computation differ by a tenth. With a fixed threshold, freed memory is returned
# at once, and the resident memory is the memory in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ProbeError(RuntimeError):
    """A process that measures has failed."""


def probe(order: Order) -> dict[str, Any]:
    """Run an order in a new process.

    Raises:
        ProbeError: The process failed; the message is the end of its output.

    """
    threads = str(order.setup.threads)
    fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    offline = {} if order.setup.model else {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measuring.probe", order.dumps()],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | fixed | offline | ({} if order.timed else EXACT),
        text=True,
    )
    if done.returncode:
        raise ProbeError(
            f"measuring {', '.join(order.ways)} failed with exit status {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure_memory(setup: Setup, ways: Sequence[str], *, processes: int) -> list[Result]:
    """Measure the memory of each way in its own process, several at once.

    They share the machine's memory; a way that does not fit into its share is measured alone.
    """

    def measure(way: str, share: int) -> Result:
        say(f"memory of {way}")
        try:
            return Result(way, **probe(Order(setup, (way,), share=share)))
        except ProbeError as error:
            say(str(error))
            return Result(way, failed=str(error))

    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(partial(measure, share=processes), ways))
    if processes == 1:
        return results
    return [measure(each.way, 1) if each.does_not_fit else each for each in results]


def measure_time(setup: Setup, results: Sequence[Result], *, rounds: int, repeats: int) -> None:
    """Time all ways that fit, round by round, and add the times to the results.

    Raises:
        ProbeError: A process failed; earlier times are in the results.

    """
    fitting = {each.way: each for each in results if not each.does_not_fit and not each.failed}
    room = (meter_of(setup.device).capacity() or 0) / 2
    large = {way for way, each in fitting.items() if room and (each.peak_bytes or 0) > room}
    apart = large | {way for way in fitting if WAYS[way].alone}
    together = [way for way in fitting if way not in apart]
    groups = [each for each in (together, *([way] for way in sorted(apart))) if each]
    for number in range(rounds):
        for group in groups:
            say(f"time, round {number + 1} of {rounds}: {len(group)} ways")
            passes = 1 if large.intersection(group) else repeats
            order = Order(setup, tuple(group), timed=True, repeats=passes, shuffle_seed=number)
            found = probe(order)
            if found.get("does_not_fit"):
                raise ProbeError(f"timing {', '.join(group)} takes more memory than there is")
            for way, seconds in found["seconds"].items():
                fitting[way].seconds.extend(seconds)


def say(what: str) -> None:
    """Report progress, separately from the results."""
    print(what, file=sys.stderr, flush=True)
