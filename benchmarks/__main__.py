"""The command: `python -m benchmarks`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks._probe import Order, Setup
from benchmarks._report import Result, find_disagreement, machine, table, targets
from benchmarks._ways import LIMIT, WAYS

QUICK = Setup(batch=2, tokens=16, heads=4, d_model=64, vocab=101, context=32)
QUICK_WAYS = ("filter-stop", "capture-stop", LIMIT)

# With glibc's own, moving threshold, freed memory stays with the process or does not, as chance
# has it, and peaks of one and the same computation differ by a tenth. With a fixed one what is
# freed is returned at once, and the resident memory is what is alive.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ProbeError(RuntimeError):
    """A process that measures has failed."""


def probe(order: Order) -> dict[str, Any]:
    """Have an order done in a fresh process.

    Raises:
        ProbeError: The process failed; its last words are the message.

    """
    threads = str(order.setup.threads)
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._probe", order.dumps()],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | offline | ({} if order.timed else EXACT),
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
    """Measure the memory of each way in a process of its own."""

    def measure(way: str) -> Result:
        _say(f"memory of {way}")
        return Result(way, **probe(Order(setup, (way,))))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(measure, ways))


def measure_time(setup: Setup, results: Sequence[Result], *, rounds: int, repeats: int) -> None:
    """Time all ways that fit, round by round, and add the times to the results."""
    fitting = {result.way: result for result in results if not result.does_not_fit}
    order = Order(setup, tuple(fitting), timed=True, repeats=repeats)
    for number in range(rounds):
        _say(f"time, round {number + 1} of {rounds}")
        answer = probe(replace(order, shuffle_seed=number))
        if "does_not_fit" in answer:
            raise ProbeError("the ways fit into memory one by one, but their timing did not")
        for way, seconds in answer["seconds"].items():
            fitting[way].seconds.extend(seconds)


def main(
    *,
    case: Annotated[
        list[str] | None, typer.Option(help=f"A way to measure; repeatable. {', '.join(WAYS)}.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only see that it works: tiny, whatever sizes are given."),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = Setup.batch,
    tokens: Annotated[
        int, typer.Option(min=8, max=Setup.context, help="Tokens a sequence.")
    ] = Setup.tokens,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes to time in.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over all ways in each.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = Setup.threads,
    device: Annotated[str, typer.Option(help="Device of the model, such as cuda.")] = Setup.device,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write all that was measured.")
    ] = None,
) -> None:
    """Measure what it costs to get one resid_post of a model like GPT-2 small.

    Each way's extra peak memory is measured in a process of its own, its time relative to a bare
    forward that is stopped where capture(stop=True) ends it. See benchmarks/README.md.
    """
    setup = Setup(batch=batch, tokens=tokens)
    if quick:
        setup, rounds, repeats = QUICK, 1, 2
    setup = replace(setup, threads=threads, device=device)
    ways = _chosen(case or (QUICK_WAYS if quick else WAYS))
    load = _load()
    results = measure_memory(setup, ways, processes=threads if quick else 1)
    if results[ways.index(LIMIT)].does_not_fit:
        sys.exit(f"not even {LIMIT} fits into the memory of this machine")
    disagreement = find_disagreement(results)
    if disagreement:
        sys.exit(f"nothing was timed: {disagreement}")
    measure_time(setup, results, rounds=rounds, repeats=repeats)
    _print(setup, results, passes=rounds * repeats)
    if not quick:
        print("\n".join(targets(results)))
    if json_file:
        found = {
            "machine": machine(),
            "load": [load, _load()],
            "setup": asdict(setup),
            "results": [asdict(result) for result in results],
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _chosen(cases: Iterable[str]) -> list[str]:
    """Put the ways that are asked for in the order of the table; the limit is always among them."""
    asked = {*cases, LIMIT}
    unknown = asked - set(WAYS)
    if unknown:
        raise typer.BadParameter(
            f"there is no way {', '.join(sorted(unknown))}; choose from {', '.join(WAYS)}",
            param_hint="--case",
        )
    return [way for way in WAYS if way in asked]


def _print(setup: Setup, results: list[Result], *, passes: int) -> None:
    print(
        f"batch {setup.batch} x {setup.tokens} tokens, {setup.device}, {setup.threads} threads, "
        f"{passes} passes\n"
    )
    print(table(results), end="\n\n")
    if all(result.peak_bytes is None for result in results):
        print("Memory was not measured: this system has no /proc/self/clear_refs to reset peaks.")
    print(", ".join(f"{what} {found}" for what, found in machine().items()))


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
