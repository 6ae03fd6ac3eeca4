"""Drop from a data set what is not whole, so that it can be resumed."""

from pathlib import Path

from actctx._store.destination import Destination
from actctx._store.layout import layout_of
from actctx._store.verification import compare, numbered
from actctx._store.versions import manifests, open_lance


def repair(path: Path, *, dry_run: bool) -> tuple[int, int, list[str]]:
    """Keep the rows before the first that is damaged, and drop the rest.

    Args:
        path: Where the data set is.
        dry_run: Whether only to say what would be dropped.

    Returns:
        The rows that are kept, those that are dropped, and what is wrong, a sentence each.

    Raises:
        DataError: There is no data set, nothing of it can be read, or somebody is writing to it.

    """
    if not manifests(path):
        open_lance(str(path))  # which says that there is nothing to repair
    destination = Destination(path, repairs=True)
    try:
        if destination.dataset is None:
            return 0, 0, []
        rows, said = destination.row_count, [destination.damage] if destination.damage else []
        layout = layout_of(destination.dataset, str(path))
        found = compare(destination.dataset, str(path), layout)
        said += [str(damage) for damage in found.damages]
        first = min((damage.start for damage in found.damages), default=rows)
        fragments = [*numbered(destination.dataset.get_fragments())]
        dropped = [each.fragment_id for _, stop, each in fragments if stop > first]
        kept = max((stop for _, stop, _ in fragments if stop <= first), default=0)
        if not dry_run and said:
            destination.drop(dropped)
        return kept, rows - kept, said
    finally:
        destination.release()
