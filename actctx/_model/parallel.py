"""Gather the activations of models whose weights are split over processes, or refuse pieces.

# NOTE [Tensor parallelism]
A DTensor knows that it is a shard, and is gathered. But the parallel styles of torch and
transformers pass plain tensors between a layer that is split by its outputs (`Shard(0)` of a linear
layer's weight) and one that is split by its inputs (`Shard(1)`). Such a tensor has only some of the
features or heads, and nothing says so. The split weights and their places show which tensors these
are: outputs of the first layer, inputs of the second, and whatever modules compute in between.
Before the first and after the second everything is whole.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from actctx._errors import OutputError

_WITH_WIDTH = 3  # axes of `batch pos d_model`; what has more has heads


def gathered(value: Tensor) -> Tensor:
    """Gather a DTensor, which all of its processes must do together; other tensors are returned."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        whole: Tensor = value.full_tensor()
        return whole
    return value


@dataclass
class _Cut:
    """The features of a layer in one process: the widths of the shard and of the whole."""

    pieces: set[int] = field(default_factory=set)
    given: int | None = None  # the whole width of its input, where it takes a piece
    made: int | None = None  # the whole width of its output
    is_known: bool = True


class Pieces:
    """Where a model yields only the piece of this process.

    Args:
        model: A model with weights that are cut over processes.

    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._parents = {child: module for module in self._names for child in module.children()}
        of_data = _of_fsdp(model)
        meshes = {mesh for module in of_data for mesh in _styles(module) if _is_mesh(mesh)}
        cuts = {
            module: _cut_of(module, meshes if module in of_data else None) for module in self._names
        }
        self._cuts = {module: cut for module, cut in cuts.items() if cut is not None}
        self._shards_sequences = any(map(_shards_sequences, self._names))

    def check(self, site: str, module: nn.Module, tensor: Tensor, *, io: str) -> None:
        """Refuse a plain tensor that is, or may be, a shard.

        Args:
            site: The name of the site, as it is shown.
            module: The module or hook point that yields it.
            tensor: What it yields.
            io: `"in"` for an input of the module, `"out"` for an output.

        Raises:
            OutputError: It is.

        """
        if self._shards_sequences:
            raise OutputError(
                f"{site} may be only this process's shard of the positions, since the model is "
                "parallel along sequences and passes on plain tensors; parallelize it with "
                "use_local_output=False, so that they can be gathered"
            )
        behind = self._piece_of(module, tensor, io)
        if behind is None:
            return
        where = self._names.get(behind)
        instead = f"capture {where!r}, whose output is whole, or " if where else ""
        raise OutputError(
            f"{site} is, or may be, only this process's shard of the features or heads, since the "
            f"model is tensor-parallel; {instead}capture from a model on one device"
        )

    def _piece_of(self, module: nn.Module, tensor: Tensor, io: str) -> nn.Module | None:
        """Find the module whose output is whole again, if a tensor is a shard."""
        owner, io, is_its_own = self._owner(module, io)
        cut = self._cuts.get(owner)
        if cut is not None:
            whole = cut.given if io == "in" else cut.made
            is_piece = not cut.is_known or (whole is not None and tensor.shape[-1:] != (whole,))
            return self._parents.get(owner, owner) if is_piece else None
        around, beside = owner, self._beside(owner)
        if not beside:  # it has no cut layers, but may lie between some
            around = self._around(owner)
            return around if _lies_between(tensor, self._beside(around)) else None
        if not is_its_own:  # a hook point of a bridge, inside the module
            has_heads = tensor.dim() > _WITH_WIDTH
            return around if has_heads or _lies_between(tensor, beside) else None
        return around if io == "out" and _is_handed_out_cut(tensor, beside) else None

    def _owner(self, module: nn.Module, io: str) -> tuple[nn.Module, str, bool]:
        """Find the module that a hook point of a bridge belongs to.

        Returns:
            The module; `"in"` or `"out"`; and whether the value is the module's own input or
            output, and not one from inside it.

        """
        inner = getattr(module, "original_component", None)
        if isinstance(inner, nn.Module) and inner in self._cuts:
            return inner, io, True
        parent, name = self._parents.get(module), self._names.get(module, "").rpartition(".")[2]
        if parent is None or not name.startswith("hook_"):
            return module, io, True
        is_its_own = name in {"hook_in", "hook_out"}
        owner, _, _ = self._owner(parent, io)
        return owner, name.removeprefix("hook_") if is_its_own else io, is_its_own

    def _around(self, module: nn.Module) -> nn.Module:
        """Find the closest enclosing module with its own split layers."""
        while module in self._parents:
            module = self._parents[module]
            if module in self._cuts or self._beside(module):
                break
        return module

    def _beside(self, module: nn.Module) -> list[_Cut]:
        """Return the split layers of a module itself, not of modules inside it."""
        inner = [getattr(child, "original_component", child) for child in module.children()]
        return [self._cuts[each] for each in inner if each in self._cuts]


def _lies_between(tensor: Tensor, cuts: list[_Cut]) -> bool:
    """Return whether a tensor has the width of a shard, or heads that add up to it."""
    pieces = {piece for each in cuts for piece in each.pieces}
    *others, width = tensor.shape or (0,)
    has_heads = tensor.dim() > _WITH_WIDTH
    return width in pieces or (has_heads and any(size * width in pieces for size in others))


def _is_handed_out_cut(tensor: Tensor, cuts: list[_Cut]) -> bool:
    """Return whether the last split layer of a module does not make its output whole."""
    if not any(each.pieces for each in cuts):
        return False
    made = {each.made for each in cuts if each.given is not None}
    is_made_whole = tensor.shape[-1:] != () and tensor.shape[-1] in made
    return tensor.dim() > _WITH_WIDTH or (not is_made_whole and _lies_between(tensor, cuts))


def is_cut(model: nn.Module) -> bool:
    """Return whether weights of a model are split over processes."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(
        isinstance(each, distributed.DTensor)
        for module in model.modules()
        for each in module._parameters.values()
    )


def pieces_of(model: nn.Module) -> Pieces | None:
    """Return where a model yields shards; None if its weights are not split over processes."""
    if not is_cut(model):
        return None
    found = Pieces(model)
    return found if found._cuts or found._shards_sequences else None


def _of_fsdp(model: nn.Module) -> set[nn.Module]:
    """Find the modules whose weights FSDP splits, which are whole while they run."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    roots = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    return {module for root in roots for module in root.modules()}


def _is_mesh(part: object) -> bool:
    return type(part).__name__ == "DeviceMesh"


def _cut_of(module: nn.Module, meshes: set[Any] | None) -> _Cut | None:
    """Return how a module's own weights are split, if they are.

    Args:
        module: The module.
        meshes: If FSDP splits them too, the meshes of tensor parallelism.

    """
    own = dict(module.named_parameters(recurse=False))
    dims = {name: dim for name, each in own.items() if (dim := _dim(each, meshes)) is not None}
    if not dims:
        return None
    weight: Any = own.get("weight")
    if "weight" not in dims or weight.dim() != 2:  # noqa: PLR2004  a matrix
        return _Cut(is_known=False)
    dim, mesh = dims["weight"], weight.device_mesh
    piece = weight.to_local().shape[dim] if mesh.ndim == 1 else weight.shape[dim] // mesh.shape[-1]
    if isinstance(module, nn.Embedding):  # by rows it yields a sum that is whole
        return _Cut(made=weight.shape[1])
    if dim == 0:
        return _Cut({piece}, made=weight.shape[0])
    return _Cut({piece}, given=weight.shape[1], made=weight.shape[0])


def _dim(weight: Any, meshes: set[Any] | None) -> int | None:
    """Return the axis along which tensor parallelism splits a weight, if it does."""
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return None
    # In a mesh of several axes tensor parallelism has the last one, and FSDP the others. FSDP may
    # leave a weight whole after a forward: then only its own axis remains.
    mesh, placement = weight.device_mesh, weight.placements[-1]
    is_of_data = meshes is not None and mesh.ndim == 1 and mesh not in meshes
    if is_of_data or mesh.shape[-1] == 1 or not placement.is_shard():
        return None
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim % weight.dim()


def _styles(module: nn.Module) -> Iterator[Any]:
    """Yield the parallel styles behind the hooks and the forward of a parallel module."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    for hook in (*hooks, module.__dict__.get("forward")):
        for cell in getattr(hook, "__closure__", None) or ():
            with suppress(ValueError):  # it is empty
                yield cell.cell_contents


def _shards_sequences(module: nn.Module) -> bool:
    """Return whether a module passes on plain shards along another axis than the last."""
    for style in _styles(module):
        layouts = getattr(style, "output_layouts", None)
        is_local = getattr(style, "use_local_output", False)
        if isinstance(style, functools.partial) and len(style.args) == 2:  # noqa: PLR2004  of torch
            layouts, is_local = style.args
        layouts = layouts if isinstance(layouts, tuple) else (layouts,)
        is_cut = any(getattr(each, "dim", -1) not in {-1, None} for each in layouts)
        if is_cut and is_local is True:
            return True
    return False
