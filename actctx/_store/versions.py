"""Find the newest version of a data set on a local disk that is whole.

# NOTE [Power cuts]
A cut of power leaves what was not synced in any state: a manifest that is empty, ends early or
holds zeros, data files that are missing or too short. Lance takes a manifest of zeros for a data
set without rows. So before a version is opened, the frame of its manifest is checked, and the data
files that it lists are looked for. Its digest is compared, if one was noted, since a manifest with
a flipped byte can still be readable and list other rows. The newest version that is whole is read,
unless a later one still has more whole rows, as where somebody deleted a file in the middle.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from actctx._errors import DataError
from actctx._files import reason_of
from actctx._model.known_faults import warn
from actctx._store.digests import digest_file, read_manifest_digests
from actctx._store.libraries import import_lance
from actctx._store.validation import damaged, is_panic, reading

_LARGEST = 2**64 - 1
_FOOTER = struct.Struct("<Q2H4s")
"""How a manifest ends: the place of its message, a format, and what all of Lance's files end in."""
_MAGIC = b"LANC"
_TORN = "its manifest is damaged ({})"
_CHANGED = "its manifest has other bytes than were written"
_OF_TEARING = ("rotobuf", "orrupt", "nvalid format", "file size is too small", "nvalid range")
"""What Lance says of a manifest that is torn."""
_OF_LATER = ("nsupported", "not supported", "pgrade")
"""What it says of one that it is too old for."""


@dataclass(frozen=True)
class Version:
    """A version of a data set.

    Attributes:
        number: Its number.
        file: Its manifest.
        damage: What is wrong with it; empty if it is whole.
        opened: The Lance dataset; None if its manifest cannot be read.
        row_count: The number of rows that can be read, from the first one on.

    """

    number: int
    file: Path
    damage: str = ""
    opened: Any = None
    row_count: int = 0


def manifests(path: Path) -> dict[int, Path]:
    """List the manifests of a data set, of the newest version first."""
    found = {}
    for file in (path / "_versions").glob("*.manifest"):
        if file.stem.isdecimal():  # not of a version that is detached
            number = int(file.stem)
            found[_LARGEST - number if len(file.stem) == len(str(_LARGEST)) else number] = file
    return dict(sorted(found.items(), reverse=True))


def find_version(path: Path, lance: Any) -> tuple[Version | None, list[Version]]:
    """Find the version to read, and what is damaged among those after it.

    Args:
        path: Where the data set is.
        lance: The Lance package.

    Returns:
        The newest version that is whole; or a later one of which more rows are; None where no
        manifest can be read. And those that are damaged and newer than what is whole.

    Raises:
        OSError: A file cannot be read, for another reason than that it is not there.

    """
    torn: list[Version] = []
    noted = read_manifest_digests(path)
    most: Version | None = None
    for number, file in manifests(path).items():
        version = _inspect(path, number, file, lance, digest=noted.get(number))
        if not version.damage:
            if most is not None and most.row_count > version.row_count:
                return most, torn
            return version, torn
        torn.append(version)
        if version.opened is not None and (most is None or version.row_count > most.row_count):
            most = version
    return most, torn


def torn_frame(file: Path) -> str:
    """Explain what is wrong with the frame of a manifest; empty if it is whole."""
    with file.open("rb") as manifest:
        size = manifest.seek(0, os.SEEK_END)
        if not size:
            return "is empty"
        if size < _FOOTER.size:
            return "ends early"
        manifest.seek(-_FOOTER.size, os.SEEK_END)
        place, _, _, magic = _FOOTER.unpack(manifest.read())
        if magic != _MAGIC:
            return "ends early"
        manifest.seek(min(place, size))
        if int.from_bytes(manifest.read(4), "little") != size - _FOOTER.size - 4 - place:
            return "has other bytes than were written"
    return ""


def _inspect(path: Path, number: int, file: Path, lance: Any, *, digest: str | None) -> Version:
    damage = torn_frame(file)
    if damage:
        return Version(number, file, f"its manifest {damage}")
    if digest and digest_file(file) != digest:
        return Version(number, file, _CHANGED)
    try:
        opened = lance.dataset(str(path), version=number)
        metadata = opened.schema.metadata or {}
    except BaseException as error:
        if not _is_torn(error):
            raise
        return Version(number, file, _TORN.format(reason_of(error)))
    # Lance takes zeros for an empty data set, and text of zeros for text.
    if opened.version != number or any(b"\0" in value for value in metadata.values()):
        return Version(number, file, _CHANGED)
    rows = 0
    for fragment in opened.get_fragments():
        if lost := _lost_file(path, fragment):
            return Version(number, file, lost, opened, rows)
        rows += fragment.count_rows()
    return Version(number, file, "", opened, rows)


def _is_torn(error: BaseException) -> bool:
    said = str(error)
    if any(word in said for word in _OF_LATER):
        return False
    return is_panic(error) or (
        isinstance(error, Exception) and any(word in said for word in _OF_TEARING)
    )


def _lost_file(path: Path, fragment: Any) -> str:
    """Return which data file of some rows is not whole, judging by its size and its end."""
    for each in fragment.metadata.files:
        file = path / "data" / each.path
        try:
            with file.open("rb") as data:
                size = data.seek(0, os.SEEK_END)
                data.seek(max(0, size - len(_MAGIC)))
                end = data.read()
        except FileNotFoundError:
            if getattr(each, "base_id", None) is not None:  # it lies elsewhere
                continue
            return f"its file 'data/{each.path}' is missing"
        if end != _MAGIC or each.file_size_bytes not in {None, size}:
            return f"its file 'data/{each.path}' is not whole"
    return ""


def open_lance(path: str, version: int | None = None) -> Any:
    """Open a Lance dataset.

    Raises:
        DataError: There is none, or its manifest is damaged.

    Warns:
        UserWarning: The newest version is damaged, and an older one is read.

    """
    lance = import_lance()
    if "://" not in path and (found := _why_none(Path(path))):
        raise DataError(
            f"no data set can be read from {path!r}: {found}; give the path that extract() wrote to"
        )
    if version is not None or "://" in path:
        with reading(path, panic=_TORN):
            opened = lance.dataset(path, version=version)
            _ = opened.schema  # which is read from the manifest as well
            return opened
    newest = newest_whole(path)
    if newest.lost:
        warn(f"{newest.lost}; {newest.remedy}")
    return newest.opened


def _why_none(path: Path) -> str:
    """Explain why there is no data set at a path; empty if there may be one."""
    try:
        if (path / "_versions").is_dir():
            return ""
        if not path.exists():
            return "it does not exist"
        return "the directory does not contain one" if path.is_dir() else "it is a file"
    except OSError as error:
        return reason_of(error)


class NewestVersion(NamedTuple):
    """The newest version of a data set that is whole.

    Attributes:
        opened: The Lance dataset.
        lost: What is damaged, and read in its place; empty if nothing is.
        remedy: What to do then.
        has_gaps: Whether it is not whole itself, but has more rows than one that is.
        torn: The manifests of the versions that are damaged.

    """

    opened: Any
    lost: str = ""
    remedy: str = ""
    has_gaps: bool = False
    torn: tuple[Path, ...] = ()


def newest_whole(path: str) -> NewestVersion:
    """Open the newest version of a data set on a local disk that is whole.

    Raises:
        DataError: No version can be read.

    """
    with reading(path, panic=_TORN):
        found, torn = find_version(Path(path), import_lance())
        if found is None and torn:
            raise damaged(path, torn[0].damage)
        if found is None:
            raise damaged(path, "it has no manifest")
    if not torn:
        return NewestVersion(found.opened)
    files = tuple(each.file for each in torn if each is not found)
    if found.damage:
        lost = f"version {found.number} of {path!r} is incomplete: {found.damage}"
        lost += f"; from row {found.row_count} on it cannot be read completely"
        remedy = f"'actctx repair {path}' keeps what is before that, and extract() writes the rest"
        return NewestVersion(found.opened, lost, remedy, has_gaps=True, torn=files)
    numbers = " and ".join(str(each.number) for each in reversed(torn[-2:]))
    if len(torn) > 2:  # noqa: PLR2004  the first and the last
        numbers = f"{torn[-1].number} to {torn[0].number}"
    versions = f"version {numbers}" if len(torn) == 1 else f"versions {numbers}"
    lost = (
        f"{versions} of {path!r} {'is' if len(torn) == 1 else 'are'} incomplete, as after "
        f"power loss: {torn[0].damage}; version {found.number}, of {found.row_count} rows, is "
        "read, and what was written after it is lost"
    )
    return NewestVersion(found.opened, lost, "the same extract() writes it again", torn=files)
