"""The buffer that a capture returns: captured tensors by name."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import HookNameError, NotCapturedError, OptionError, SeveralFiringsError
from actctx._model.axes import Axes
from actctx._model.globs import meant
from actctx._results.column import Column, ColumnOptions
from actctx._results.joining import Kept
from actctx._results.kinds import column_for, column_of
from actctx._results.label import Label
from actctx._results.layers import layers_of, stack_layers
from actctx._results.saved import Saved, SavedSite, read_saved, write_saved
from actctx._results.table import Estimate, Row, as_html, as_text, spared, unknown
from actctx._select.own import device_of, read_to
from actctx._text import counted, format_bytes, shortened

if TYPE_CHECKING:
    _Tensors = Mapping[str, Tensor]
else:  # beartype would read, and so join, a tensor to check the type of a buffer
    _Tensors = Mapping


class Activations(_Tensors):
    """Captured activations by name, joined over forwards.

    The tensors are yours: contiguous, detached from the model (unless captured with `grad=True`),
    never inference tensors, and sharing storage with nothing else. You can read them at any time
    between forwards, even inside the block. A tensor that you have read keeps its values when
    further forwards run. Iteration is in the order in which the sites ran. It is not safe to read a
    buffer in one thread while another thread runs a forward into it.

    `acts["blocks.6.hook_resid_post"]` reads a site by the requested name, by any alias of it, or by
    a suffix or a glob that matches no other captured site. `acts.resid` works if the alias is an
    identifier. With `join=None` you get a list of tensors, one per forward. An in-place edit
    changes the buffer.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post") as acts:
        ...     logits = model(tokens)
        >>> acts["blocks.0.hook_resid_post"].shape
        torch.Size([4, 7, 32])

    """

    def __init__(
        self, join: str | None = "batch", *, source: str = "", estimate: Estimate = unknown
    ) -> None:
        self._join = join
        self._source = source
        self._estimate = estimate
        self._columns: dict[str, Column[Any]] = {}
        self._order: dict[str, None] = {}
        self._forwards = 0
        self._silent = 0
        self._tokens: Counter[tuple[int, int]] = Counter()
        self._kept = Kept()

    def expect(self, label: Label, options: ColumnOptions | None = None) -> Column[Any]:
        """Prepare for a site, and return its column, for a hook to add to."""
        wanted = ColumnOptions(self._join) if options is None else options
        self._columns[label.key] = column_for(label, wanted)
        return self._columns[label.key]

    @property
    def columns(self) -> list[Column[Any]]:
        """The columns of the sites that fired."""
        return [self._columns[key] for key in self._order]

    def single(self, name: str) -> Column[Any]:
        """Return the column of a site that fires once in a forward.

        Raises:
            NotCapturedError: Nothing was captured under this name.
            SeveralFiringsError: The site fired more than once in a forward.

        """
        column = self._column(name)
        if len(column.firings) > 1 and not column.is_one:
            raise SeveralFiringsError(
                f"{name!r} fired {len(column.firings)} times in one forward, so it is not one "
                f"tensor; acts.firings({name!r}) returns all of them, and Site({name!r}, "
                "firing=-1) keeps the last"
            )
        return column

    def write(self, forward: Mapping[str, Sequence[Any]], tokens: tuple[int, int] = (0, 0)) -> None:
        """Add the stages of one forward, firing by firing, with its sequences and positions."""
        self._forwards += 1
        self._tokens[tokens] += 1
        kept = 0
        for key, stages in forward.items():
            self._order.setdefault(key)
            kept += self._columns[key].write(stages)
        self._kept.add(kept)

    def note_silent_forward(self) -> None:
        """Count a forward that yielded nothing."""
        self._silent += 1

    def __getitem__(self, name: str) -> Any:
        """Read the activations of a site.

        Args:
            name: Its name, an alias, or a suffix or a glob that matches no other captured site.

        Returns:
            The tensor, joined over the forwards; with `join=None` a list, one per forward; with
            `reduce=` the statistic of all forwards, which the next forward changes.

        Raises:
            NotCapturedError: Nothing was captured under this name.
            SeveralFiringsError: The site fired more than once in a forward.
            JoinError, AxisError: The forwards do not join, or have no axis to join along.

        """
        return self.single(name).read(0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle look these up before anything else exists
            raise AttributeError(name)
        if name not in self._columns:
            several = [key for key in self._order if key.startswith(f"{name}.")]
            if several:
                stacked = f"acts.stack({name!r}) or " * are_layers(self._columns, name)
                raise AttributeError(
                    f"{name!r} matches several sites, so read {stacked}one of {listed(several)}"
                )
            raise AttributeError(
                f"Activations has no attribute {name!r}; the captured names are "
                f"{listed(self._order)}"
            )
        try:
            return self[name]
        except NotCapturedError as error:
            raise AttributeError(str(error)) from error

    def __contains__(self, name: object) -> bool:
        try:
            column = find_column(self._columns, name)
        except HookNameError:  # an invalid pattern
            return False
        return bool(column and column.firings)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(key for key in self._order if key.isidentifier())]

    @property
    def tensor(self) -> Shaped[Tensor, "..."]:
        """The captured tensor, if exactly one site was captured.

        Raises:
            NotCapturedError: No site was captured, or more than one.
            OptionError: With `join=None` there is a list of tensors instead, and with `reduce=` a
                statistic.
            SeveralFiringsError, JoinError, AxisError: As for `acts[name]`.

        """
        if self._join is None:
            raise OptionError(
                "acts.tensor needs joined forwards, but join=None keeps a list; read acts[name]"
            )
        if not self:
            raise NotCapturedError(
                f"there is no tensor to read: {why_empty(self._source, self._silent)}"
            )
        if len(self) > 1:
            raise NotCapturedError(
                f"acts.tensor needs exactly one site, but {len(self)} were captured: "
                f"{listed(self._order)}; read acts[name]"
            )
        (name,) = self
        self._check_tensor("acts.tensor is for a tensor", name, "read acts[name]")
        tensor: Tensor = self[name]
        return tensor

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of sites that a pattern matched but that never fired."""
        return tuple(key for key in self._columns if key not in self._order)

    @property
    def forwards(self) -> int:
        """The number of forwards that yielded something."""
        return self._forwards

    @property
    def nbytes(self) -> int:
        """The size of the captured tensors in bytes."""
        return sum(column.nbytes for column in self._columns.values())

    def axes(self, name: str) -> Axes:
        """Name the axes of a captured tensor, such as `("batch", "pos", "d_model")`.

        Of a statistic they are those of what it is computed of, and its own say what it keeps.

        An axis whose name is not known is `"_"`, as in jaxtyping.

        Raises:
            NotCapturedError: Nothing was captured under this name.

        """
        return self._column(name).label.settle()

    def firings(self, name: str) -> list[Any]:
        """Read a site that fires more than once in a forward, such as a shared module.

        Returns:
            A tensor for each firing of a forward, in order, each joined over the forwards; with
            `reduce=` a statistic of all forwards.

        Raises:
            NotCapturedError: Nothing was captured under this name.
            JoinError, AxisError: The forwards do not join, or have no axis to join along.

        Example:
            >>> linear = torch.nn.Linear(2, 2)
            >>> twice = torch.nn.Sequential(linear, linear)
            >>> with capture(twice, "0") as acts:
            ...     output = twice(torch.ones(1, 2))
            >>> [firing.shape for firing in acts.firings("0")]
            [torch.Size([1, 2]), torch.Size([1, 2])]

        """
        column = self._column(name)
        return [column.read(k) for k in range(len(column.firings))]

    def positions(self, name: str) -> Int64[Tensor, "token 2"]:
        """Return where the rows of a site come from that `mask=` kept.

        Returns:
            For each row, its sequence, counted over all forwards, and its position in the padded
            sequence. With a KV cache, the sequences of a step are those of the prompt.

        Raises:
            NotCapturedError: Nothing was captured under this name, or without a mask.

        Example:
            >>> mask = torch.tensor([[False, True]])
            >>> with capture(model, "blocks.0.hook_resid_post", mask=mask) as acts:
            ...     logits = model(tokens[:1, :2])
            >>> acts.positions("blocks.0.hook_resid_post")
            tensor([[0, 1]])

        """
        rows = self._column(name).positions()
        if rows is None:
            raise NotCapturedError(
                f"{name!r} was captured without mask=, so its rows are all sequences and positions"
            )
        return rows

    def stack(self, name: str) -> Shaped[Tensor, "layer ..."]:
        """Stack activations of the same name over layers, along a new first axis `layer`.

        The result is a copy, as large as the stacked tensors.

        Args:
            name: The name within a layer, or a suffix of it, such as `"hook_resid_post"` or
                `"attn.hook_z"`; a pattern of whole names, such as
                `"encoder_blocks.*.hook_resid_post"` or, for the layers themselves,
                `"model.layers.*"`; or the alias of a pattern.

        Raises:
            NotCapturedError: No captured site has this name in any layer.
            HookNameError: The name matches several stacks of layers.
            JoinError: The layers do not have the same shape.
            OptionError: With `join=None` there are lists of tensors, and with `reduce=` statistics.

        Example:
            >>> acts.stack("hook_resid_post").shape
            torch.Size([2, 4, 7, 32])

        """
        if self._join is None:
            raise OptionError(
                "acts.stack(name) needs joined forwards, but join=None keeps lists; stack the "
                "tensors of the lists yourself"
            )
        layers = self._layers(name)
        instead = (
            "stack what you read of each, as in torch.stack([acts[name].mean for name in acts])"
        )
        for key in layers:
            self._check_tensor("acts.stack(name) stacks tensors", key, instead)
        return stack_layers({key: self[key] for key in layers})

    def _check_tensor(self, purpose: str, key: str, instead: str) -> None:
        column = self._columns[key]
        if not column.is_tensor:
            kind = column.spec().__name__
            raise OptionError(f"{purpose}, but {key!r} is a {kind}; {instead}")

    def _layers(self, name: str) -> list[str]:
        if not self:
            raise NotCapturedError(
                f"there is nothing to stack: {why_empty(self._source, self._silent)}"
            )
        return layers_of({key: (key, *self._columns[key].label.names) for key in self}, name)

    def spec(self, name: str) -> type:
        """Return the jaxtyping annotation of a captured tensor, from its site, slice and config.

        Returns:
            An annotation such as `Float32[Tensor, "batch pos d_model=768"]`. Axes have a size if
            the config or the slice fixes it; the others are free. For a statistic, its class.

        Raises:
            NotCapturedError: Nothing was captured under this name.

        Example:
            >>> acts.spec("blocks.0.hook_resid_post").__name__
            "Float32[Tensor, 'batch pos d_model=32']"

        """
        return self._column(name).spec()

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Activations":
        """Copy to a device or a dtype; floating-point activations are cast, others only moved.

        Args:
            device: The device, or a dtype in its place, as for a tensor.
            dtype: The dtype.

        Returns:
            A new buffer. Drop this one to free its memory.

        Raises:
            OptionError: There is no such device or floating-point dtype, or there are two dtypes;
                or torch cannot cast or move the tensors.

        Example:
            >>> acts.to("cpu", torch.float16)["blocks.0.hook_resid_post"].dtype
            torch.float16

        """
        to, cast = read_to(device, dtype)
        columns = {key: column.moved(to, cast) for key, column in self._columns.items()}
        return self._with(columns)

    def clear(self) -> None:
        """Drop everything captured so far; later forwards are captured as before."""
        for column in self._columns.values():
            column.clear()
        self._order.clear()
        self._forwards = self._silent = 0
        self._tokens.clear()
        self._kept = Kept()

    def save(self, path: str | PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the activations to a safetensors file, which `actctx.load` reads.

        `safetensors.torch.load_file(path)` reads the tensors too. The metadata has `axes`, a JSON
        object of axes by name, `model`, the class of the model, the versions that wrote it, and
        everything else that a buffer knows about its sites. If `mask=` kept rows, there is also a
        tensor `positions`; see `positions`.

        Args:
            path: Where to write; an existing file is replaced once everything is written.
            metadata: Further metadata for the file.

        Raises:
            NotCapturedError: Nothing was captured.
            OptionError: The activations are lists (`join=None`), which a file cannot store, or
                `metadata` is not a dict of strings, or has a key that the file uses itself.
            DataError: It cannot be written there, or a tensor has no values, or a dtype that
                safetensors does not support.
            SeveralFiringsError, JoinError, AxisError: As for `acts[name]`.

        Example:
            >>> acts.save("acts.safetensors")
            >>> [*load("acts.safetensors")]
            ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']

        """
        if not self:
            raise NotCapturedError("nothing was captured, so there is nothing to save")
        fired = {key: self.single(key).saved() for key in self}
        silent = {key: SavedSite(self._columns[key].label.names) for key in self.missing}
        saved = Saved(
            fired | silent, join=self._join or "", source=self._source, forwards=self._forwards
        )
        write_saved(saved, path, {} if metadata is None else metadata)

    @classmethod
    def of_saved(cls, saved: Saved, device: torch.device | None) -> "Activations":
        """Make a buffer from the content of a file."""
        acts = cls(saved.join, source=saved.source)
        for key, site in saved.sites.items():
            acts._columns[key] = column_of(key, site, join=saved.join, device=device)
            if acts._columns[key].firings:
                acts._order[key] = None
        acts._forwards = saved.forwards  # may be unknown
        return acts

    def __repr__(self) -> str:
        return as_text(*self._summary())

    def _repr_html_(self) -> str:
        cache = spared(self._estimate, self._tokens, self.nbytes)
        return as_html(*self._summary(cache, drawn=True))

    def __eq__(self, other: object) -> bool:
        """Return whether it is the same buffer.

        Raises:
            OptionError: It is another buffer or mapping, whose tensors have no single truth value.

        """
        if self is not other and isinstance(other, Mapping):
            raise OptionError(
                "buffers cannot be compared with ==, since a tensor does not have a single truth "
                "value; compare their tensors, with torch.testing.assert_close(acts, other, "
                "rtol=0, atol=0), or one with torch.equal(acts[name], other[name])"
            )
        return self is other

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, object]) -> "Activations":
        return self._with({key: column.copied() for key, column in self._columns.items()})

    def __getstate__(self) -> dict[str, object]:
        for column in self._columns.values():
            column.settle()
        return {**self.__dict__, "_estimate": unknown}

    def _summary(self, spared: str = "", *, drawn: bool = False) -> tuple[str, list[Row]]:
        size = format_bytes(self.nbytes) + spared
        title = f"Activations: {counted(len(self), 'site')}, {size}"
        if self._forwards or not self:  # may be unknown for a file
            title += f", {counted(self._forwards, 'forward')}"
        if self._forwards and self.missing:
            title += f", {len(self.missing)} missing"
        return title, [self._columns[key].row(drawn=drawn) for key in self]

    def _with(self, columns: dict[str, Column[Any]]) -> "Activations":
        copy = Activations(self._join, source=self._source, estimate=self._estimate)
        copy._tokens = self._tokens.copy()
        copy._order = dict(self._order)
        copy._forwards, copy._silent = self._forwards, self._silent
        copy._columns = columns
        return copy

    def _column(self, name: str) -> Column[Any]:
        column = find_column(self._columns, name)
        if column is not None and column.firings:
            return column
        reason = why_empty(self._source)
        if self._forwards or self._silent or self._order:
            forwards = self._forwards + self._silent
            reason = why_nothing(self._columns, name, self._order, forwards)
        raise NotCapturedError(f"nothing was captured from {name!r}: {reason}")


def load(path: str | PathLike[str], *, device: torch.device | str | None = None) -> Activations:
    """Read a file that `acts.save` wrote.

    The names, axes and positions of the sites are those that were captured, and `stack`, `spec`,
    `missing` and `forwards` work as before. Safetensors files of other programs are read too: their
    tensors have their names, and unknown axes.

    Args:
        path: The file.
        device: The device of the tensors; by default the CPU.

    Returns:
        The activations. They share no memory with the file.

    Raises:
        DataError: There is no such file, it cannot be read, its metadata does not fit its tensors,
            or a later version wrote it.
        OptionError: There is no such device, or `path` is not a path.

    Example:
        >>> acts.save("acts.safetensors")
        >>> load("acts.safetensors").stack("hook_resid_post").shape
        torch.Size([2, 4, 7, 32])

    """
    to = device_of(device)
    return Activations.of_saved(read_saved(path), to)


Activations.__module__ = load.__module__ = "actctx"  # where users find them


def find_column(columns: Mapping[str, Column[Any]], name: object) -> Column[Any] | None:
    """Find the column that a name matches, if it matches one.

    Raises:
        HookNameError: It is an invalid pattern.

    """
    if not isinstance(name, str):
        return None
    if name in columns:
        return columns[name]
    found = _meant(columns, name)
    return columns[next(iter(found))] if len(found) == 1 else None


def why_nothing(
    columns: Mapping[str, Column[Any]], name: str, fired: Iterable[str], forwards: int
) -> str:
    """Explain why nothing was captured under a name, although there were forwards."""
    if find_column(columns, name) is not None:
        return f"it never fired in {counted(forwards, 'forward')}"
    found = _meant(columns, name)
    if not found:
        names = [*fired]
        return (
            f"the captured names are {listed(names)}"
            if names
            else "nothing else was captured either"
        )
    # By the names that were matched, if these are unique.
    alike = listed(found.values() if len({*found.values()}) == len(found) else found)
    if any(name in columns[key].label.names for key in found):
        return f"it is captured several times, so read one of {alike}"
    stacked = f", or acts.stack({name!r}) for its layers" if are_layers(columns, name) else ""
    return f"it matches {len(found)} of the captured sites, so read one of {alike}{stacked}"


def are_layers(columns: Mapping[str, Column[Any]], name: str) -> bool:
    """Return whether the sites that a name matches can be stacked over layers."""
    fired = {key: column for key, column in columns.items() if column.firings}
    if not all(column.is_tensor for column in fired.values()):
        return False
    try:
        return bool(layers_of({key: column.label.names for key, column in fired.items()}, name))
    except (HookNameError, NotCapturedError):
        return False


def why_empty(source: str, silent: int = 0) -> str:
    """Explain why nothing at all was captured, for a model of this class.

    Args:
        source: The class of the model.
        silent: The number of forwards that yielded nothing.

    """
    model = source or "the model"
    if silent:
        return f"none of the sites fired in {counted(silent, 'forward')} of {model}"
    return f"no forward of {model} has run since the block began or the buffer was cleared"


def listed(keys: Iterable[str]) -> str:
    """List some of the names."""
    return shortened([*map(repr, keys)])


def _meant(columns: Mapping[str, Column[Any]], name: str) -> dict[str, str]:
    """Find what a name matches, among sites that fired if there are any; see `meant`."""
    found = meant(name, {key: column.label.names for key, column in columns.items()})
    return {key: each for key, each in found.items() if columns[key].firings} or found
