"""What is written to disk whole or not at all: beside its place, and renamed at the end."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from uuid import uuid4

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import ActctxError, DataError, OptionError
from actctx._text import dtype_name


def describe(axes: Mapping[str, tuple[str, ...]], model: str) -> dict[str, str]:
    """Make the metadata that a file needs to be understood."""
    return {
        "axes": json.dumps({key: " ".join(each) for key, each in axes.items()}),
        "model": model,
        "actctx": version("actctx"),
        "torch": torch.__version__,
    }


def expanded(path: str | PathLike[str]) -> str:
    """Write out the home directory in a path; the address of an object store has none.

    Raises:
        OptionError: It is not a path.

    """
    if not isinstance(path, str | PathLike) or "\0" in os.fspath(path):
        raise OptionError(
            f"{path!r} is not a path; give a string, or a pathlib.Path, without NUL characters"
        )
    return os.path.expanduser(path)  # noqa: PTH111  Path would make a path of an address


def local_path(path: str | PathLike[str]) -> Path:
    """Give the path of what is to be written.

    Raises:
        DataError: It is the address of an object store.

    """
    written_out = expanded(path)
    if "://" in written_out:
        raise DataError(
            f"cannot write to '{path}': object stores cannot be written to; write to a local "
            "path, and upload what is there"
        )
    return Path(written_out)


def write_safetensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    path: str | PathLike[str],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors; an existing file is replaced once all is written.

    Raises:
        DataError: It cannot be written there, or a tensor has no values, or a dtype that the format
            does not have.

    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = check_place(path)
    for name, tensor in tensors.items():
        if why := _why_not_held(tensor):
            raise DataError(
                f"cannot write {name!r} to '{place}': {why}; leave it out, or write it with "
                "torch.save"
            )
    with written_beside(place, errors=(OSError, SafetensorError)) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))


def _why_not_held(tensor: Shaped[Tensor, "..."]) -> str | None:
    """Explain why a safetensors file cannot hold a tensor; None where it can."""
    from safetensors.torch import save

    if tensor.is_meta:
        return "it has no values, on the meta device"
    try:
        save({"": torch.empty(0, dtype=tensor.dtype)})
    except (LookupError, ValueError, RuntimeError):
        return f"it is {dtype_name(tensor.dtype)}, which safetensors does not have"
    return None


def check_place(path: str | PathLike[str]) -> Path:
    """Make sure that there can be a file at a path, as far as can be told before writing it.

    Raises:
        DataError: It is a directory, or in none, or in an object store.

    """
    place = local_path(path)
    with _said_of(place):
        is_directory, is_in_one = place.is_dir(), place.parent.is_dir()
    if is_directory:
        raise DataError(f"cannot write to '{place}': it is a directory; give the path of a file")
    if not is_in_one:
        raise DataError(
            f"cannot write to '{place}': there is no directory '{place.parent}'; make it, or give "
            "another path"
        )
    return place


def refuse_existing(path: Path) -> None:
    """Make sure that there is nothing at a path.

    Raises:
        DataError: There is, or it cannot be told.

    """
    with _said_of(path):
        exists = path.exists()
    if exists:
        raise DataError(f"there is something at '{path}' already; give another path, or remove it")


@contextmanager
def written_beside(
    path: Path, *, directory: bool = False, errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """Give an empty file or directory to write to, which takes the place of a path at the end.

    It has a name that nothing else has, and is deleted where the block fails. The block's own
    errors of these kinds are taken for those of writing; what it reads must raise others.

    Raises:
        DataError: Nothing can be written there, or not all of it.

    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:12]}.partial")
    try:
        with _said_of(path):
            if directory:
                partial.mkdir(parents=True)
            else:
                partial.touch(exist_ok=False)
        with _said_of(path, errors, "make room there, or give another path"):
            yield partial
        with _said_of(path):
            partial.replace(path)
    finally:
        if directory:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def _said_of(
    path: Path,
    errors: tuple[type[Exception], ...] = (OSError,),
    remedy: str = "give another path",
) -> Iterator[None]:
    """Say of errors what could not be written."""
    try:
        yield
    except ActctxError:  # of which some are errors of the system's kind
        raise
    except errors as error:
        raise cannot_write(path, error, remedy) from error


def cannot_write(path: object, error: BaseException, remedy: str) -> DataError:
    """Explain why nothing can be written to a path, and what to do."""
    return DataError(f"cannot write to '{path}': {reason_of(error)}; {remedy}")


def reason_of(error: BaseException) -> str:
    """Take what an error says: the system, or Lance, without the place in its source behind it."""
    said: str = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    return said.split(", /", maxsplit=1)[0].removeprefix("LanceError(IO): ")
