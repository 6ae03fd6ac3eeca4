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

from benchmarks._checks import measure_checks
from benchmarks._probe import Order, Setup
from benchmarks._report import (
    MIB,
    Result,
    find_disagreement,
    gather_table,
    machine,
    table,
    targets,
)
from benchmarks._ways import BATCHES, GATHER_LIMIT, GATHER_WAYS, LIMIT, NEURONS, WAYS

QUICK = Setup(batch=2, tokens=16, heads=4, d_model=64, vocab=101, context=32)
QUICK_WAYS = ("filter-stop", "capture-stop", LIMIT, *GATHER_WAYS)
GATHER_TOKENS = 64

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
        list[str] | None,
        typer.Option(help=f"A way to measure; repeatable. {', '.join(WAYS | GATHER_WAYS)}."),
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
    forward that is stopped where capture(stop=True) ends it. The cases that gather many batches
    are measured for memory alone. See benchmarks/README.md.
    """
    setup = Setup(batch=batch, tokens=tokens)
    if quick:
        setup, rounds, repeats = QUICK, 1, 2
    setup = replace(setup, threads=threads, device=device)
    cases = case or (QUICK_WAYS if quick else [*WAYS, *GATHER_WAYS])
    ways, gather_ways = _chosen(cases)
    load, processes = _load(), threads if quick else 1
    results: list[Result] = []
    if ways:
        results = _compare(setup, ways, LIMIT, processes=processes)
        measure_time(setup, results, rounds=rounds, repeats=repeats)
        _print(setup, results, passes=rounds * repeats)
        if not quick:
            print("\n".join(targets(results)))
    gathered: list[Result] = []
    many = replace(setup, batch=setup.batch * BATCHES, tokens=min(setup.tokens, GATHER_TOKENS))
    if gather_ways:
        gathered = _compare(many, gather_ways, GATHER_LIMIT, processes=processes)
        _print_gathered(many, gathered)
    if not case:
        site, field = measure_checks(replace(QUICK, threads=threads))
        print(f"checks: {site:.1f} us a site and firing, {field:.0f} us a field and block\n")
    print(", ".join(f"{what} {found}" for what, found in machine().items()))
    if json_file:
        found = {
            "machine": machine(),
            "load": [load, _load()],
            "setup": asdict(setup),
            "results": [asdict(result) for result in results],
            "gather_setup": asdict(many),
            "gathered": [asdict(result) for result in gathered],
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _compare(setup: Setup, ways: Sequence[str], limit: str, *, processes: int) -> list[Result]:
    """Measure the memory of ways, and see that they all yield one activation."""
    results = measure_memory(setup, ways, processes=processes)
    if results[ways.index(limit)].does_not_fit:
        sys.exit(f"not even {limit} fits into the memory of this machine")
    disagreement = find_disagreement(results)
    if disagreement:
        sys.exit(f"nothing can be compared: {disagreement}")
    return results


def _chosen(cases: Iterable[str]) -> tuple[list[str], list[str]]:
    """Put the ways that are asked for in the order of their table, with the limit of each."""
    asked = set(cases)
    unknown = asked - set(WAYS | GATHER_WAYS)
    if unknown:
        raise typer.BadParameter(
            f"there is no way {', '.join(sorted(unknown))}; choose from "
            f"{', '.join(WAYS | GATHER_WAYS)}",
            param_hint="--case",
        )
    tables = ((WAYS, LIMIT), (GATHER_WAYS, GATHER_LIMIT))
    ways, gathered = (
        [way for way in known if way in asked | {limit}] if asked & set(known) else []
        for known, limit in tables
    )
    return ways, gathered


def _print(setup: Setup, results: list[Result], *, passes: int) -> None:
    print(
        f"batch {setup.batch} x {setup.tokens} tokens, {setup.device}, {setup.threads} threads, "
        f"{passes} passes\n"
    )
    print(table(results), end="\n\n")
    _say_unmeasured(results)


def _print_gathered(setup: Setup, results: list[Result]) -> None:
    payload = max((result.payload_bytes or 0) for result in results) / MIB
    print(
        f"gathering {BATCHES} batches of {NEURONS}: {setup.batch // BATCHES} x {setup.tokens} "
        f"tokens each, {setup.device}, {payload / BATCHES:.1f} MiB a batch, {payload:.0f} MiB in "
        "all\n"
    )
    print(gather_table(results), end="\n\n")
    _say_unmeasured(results)


def _say_unmeasured(results: list[Result]) -> None:
    if all(result.peak_bytes is None for result in results):
        print("Memory was not measured: this system has no /proc/self/clear_refs to reset peaks.")


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
