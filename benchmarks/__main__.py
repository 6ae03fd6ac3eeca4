"""The command: `python -m benchmarks`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks._checks import measure_checks
from benchmarks._models import Setup
from benchmarks._plain import LIMIT as PLAIN_LIMIT
from benchmarks._plots import LENGTHS, SERIES, draw
from benchmarks._probe import Order
from benchmarks._report import (
    Result,
    find_disagreement,
    find_regressions,
    gather_rows,
    machine,
    rows,
    targets,
)
from benchmarks._sites import measure_sites, site_rows
from benchmarks._tables import TABLES, WAYS
from benchmarks._ways import Table, Way

QUICK = Setup(batch=2, tokens=128, layers=8, heads=4, d_model=256, vocab=1001, context=128)
MOST_TIMED = 12 * 2**30
PLOTTED = Setup(batch=4, context=2048)
QUICK_CASES = (
    "filter-stop",
    "capture-stop",
    "plain-bridge",
    "plain-hidden",
    "plain-capture-stop",
    "gather",
)

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
    fitting = {result.way: result for result in results if _is_timed(result)}
    order = Order(setup, tuple(fitting), timed=True, repeats=repeats)
    for number in range(rounds):
        _say(f"time, round {number + 1} of {rounds}")
        answer = probe(replace(order, shuffle_seed=number))
        if "does_not_fit" in answer:
            raise ProbeError("the ways fit into memory one by one, but their timing did not")
        for way, seconds in answer["seconds"].items():
            fitting[way].seconds.extend(seconds)


def _is_timed(result: Result) -> bool:
    """Leave out what does not fit, alone or beside the other models."""
    return not result.does_not_fit and (result.peak_bytes or 0) < MOST_TIMED


def main(
    *,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"A table or a way; repeatable. {', '.join([*TABLES, 'sites', *WAYS])}."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Only see that it works, and fits: tiny, whatever sizes are given."
        ),
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=8, max=Setup.context, help="Tokens a sequence.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes to time in.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over all ways in each.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = Setup.threads,
    device: Annotated[str, typer.Option(help="Device of the model, such as cuda.")] = Setup.device,
    plot: Annotated[
        Path | None,
        typer.Option(help="A folder for plots; what they show is measured for them."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write all that was measured.")
    ] = None,
) -> None:
    """Measure what it costs to get activations of a model like GPT-2 small.

    Each way's extra peak memory is measured in a process of its own, its time relative to a bare
    forward that is stopped where capture(stop=True) ends it. See benchmarks/README.md.
    """
    if quick:
        rounds, repeats = 1, 2
    load = _load()
    found: dict[str, Any] = {}
    regressions: list[str] = []
    for table, ways in _chosen(case or (QUICK_CASES if quick else TABLES)):
        setup = replace(QUICK, batch=QUICK.batch * table.factor) if quick else table.setup
        if not quick:
            setup = replace(setup, **_given(batch=batch and batch * table.factor, tokens=tokens))
        setup = replace(setup, threads=threads, device=device)
        results = _compare(setup, ways, processes=threads if quick else 1)
        if table.timed:
            measure_time(setup, results, rounds=rounds, repeats=repeats)
        _print(table, setup, results, passes=rounds * repeats)
        regressions += find_regressions(results) if quick else []
        print("" if quick else "\n".join(targets(results)))
        found[table.name] = {
            "setup": asdict(setup),
            "results": [asdict(result) for result in results],
        }
    if plot:
        lengths = _measure_lengths(replace(PLOTTED, threads=threads, device=device))
        draw(lengths, plot)
        found["lengths"] = {
            length: [asdict(result) for result in results] for length, results in lengths.items()
        }
    if not case or "sites" in case:
        found["sites"] = measure_sites(replace(QUICK, threads=1), rounds=3 if quick else 41)
        print(site_rows(found["sites"]), end="\n\n")
    if not case:
        site, field = measure_checks(replace(QUICK, threads=threads))
        print(f"checks: {site:.1f} us a site and firing, {field:.0f} us a field and block\n")
    print(", ".join(f"{what} {found}" for what, found in machine().items()))
    if json_file:
        head = {"machine": machine(), "load": [load, _load()]}
        json_file.write_text(json.dumps(head | found, indent=1) + "\n")
    if regressions:
        sys.exit("\n".join(regressions))


def _measure_lengths(setup: Setup) -> dict[int, list[Result]]:
    ways = [way for way in TABLES["plain"].ways if way.name in {*SERIES, PLAIN_LIMIT}]
    found = {}
    for length in LENGTHS:
        _say(f"sequences of {length} tokens")
        setup = replace(setup, tokens=length)
        found[length] = _compare(setup, ways, processes=1)
        measure_time(setup, found[length], rounds=1, repeats=max(1, 1024 // length))
    return found


def _given(**options: int | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _compare(setup: Setup, ways: Sequence[Way], *, processes: int) -> list[Result]:
    """Measure the memory of ways, and see that they yield the same activations."""
    results = measure_memory(setup, [way.name for way in ways], processes=processes)
    limits = {way.limit for way in ways}
    for result in results:
        if result.does_not_fit and result.way in limits:
            sys.exit(f"not even {result.way} fits into the memory of this machine")
    disagreement = find_disagreement(results)
    if disagreement:
        sys.exit(f"nothing can be compared: {disagreement}")
    return results


def _chosen(cases: Iterable[str]) -> Iterator[tuple[Table, list[Way]]]:
    """Put the ways that are asked for in the order of their tables, with the limits of them."""
    asked = set(cases)
    unknown = asked - {*TABLES, *WAYS, "sites"}
    if unknown:
        raise typer.BadParameter(
            f"there is no case {', '.join(sorted(unknown))}; choose from "
            f"{', '.join([*TABLES, 'sites', *WAYS])}",
            param_hint="--case",
        )
    for table in TABLES.values():
        ways = [way for way in table.ways if asked & {way.name, table.name}]
        limits = {way.limit for way in ways}
        if ways:
            yield table, [way for way in table.ways if way in ways or way.name in limits]


def _print(table: Table, setup: Setup, results: list[Result], *, passes: int) -> None:
    batch = f"{setup.batch // table.factor} x {setup.tokens} tokens"
    timed = f", {passes} passes" if table.timed else ""
    print(f"{table.title}: {batch}, {setup.device}, {setup.threads} threads{timed}\n")
    print(gather_rows(results) if table.factor > 1 else rows(results), end="\n\n")
    if all(result.peak_bytes is None for result in results):
        print("Memory was not measured: this system has no /proc/self/clear_refs to reset peaks.")


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
