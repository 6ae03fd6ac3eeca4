"""All that was measured, as it is kept in a file."""

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
    """What is to be measured does not go into the file of what was measured before."""


class Findings:
    """All that was measured, kept in a file as it comes, beside what the file has already.

    Args:
        path: The file; nothing is kept without.
        quick: Whether the run is a quick one, whose figures are none to be kept beside others.
        device: What is measured on.

    Attributes:
        tables: By their names.

    Raises:
        FindingsError: The file is none of findings, or is of quick runs where this one is not, or
            the other way about.

    """

    def __init__(self, path: Path | None, *, quick: bool = False, device: str = "cpu") -> None:
        self._path, self._quick, self._device = path, quick, device
        self._load = load()  # later, this run is the most of it
        self.tables: dict[str, Found] = _read(path) if path else {}
        if any(found.get("quick", False) != quick for found in self.tables.values()):
            kept = "a whole run" if quick else "a quick run"
            raise FindingsError(f"{path} has the figures of {kept}; give another file")
        machine(device)  # names the commit that this run started from

    def check(self, table: Table, setup: Setup) -> None:
        """See that what is to be measured can be kept beside what the file has of its table.

        Raises:
            FindingsError: The file has the table of another setup.

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
        """Keep what was found, and where and when, in place of what was found before."""
        where = {"machine": machine(self._device), "load": self._load}
        if self._path:
            self.tables = _read(self._path)  # another environment may have written meanwhile
        self.tables[name] = found | where | ({"quick": True} if self._quick else {})
        if self._path:
            beside = self._path.with_name(f"{self._path.name}.new")
            beside.write_text(json.dumps(self.tables, indent=1) + "\n")
            beside.replace(self._path)

    def put_results(self, table: Table, setup: Setup, results: Sequence[Result]) -> list[str]:
        """Keep the results of ways, beside those of the table's other ways.

        A result stays if it has times, or is one at all, and the new one has none (yet) or failed.
        On what those of other runs were measured is kept under `earlier`, by their ways.

        Returns:
            The ways whose earlier results stay though there are new ones.

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
    """Tell whether a result says less than an earlier one."""
    if new["failed"]:
        return not earlier["failed"]
    return bool(earlier["seconds"]) and not new["seconds"] and not new["does_not_fit"]


def _read(path: Path) -> dict[str, Found]:
    if not path.parent.is_dir():
        raise FindingsError(f"there is no folder {path.parent}; make it first")
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise FindingsError(f"{path} is no file of findings; give another one")
    return found
