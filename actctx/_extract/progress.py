"""A progress bar that fits where it is shown: a terminal, a notebook, or nowhere."""

import sys
from importlib.util import find_spec
from typing import Any

_MANY = 10_000


def progress_bar(*, shown: bool, total: int | None, **options: Any) -> Any:
    """Make a bar of tqdm's: with widgets in a notebook that has them, otherwise of characters.

    Args:
        shown: Whether it is to be seen at all. Where there is neither a notebook nor a terminal, as
            in a batch job, it never is.
        total: How far it goes; None where that is not known.
        options: What else tqdm takes.

    """
    from tqdm import tqdm

    # Of a few it would make fractions.
    options |= {"total": total, "unit_scale": total is None or total >= _MANY}
    if not shown:
        return tqdm(disable=True, **options)
    if not _is_in_a_notebook():
        return tqdm(disable=None, **options)  # None: where there is no terminal
    if find_spec("ipywidgets") is None:
        return tqdm(**options)
    from tqdm.notebook import tqdm as tqdm_of_widgets

    return tqdm_of_widgets(**options)


def _is_in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
