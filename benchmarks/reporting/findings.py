"""All results, stored in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measuring.machine import load, machine
from benchmarks.reporting.report import Result
from benchmarks.ways.models import Setup
from benchmarks.ways.way import USUAL, Table

Found = dict[str, Any]


class FindingsError(ValueError):
    """The requested measurements do not fit into the file of earlier ones."""


class Findings:
    """All results, written to a file as they come, next to those already in the file.

    Args:
        path: The file; nothing is stored without it.
        quick: Whether the run is a quick one, whose results must not be mixed with others.
        device: The device.

    Attributes:
        tables: By their names.

    Raises:
        FindingsError: The file is not one of findings, or it is of quick runs and this one is not,
            or the other way round.

    """

    def __init__(self, path: Path | None, *, quick: bool = False, device: str = "cpu") -> None:
        self._path, self._quick, self._device = path, quick, device
        self._load = load()  # later, this run is most of the load
        self.tables: dict[str, Found] = _read(path) if path else {}
        if any(found.get("quick", False) != quick for found in self.tables.values()):
            kept = "a whole run" if quick else "a quick run"
            raise FindingsError(f"{path} has the figures of {kept}; give another file")
        machine(device)  # the commit that this run started from

    def check(self, table: Table, setup: Setup) -> None:
        """Check that new results can be stored next to those of the same table in the file.

        Raises:
            FindingsError: The file has the table with another setup.

        """
        if table.name not in self.tables:
            return
        kept, now = asdict(USUAL) | self.tables[table.name]["setup"], asdict(setup)
        other = [f"{what} {kept[what]}, now {now[what]}" for what in now if kept[what] != now[what]]
        if other:
            raise FindingsError(
                f"{self._path} has the table {table.name} of another setup ({'; '.join(other)}); "
                "give another file, or take the table out of it"
            )

    def put(self, name: str, found: Found) -> None:
        """Store new results, with machine and time, in place of earlier ones."""
        where = {"machine": machine(self._device), "load": self._load}
        if self._path:
            self.tables = _read(self._path)  # another environment may have written meanwhile
        self.tables[name] = found | where | ({"quick": True} if self._quick else {})
        if self._path:
            beside = self._path.with_name(f"{self._path.name}.new")
            beside.write_text(json.dumps(self.tables, indent=1) + "\n")
            beside.replace(self._path)

    def put_results(self, table: Table, setup: Setup, results: Sequence[Result]) -> list[str]:
        """Store the results of ways, next to those of the table's other ways.

        An earlier result is kept if it has times and the new one has none yet, or if the new one
        failed. The machine and date of earlier results are stored under `earlier`, by way.

        Returns:
            The ways whose earlier results are kept although there are new ones.

        """
        before = self.tables.get(table.name, {"results": []})
        earlier = {each["way"]: each for each in before["results"]}
        last = {what: before[what] for what in ("machine", "load") if what in before}
        where = dict.fromkeys(earlier, last) | before.get("earlier", {})
        new = {each.way: asdict(each) for each in results}
        stay = [way for way in new if way in earlier and _is_less(new[way], earlier[way])]
        merged = earlier | {way: new[way] for way in new if way not in stay}
        ways = [way.name for way in table.ways if way.name in merged]
        gone = [way for way in merged if way not in ways]  # of other versions of the table
        if gone:
            print(f"{table.name} has no ways {', '.join(gone)} any more: they are taken out\n")
        found = {"setup": asdict(setup), "results": [merged[way] for way in ways]}
        kept = {way: where[way] for way in ways if merged[way] is earlier.get(way)}
        self.put(table.name, found | ({"earlier": kept} if kept else {}))
        return stay


def _is_less(new: Found, earlier: Found) -> bool:
    """Return whether a result contains less than an earlier one."""
    if new["failed"]:
        return not earlier["failed"]
    return bool(earlier["seconds"]) and not new["seconds"] and not new["does_not_fit"]


def _read(path: Path) -> dict[str, Found]:
    if not path.parent.is_dir():
        raise FindingsError(f"there is no folder {path.parent}; create it first")
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise FindingsError(f"{path} is not a file of findings; give another one")
    return found
