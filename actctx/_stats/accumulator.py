"""What all statistics of actctx have in common: their checks, merging, state and files."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import DataError, JoinError, NotCapturedError, OptionError
from actctx._select.own import device_of, plain_mode
from actctx._select.values import why_unreadable
from actctx._stats.drawing import pictured
from actctx._stats.rows import Over, Rows, arrange, read_over
from actctx._stats.saving import write_statistic
from actctx._stats.statistic import Observation
from actctx._text import counted, dtype_name, format_bytes

# Not `Self`, which beartype takes only where it decorates the class.
Like = TypeVar("Like", bound="Accumulator")


class Held(NamedTuple):
    """What a statistic holds: of how many rows, and the tensors."""

    rows: int
    tensors: dict[str, Tensor]


class Accumulator(ABC):
    """What merges, is saved and shows itself.

    Args:
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    """

    _takes: ClassVar[str] = "real"

    def __init__(
        self, *, over: Over | None = None, device: torch.device | str | None = None
    ) -> None:
        self._over = read_over(over)
        self._device = device_of(device)
        self._clear()

    def _clear(self) -> None:
        self.axes: tuple[str, ...] = ()
        self._shape: torch.Size | None = None
        # Replaced in one step, so that an interrupt leaves all of a forward in it, or nothing.
        self._held = Held(0, {})

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._held.rows

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the options other than `over` and `device`, as JSON has them."""

    @abstractmethod
    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Merge what two have seen, whose tensors stay as they are."""

    def empty(self: Like) -> Like:  # noqa: PYI019  see above
        """Make a new one of the same options, which has seen nothing."""
        return type(self)(
            over=self._over, device=self._device, **self._options(), **self._unsaved()
        )

    def _unsaved(self) -> dict[str, Any]:
        """Return the options that are no part of the result, such as what draws it."""
        return {}

    def merge(self: Like, other: Like, /) -> None:  # noqa: PYI019
        """Add all that another one has seen, which stays as it is.

        The result is that of one statistic that has seen everything, in whatever order.

        Raises:
            JoinError: It keeps axes of other sizes.
            OptionError: It is another statistic, or has other options.

        """
        self._check_alike(other)
        if other._shape is None:
            return
        with plain_mode(), torch.no_grad():
            self._settle(other.axes, other._shape, "")
            if other.count:
                self._take(other._held.tensors, other.count)

    def _take(self, found: dict[str, Tensor], count: int, *, own: bool = False) -> None:
        before, held = self._held
        if before:
            found = {name: each.to(held[name].device) for name, each in found.items()}
            found = self._merged(held, found, (before, count))
        elif not own:
            found = {
                name: each.to(self._device or each.device, copy=True)
                for name, each in found.items()
            }
        self._held = Held(before + count, found)

    def _check_values(self, observation: Observation) -> None:
        values = observation.values
        name = observation.site and f" of {observation.site!r}"
        why = why_unreadable(values)
        if why is None and self._takes == "real" and not values.is_floating_point():
            why = f"it is {dtype_name(values.dtype)}, not of real numbers"
        if (
            why is None
            and self._takes == "integers"
            and (values.is_floating_point() or values.is_complex())
        ):
            why = f"it is {dtype_name(values.dtype)}, not of integers"
        if why is None and self._takes == "ordered" and values.is_complex():
            why = f"it is {dtype_name(values.dtype)}, whose values have no order"
        if why is not None:
            raise OptionError(
                f"{type(self).__name__} cannot be computed{name}: {why}; give map= a function that "
                "makes such values of it, or leave the site out"
            )

    def _settle(self, axes: tuple[str, ...], shape: torch.Size, site: str) -> None:
        """Compare the axes that are kept with those of before."""
        if self._shape is None:
            self._check_kept(shape)
            self.axes, self._shape = axes, shape
            return
        if shape == self._shape:
            return
        of = f" of {site!r}" if site else ""
        now, before = tuple(shape), tuple(self._shape)
        unlike = [
            axis
            for axis, one, two in zip(axes, now, before, strict=False)
            if one != two and axis != "_"
        ]
        along = f" along {unlike[0]!r}" if unlike and len(now) == len(before) else ""
        raise JoinError(
            f"{type(self).__name__}{of} keeps the axes {' '.join(axes)!r}, of the sizes {now} "
            f"after {before}, which do not fit{along}; give the forwards one length (by padding, "
            "or with a slice), or reduce the axis as well with over="
        )

    def _check_kept(self, shape: torch.Size) -> None:  # noqa: B027  most take all axes
        """Refuse axes of which the statistic cannot be computed."""

    def _check_alike(self, other: object) -> None:
        if type(other) is not type(self):
            raise OptionError(
                f"a {type(self).__name__} merges with its like only, not with a "
                f"{type(other).__name__}; give another {type(self).__name__}"
            )
        mine, others = self._all_options(), other._all_options()
        for name, value in mine.items():
            if value != others[name] and name not in self._free:
                raise OptionError(
                    f"this {type(self).__name__} has {name}={value!r}, and the other has "
                    f"{name}={others[name]!r}, so they do not merge; give both the same options"
                )

    _free: ClassVar[tuple[str, ...]] = ()

    def _all_options(self) -> dict[str, Any]:
        over = None if self._over is None else list(self._over)
        return {"over": over, **self._options()}

    def _read(self, name: str) -> Tensor:
        """Return a part of the result.

        Raises:
            NotCapturedError: It has seen no rows.

        """
        if not self.count:
            raise NotCapturedError(
                f"this {type(self).__name__} has seen no rows, so it has no value; run a forward "
                "that leaves some"
            )
        return self._held.tensors[name]

    @property
    def nbytes(self) -> int:
        """The bytes of what it holds."""
        return sum(each.nbytes for each in self._held.tensors.values())

    def state_dict(self) -> dict[str, Any]:
        """Return all that it holds, with its options: tensors, and values that JSON has.

        The tensors are its own: `copy.deepcopy` makes a state that later updates leave alone.
        """
        return {
            "kind": type(self).__name__,
            "options": self._all_options(),
            "count": self.count,
            "axes": list(self.axes),
            "shape": None if self._shape is None else list(self._shape),
            **self._held.tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take what `state_dict` returned in place of what it holds; tensors are copied.

        Raises:
            DataError: It is not such a state.
            OptionError: It is of another statistic, or of one with other options.

        """
        given = dict(state)
        try:
            kind, options, count = given.pop("kind"), given.pop("options"), given.pop("count")
            axes, shape = tuple(given.pop("axes")), given.pop("shape")
        except (KeyError, TypeError):
            raise DataError(
                "what was given is not the state of a statistic; give what state_dict() returned"
            ) from None
        if kind != type(self).__name__:
            raise OptionError(
                f"this is the state of a {kind}, not of a {type(self).__name__}; load it into one"
            )
        if options != self._all_options():
            raise OptionError(
                f"the state is of a {kind} with the options {options}, and this one has "
                f"{self._all_options()}; make one with the same options"
            )
        with plain_mode(), torch.no_grad():
            tensors = {
                name: each.detach().to(self._device or each.device, copy=True)
                for name, each in given.items()
            }
        self._clear()
        self.axes, self._held = axes, Held(count, tensors)
        self._shape = None if shape is None else torch.Size(shape)

    def save(self, path: str | PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write it to a safetensors file, which `actctx.stats.load` reads.

        Args:
            path: The file. One that exists is replaced, once all is written.
            metadata: More to write into the file, text under text.

        Raises:
            DataError: It cannot be written there.
            OptionError: The metadata is not a dict of strings.

        """
        write_statistic(self.state_dict(), path, {} if metadata is None else metadata)

    def __repr__(self) -> str:
        given = {name: each for name, each in self._all_options().items() if each is not None}
        options = ", ".join(f"{name}={each!r}" for name, each in given.items())
        title = f"{type(self).__name__}({options})"
        if self._shape is None:
            return f"{title}: nothing seen yet"
        sizes = [f"{axis}={size}" for axis, size in zip(self.axes, self._shape, strict=True)]
        kept = f" of {' '.join(sizes)}" if sizes else ""
        return f"{title}: {counted(self.count, 'row')}{kept}, {format_bytes(self.nbytes)}"

    def _repr_html_(self) -> str:
        return pictured(repr(self), self._picture() if self.count else "")

    def _picture(self) -> str:
        """Draw it in HTML."""
        return ""


class RowAccumulator(Accumulator):
    """A statistic of the rows of one site."""

    @abstractmethod
    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        """Compute the statistic of some rows, of which there is at least one."""

    def update(self, observation: Observation, /) -> None:
        """Add the values of an observation.

        Raises:
            AxisError: It does not have the axes to reduce.
            JoinError: The axes that are kept are of other sizes than before.
            OptionError: It has values of which this statistic means nothing.

        """
        self._check_values(observation)
        with plain_mode(), torch.no_grad():
            rows = arrange(observation, self._over)
            self._settle(rows.axes, rows.values.shape[1:], observation.site)
            count = len(rows.values)
            if count and rows.values.numel():
                found = self._of_rows(rows)
                if self._device is not None:
                    found = {name: each.to(self._device) for name, each in found.items()}
                self._take(found, count, own=True)


def float_dtype(values: Shaped[Tensor, "..."]) -> torch.dtype:
    """Return the dtype to add values up in: double, where the device has it."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def result_dtype(values: Shaped[Tensor, "..."]) -> torch.dtype:
    """Return the dtype of a result: float32, or better where the activations are."""
    return (
        torch.promote_types(values.dtype, torch.float32)
        if values.is_floating_point()
        else torch.float32
    )
