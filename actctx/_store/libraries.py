"""The libraries that only data sets need, imported when they are first used."""

import os
from functools import cache
from typing import Any

from actctx._errors import OptionError


def import_lance() -> Any:
    """Import Lance, which only data sets need.

    Raises:
        OptionError: It is not installed, or the process was forked from one that had used it.

    """
    try:
        import lance
        import lance.arrow  # by which Arrow knows the type of bfloat16
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    if _used_in() != os.getpid():
        raise OptionError(
            "data sets cannot be used in a process that was forked from one that has used them, "
            "since Lance's threads do not survive a fork; start it another way, such as "
            "multiprocessing.get_context('spawn')"
        )
    return lance


def not_installed(error: ModuleNotFoundError) -> OptionError:
    """Say which library of the extra for data sets is not installed."""
    return OptionError(
        f"data sets need {error.name}, which is not installed; install it with: "
        "pip install 'actctx[data]'"
    )


def import_datasets() -> Any:
    """Import Hugging Face's `datasets`, which only SAELens' directories need.

    Raises:
        OptionError: It is not installed.

    """
    try:
        import datasets
        import datasets.arrow_writer
    except ModuleNotFoundError as error:
        raise OptionError(
            f"SAELens' directories need {error.name}, which is not installed; install it with: "
            "pip install datasets"
        ) from None
    return datasets


@cache
def _used_in() -> int:
    """Return the process that used Lance first; a process that was forked from it agrees."""
    return os.getpid()
