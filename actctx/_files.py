"""Write files whole or not at all: beside their place, renamed at the end.

# NOTE [Leftovers]
A file is written in its own directory beside its place, such as
`acts.safetensors.0123456789ab.partial`, which is locked. The system releases the lock however a
process ends, so a directory whose lock nobody holds was left by a killed process. The next writer
beside it deletes it, the lock last, so that a half-deleted directory is still recognized. Nothing
else is touched: no other name, no directory with other content, and none whose lock is held or
unknown.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import ActctxError, DataError, OptionError
from actctx._text import dtype_name, is_utf8, printable

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK = "partial.lock"
_CONTENT = "content"
_ROOM = re.compile(r".*\.[0-9a-f]{12}\.partial", re.DOTALL)


def describe(axes: Mapping[str, tuple[str, ...]], model: str) -> dict[str, str]:
    """Return the metadata that describes a file."""
    return {
        "axes": json.dumps({key: " ".join(each) for key, each in axes.items()}),
        "model": model,
        "actctx": version("actctx"),
        "torch": torch.__version__,
    }


def expanded(path: str | PathLike[str]) -> str:
    """Expand the home directory in a path; the address of an object store has none.

    A `file://` address of this machine becomes its path.

    Raises:
        OptionError: It is not a path.

    """
    given = os.fspath(path) if isinstance(path, PathLike) else path
    if not isinstance(given, str) or "\0" in given:
        raise OptionError(
            f"{path!r} is not a path; give a string, or a pathlib.Path, without NUL characters"
        )
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise OptionError(
            f"{path!r} is not a path: it has characters that the system does not support; give "
            "another"
        ) from None
    address = urlsplit(given) if given.startswith("file://") else None
    if address is not None and address.netloc in {"", "localhost"}:
        return url2pathname(address.path)
    return os.path.expanduser(given)  # noqa: PTH111  Path would make a path of an address


def local_path(path: str | PathLike[str]) -> Path:
    """Return the path to write to.

    Raises:
        DataError: It is the address of an object store.

    """
    written_out = expanded(path)
    if "://" in written_out:
        raise DataError(
            f"cannot write to '{path}': object stores cannot be written to; write to a local path, "
            "and upload the result"
        )
    return Path(written_out)


def write_safetensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    path: str | PathLike[str],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors; an existing file is replaced once everything is written.

    Raises:
        DataError: It cannot be written there, or a tensor has no values, or a dtype or a name that
            the format does not support.

    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = check_place(path)
    for name, tensor in tensors.items():
        if name == "__metadata__" or not is_utf8(name):
            raise DataError(
                f"cannot write {name!r} to '{place}': a safetensors file cannot have such a name; "
                "give the site an alias, as in {'resid': ...}"
            )
        if why := _why_not_held(tensor):
            raise DataError(
                f"cannot write {name!r} to '{place}': {why}; leave it out, or write it with "
                "torch.save"
            )
    with written_beside(place, errors=(OSError, SafetensorError)) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))


def read_safetensors(
    path: str | PathLike[str], instead: str
) -> tuple[Path, dict[str, Shaped[Tensor, "..."]], dict[str, str]]:
    """Read a file whose tensors share the memory into which the system maps it.

    Args:
        path: The file.
        instead: What to do where it cannot be read, for messages.

    Returns:
        The path written out, the tensors, and the metadata.

    Raises:
        DataError: There is no such file, or it cannot be read.

    """
    from safetensors import SafetensorError, safe_open

    place = _readable(path, instead)
    try:
        with safe_open(place, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise unreadable(place, reason_of(error), instead) from None
    return place, tensors, metadata


def _readable(path: str | PathLike[str], instead: str) -> Path:
    """Return the path of a file that is there.

    Raises:
        DataError: There is none.

    """
    written_out = expanded(path)
    if "://" in written_out:
        raise DataError(
            f"cannot read '{path}': it is an address; give the path of a copy on this machine"
        )
    place = Path(written_out)
    try:
        is_directory, is_there, is_file = place.is_dir(), place.exists(), place.is_file()
    except OSError as error:
        raise unreadable(place, reason_of(error), instead) from None
    if is_directory:
        raise DataError(
            f"cannot read '{place}': it is a directory; a data set is read with "
            "actctx.dataset.ActivationDataset"
        )
    if not is_file:
        why = "it is a device or a pipe" if is_there else "there is nothing"
        raise unreadable(place, why, instead)
    return place


def unreadable(place: Path, reason: str, instead: str) -> DataError:
    """Make the error of a file that cannot be read."""
    return DataError(f"cannot read '{place}': {reason}; {instead}")


def _why_not_held(tensor: Shaped[Tensor, "..."]) -> str | None:
    """Explain why a safetensors file cannot store a tensor; None if it can."""
    from safetensors.torch import save

    if tensor.is_meta:
        return "it has no values, on the meta device"
    try:
        save({"": torch.empty(0, dtype=tensor.dtype)})
    except (LookupError, ValueError, RuntimeError):
        return f"it is {dtype_name(tensor.dtype)}, which safetensors does not have"
    return None


def check_place(path: str | PathLike[str]) -> Path:
    """Make sure that a file can be written to a path, as far as can be known beforehand.

    Returns:
        The path; for a link, the path of its target.

    Raises:
        DataError: It is a directory, or in none, or a device, or in an object store.

    """
    place = local_path(path)
    with _said_of(place):
        place = Path(os.path.realpath(place)) if place.is_symlink() else place
        is_directory, is_in_one = place.is_dir(), place.parent.is_dir()
        is_other = place.exists() and not place.is_file()
    if is_directory:
        raise DataError(f"cannot write to '{place}': it is a directory; give the path of a file")
    if not is_in_one:
        raise DataError(
            f"cannot write to '{place}': there is no directory '{place.parent}'; create it, or "
            "give another path"
        )
    if is_other:  # such as /dev/null, in whose place there would be a file
        raise DataError(
            f"cannot write to '{place}': it is a device or a pipe; give the path of a file"
        )
    return place


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk.

    Raises:
        OSError: They could not be written there, or the file is missing.

    """
    is_directory = path.is_dir()
    if is_directory and os.name == "nt":  # which opens no directories
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # whose fsync leaves it in the cache of the disk
            import fcntl

            fcntl.fcntl(opened, fcntl.F_FULLFSYNC)
        else:
            os.fsync(opened)
    except OSError as error:
        if not (is_directory and error.errno in {errno.EINVAL, errno.ENOTSUP}):
            raise
    finally:
        os.close(opened)


def sync_tree(path: Path) -> None:
    """Wait until a file, or everything in a directory, is on the disk."""
    for each in sorted(path.rglob("*"), reverse=True):
        sync(each)
    sync(path)


def refuse_existing(path: Path) -> None:
    """Make sure that there is nothing at a path.

    Raises:
        DataError: There is something, or this cannot be determined.

    """
    clear_leftovers(path.parent)
    with _said_of(path):
        exists = path.exists()
    if exists:
        raise DataError(f"'{path}' already exists; give another path, or remove it")


@contextmanager
def written_beside(
    path: Path, *, directory: bool = False, errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """Yield an empty file or directory to write to, which is moved to a path at the end.

    It is deleted if the block fails; see the note on leftovers. Errors of these kinds in the block
    are treated as errors of writing; code that reads in it must raise others.

    Raises:
        DataError: Nothing can be written there, or not all of it.

    """
    with contextlib.ExitStack() as stack:
        with _said_of(path):
            if directory:
                with suppress(FileExistsError):  # if it is a file, that is said below
                    path.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(room_beside(path)) / path.name
            if directory:
                partial.mkdir()
            else:
                partial.touch(exist_ok=False)
                mode = (path if path.exists() else partial).stat().st_mode
        with _said_of(path, errors, "free space there, or give another path"):
            yield partial
            sync_tree(partial)
        with _said_of(path):
            if not directory:
                with suppress(OSError):  # not every file system has modes
                    partial.chmod(mode)  # safetensors makes its own, private file
            partial.replace(path)
            sync(path.parent)


@contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside a path, and delete it at the end.

    Raises:
        OSError: The file system refuses it.

    """
    clear_leftovers(path.parent)
    room, lock = _locked_room(path)
    try:
        yield room / _CONTENT
    finally:
        _delete(room)
        if lock is not None:
            lock.release()


def _locked_room(path: Path) -> "tuple[Path, BaseFileLock | None]":
    """Make a directory beside a path, and lock it if the file system supports locks."""
    while True:
        room = path.with_name(f"{path.name[:40]}.{uuid4().hex[:12]}.partial")
        room.mkdir()
        lock = _lock(room)
        # Before it was locked, another writer may have taken it for a leftover.
        if lock is not None and not (room / _LOCK).exists():
            lock.release()
            continue
        if lock is None:
            if not room.exists():
                continue
            with suppress(OSError):
                (room / _LOCK).unlink(missing_ok=True)
        (room / _CONTENT).mkdir()
        return room, lock


def _lock(room: Path) -> "BaseFileLock | None":
    """Lock a directory; None if another process holds the lock, or if locks are not supported."""
    from filelock import FileLock, Timeout

    lock = FileLock(room / _LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):
        return None
    return lock


def clear_leftovers(directory: Path) -> None:
    """Delete what killed writers left in a directory; see the note on leftovers."""
    try:
        rooms = [each for each in directory.glob("*.partial") if _ROOM.fullmatch(each.name)]
    except OSError:
        return
    for room in rooms:
        with suppress(OSError):
            room.rmdir()  # it is empty, since its writer was killed before it could lock it
            continue
        if _is_ours(room) and (lock := _lock(room)) is not None:
            _delete(room)
            lock.release()
            shutil.rmtree(room, ignore_errors=True)  # Windows deletes no file that is locked


def _is_ours(room: Path) -> bool:
    """Return whether a directory contains what `room_beside` puts into it, and nothing else."""
    try:
        names = {each.name for each in room.iterdir()}
    except OSError:
        return False
    return not room.is_symlink() and _LOCK in names and names <= {_LOCK, _CONTENT}


def _delete(room: Path) -> None:
    shutil.rmtree(room / _CONTENT, ignore_errors=True)
    shutil.rmtree(room, ignore_errors=True)


@contextmanager
def _said_of(
    path: Path,
    errors: tuple[type[Exception], ...] = (OSError,),
    remedy: str = "give another path",
) -> Iterator[None]:
    """Raise errors again with what could not be written."""
    try:
        yield
    except ActctxError:  # some of which are errors of the system
        raise
    except errors as error:
        raise cannot_write(path, error, remedy) from error


def cannot_write(path: object, error: BaseException, remedy: str) -> DataError:
    """Explain why nothing can be written to a path, and what to do."""
    return DataError(f"cannot write to '{path}': {reason_of(error)}; {remedy}")


def reason_of(error: BaseException) -> str:
    """Return the message of an error of the system, or of Lance without the place in its source."""
    said: str = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    said = said.split(", /", maxsplit=1)[0].removeprefix("External error: ")
    return printable(said.removeprefix("LanceError(IO): "))
