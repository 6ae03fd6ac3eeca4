"""Run a stand-in of a model for the shapes of its activations, without their values.

# NOTE [What has values]
Weights and activations are torch's fake tensors: they have shapes and no values, so nothing is
computed. But what a model does may depend on values of its inputs, such as whether a mask has
zeros. So inputs keep their values, and what follows from them alone is computed, as long as it is
small. Inputs on the meta device have none. Questions about values that are not there are answered
with no, or else with yes.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from actctx._model.offloaded import input_device
from actctx._model.stand_in import stand_in, undisturbed

_SMALL = 2**22
"""The elements that are computed at most of what follows from inputs alone."""

_EXPERTS = {"config", "has_gate", "is_transposed"}
"""What transformers sets on a module of experts for which a config chooses the implementation."""

_QUESTIONS = {torch.Tensor.__bool__, torch.equal, torch.allclose, torch.Tensor.equal}


def is_fake(value: object) -> bool:
    """Return whether a tensor has no values since it stands in for an activation."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def depends_on_values(error: Exception | None) -> bool:
    """Return whether torch cannot tell the shape that an operation leaves."""
    from torch._subclasses import fake_tensor

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    )
    return isinstance(error, kinds)


class Answers(TorchFunctionMode):
    """Answers questions about the values of tensors that have none.

    Args:
        answer: The answer to all of them.
        lacks_values: Tells whether a tensor has none.

    Attributes:
        were_given: Whether a question was asked.

    """

    def __init__(self, *, answer: bool, lacks_values: Callable[[object], bool] = is_fake) -> None:
        super().__init__()
        self._answer = answer
        self._lacks_values = lacks_values
        self.were_given = False

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS and any(map(self._lacks_values, args)):
            self.were_given = True
            return self._answer
        return func(*args, **(kwargs or {}))


_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, "weakref.ref[nn.Module]"] = (
    weakref.WeakKeyDictionary()
)


def original_of(module: nn.Module) -> nn.Module:
    """Return the module that a stand-in stands in for; any other is returned as it is."""
    reference = _ORIGINALS.get(module)
    original = None if reference is None else reference()
    return module if original is None else original


def fake_of(tensor: Tensor, mode: Any, device: torch.device | None = None) -> Tensor:
    """Make what has the shape of a tensor and no values.

    Args:
        tensor: The tensor, which may have no values itself.
        mode: torch's `FakeTensorMode` that the result belongs to.
        device: Where it is to be, if the tensor is on the meta device.

    """
    is_its = getattr(tensor, "fake_mode", None)
    if is_its is None and (device is None or not tensor.is_meta):
        return mode.from_tensor(tensor)  # type: ignore[no-any-return]
    where = device if tensor.device.type == "meta" else tensor.device
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made


class ShapeRun:
    """A stand-in of a model, and how it is run for shapes.

    Args:
        model: The model, which is left as it is, whatever the stand-in does.

    Attributes:
        device: Where the model takes its inputs.
        model: The stand-in.
        copies: The stand-in of each module.
        routed: Stand-ins of modules that run once for each expert, on the tokens that are routed to
            it, but here on all of them at once.

    """

    def __init__(self, model: nn.Module) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._original = model
        self.device = input_device(model)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self.copies = stand_in(model, self.fake)
        for original, copied in self.copies.items():
            _ORIGINALS[copied] = weakref.ref(original)
        self.routed: set[nn.Module] = set()
        self._choose_traceable()

    def _choose_traceable(self) -> None:
        """Choose implementations that run without values and leave the same shapes."""
        for module in self.model.modules():
            if vars(module).keys() >= _EXPERTS and module.config._experts_implementation == "eager":
                self.routed.update(each for each in module.modules() if each is not module)
        for module in self.model.modules():
            config: Any = vars(module).get("config")
            if getattr(config, "_attn_implementation", None) not in {None, "eager", "sdpa"}:
                config._attn_implementation = "sdpa"
            experts = getattr(config, "_experts_implementation", None)
            if experts not in {None, "batched_mm"}:
                config._experts_implementation = "batched_mm"

    def fake(self, tensor: Tensor) -> Tensor:
        """Make what has the shape of a tensor and no values, where it lies, or where it would."""
        return fake_of(tensor, self._mode, self.device)

    def is_own(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a fake of this run, not of a model that is all fakes."""
        return getattr(tensor, "fake_mode", None) is self._mode

    def copied(self, given: Any) -> Any:
        """Copy what the forward is given, which it may change, with fakes of large tensors."""
        with _Copying(self):
            return copy.deepcopy(given)

    @contextmanager
    def running(self, *, answer: bool) -> Iterator[Answers]:
        """Run without values, and without leaving a trace.

        Args:
            answer: The answer to all questions about values that are not there.

        """
        values = _SmallValues(self)
        answers = Answers(answer=answer, lacks_values=values.lack)
        with undisturbed(self._original), self._mode, values, answers:
            yield answers


class _Copying(TorchFunctionMode):
    """Copies tensors without copying what is large."""

    def __init__(self, run: ShapeRun) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            is_small = tensor.numel() <= _SMALL and type(tensor) is Tensor and not tensor.is_meta
            made = tensor.detach().clone() if is_small else self._run.fake(tensor)
            memo[id(tensor)] = made.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


class _SmallValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes what follows from inputs alone, and leaves the rest to the fake mode below."""

    def __init__(self, run: ShapeRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run
        # The storages of values that no longer hold, since something without values was written.
        self._overwritten: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(map(self.lack, tensors)):
            self._check_index(func, args, kwargs)
            self._note_writing(func, args, kwargs)
            args, kwargs = tree_map(self._as_fake, (args, kwargs))
            return func(*args, **kwargs)
        if not _writes(func):  # what is written is there already, and must be written once
            outline = self._outline(func, args, kwargs)
            made = [each for each in tree_leaves(outline) if isinstance(each, Tensor)]
            if sum(each.numel() for each in made) > _SMALL:
                return outline
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _outline(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what would be made; nothing where that depends on values, and is small then."""
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if depends_on_values(error):
                return None
            raise

    def lack(self, tensor: object) -> bool:
        """Return whether the values of a tensor are not known."""
        if not isinstance(tensor, Tensor):
            return False
        if is_fake(tensor) or tensor.is_meta:
            return True
        return bool(self._overwritten) and tensor.untyped_storage()._cdata in self._overwritten

    def _as_fake(self, value: Any) -> Any:
        return self._run.fake(value) if self.lack(value) and not self._run.is_own(value) else value

    def _check_index(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse positions and ids behind the end of a table, of which torch looks at no values.

        Raises:
            IndexError: As torch raises it of tensors with values.

        """
        if func is not torch.ops.aten.embedding.default:
            return
        table, index = (*args, kwargs.get("indices"))[:2]
        if self.lack(index):
            return
        with _disable_current_modes():
            if index.numel() and not 0 <= index.min() <= index.max() < len(table):
                raise IndexError("index out of range in self")

    def _note_writing(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not _writes(func):
            return
        arguments = func._schema.arguments
        named = dict(zip((each.name for each in arguments), args, strict=False))
        named.update(kwargs)
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for each in tree_leaves(named.get(argument.name)):
                    if isinstance(each, Tensor) and not self.lack(each):
                        storage = each.untyped_storage()
                        self._overwritten[storage._cdata] = storage


def _writes(func: Any) -> bool:
    """Return whether an operation changes what it is given."""
    schema = getattr(func, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
