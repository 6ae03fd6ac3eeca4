"""The input of `actctx extract`: texts of a file, objects of a file, or a Hugging Face dataset."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from actctx._errors import OptionError

_LINES = {".jsonl", ".ndjson"}
"""Suffixes of files with one object per line."""
_MOST = 2**20
"""The most characters in a paragraph: without blank lines a whole file would be one."""
_DATA = {".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"}
"""Suffixes of files with objects or rows that are not supported."""


def read_corpus(path: Path) -> Iterable[Any]:
    """Read the input at a path, piece by piece.

    Args:
        path: A text file, whose paragraphs are texts; a `.jsonl` file, with one object per line; or
            the directory of a Hugging Face dataset.

    Raises:
        OptionError: The path is not one of these.

    """
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return _hugging_face(path)
        path.open("rb").close()
    except OSError as error:
        raise OptionError(
            f"cannot read --data '{path}': {error.strerror}; give a text file, a .jsonl file, or "
            "the directory of a Hugging Face dataset"
        ) from None
    if suffix in _DATA:
        raise OptionError(
            f"--data '{path}' contains data, not text; write it as a .jsonl file, one object per "
            "line, or read it with datasets.load_dataset, and give the directory that "
            "save_to_disk writes"
        )
    return _objects(path) if suffix in _LINES else _paragraphs(path)


def _hugging_face(path: Path) -> Iterable[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ModuleNotFoundError:
        raise OptionError(
            f"--data '{path}' is a directory, and reading it needs datasets, which is not "
            "installed; install it with: pip install datasets"
        ) from None
    try:
        found: Any = load_from_disk(str(path))
    except FileNotFoundError:
        raise OptionError(
            f"the directory --data '{path}' is not a Hugging Face dataset; give what "
            "Dataset.save_to_disk wrote"
        ) from None
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise OptionError(
            f"the Hugging Face dataset --data '{path}' is damaged: {error}; write it again with "
            "Dataset.save_to_disk"
        ) from None
    if not isinstance(found, Dataset):
        splits = ", ".join(f"'{path / split}'" for split in found)
        raise OptionError(f"--data '{path}' has several splits; give one: {splits}")
    rows: Iterable[Any] = found
    return rows


def _objects(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (
                ValueError,
                RecursionError,
            ) as error:  # of too many digits
                reason = getattr(error, "msg", str(error)).partition(";")[0]
                raise OptionError(
                    f"--data '{path}' has invalid JSON in line {number}: {reason}; give one object "
                    "per line"
                ) from None


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        yield from paragraphs(_lines(path, _MOST), most=_MOST)
    except OverflowError:
        raise OptionError(
            f"--data '{path}' has a paragraph of more than {_MOST} characters, which would be one "
            "text; put blank lines between texts, or write a .jsonl file, one object per line"
        ) from None


def paragraphs(lines: Iterable[str], *, most: int | None = None) -> Iterator[str]:
    """Join lines up to a blank one.

    Args:
        lines: The lines, or parts of them.
        most: The most characters in a paragraph.

    Raises:
        OverflowError: One has more.

    """
    paragraph, count = list[str](), 0
    for line in lines:
        count += len(line)
        if most is not None and count > most:
            raise OverflowError
        if line.strip():
            paragraph.append(line)
            continue
        if paragraph:
            yield "".join(paragraph).strip()
        paragraph, count = [], 0
    if paragraph:
        yield "".join(paragraph).strip()


def _lines(path: Path, most: int = -1) -> Iterator[str]:
    """Read lines; long ones come in parts."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from iter(lambda: file.readline(most), "")
    except UnicodeDecodeError:
        raise OptionError(
            f"cannot read --data '{path}': it is not UTF-8; give a text file that is"
        ) from None
