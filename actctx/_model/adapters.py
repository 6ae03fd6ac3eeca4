"""Match the components of a TransformerLens adapter with the modules that they stand for."""

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from actctx._model.heads import Heads, heads_of, joint_heads_of
from actctx._model.patterns import Pattern
from actctx._model.translation import INSIDE, Readout, Translation

_LATENT_RANK = 4
_PROJECTIONS = {"q.hook_out": "q", "k.hook_out": "k", "v.hook_out": "v", "o.hook_in": "z"}


def told(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"


@dataclass(frozen=True, eq=False)
class Walk:
    """Visits the components of an adapter together with the modules that they stand for.

    Attributes:
        found: What it finds.
        named: The name of each module of the stand-in.
        modules: The modules of the model itself, by name.
        sizes: The adapter's config.
        mode: That of the stand-in's tensors.
        divided: How joint projections are split, by what they have in common.

    """

    found: Translation
    named: Mapping[nn.Module, str]
    modules: Mapping[str, nn.Module]
    sizes: Any
    mode: FakeTensorMode
    divided: dict[Any, dict[str, Heads | str]] = field(default_factory=dict)

    def over(self, components: Mapping[str, Any], prefix: str, module: nn.Module) -> None:
        """Visit the components of one module."""
        for key, component in components.items():
            target = module if component.name is None else _submodule(module, component.name)
            if target is None:  # a part of a joint module, or of another model
                if not _is_optional(component):
                    self._hide(f"{prefix}{key}", "hook_in", "hook_out")
            elif component.is_list_item and isinstance(target, nn.ModuleList):
                for number, child in enumerate(target):
                    # As on a bridge, each layer may have its own parts and aliases.
                    # Sharing the config is safe here, and copying it is slow.
                    layer = copy.deepcopy(component, {id(self.sizes): self.sizes})
                    self._add(layer, f"{prefix}{key}.{number}", child)
            else:
                self._add(component, prefix + key, target)

    def _add(self, component: Any, path: str, module: nn.Module) -> None:
        points = self.found.points
        if component.name is not None:
            with contextlib.suppress(Exception), self.mode:
                # Its errors concern bridges only, such as weights that cannot be split.
                component.set_original_component(module)
        self.over(component.submodules, f"{path}.", module)
        own = (name for name in component._modules if name.startswith("hook_"))
        self._hide(path, *own)
        name = self.named.get(module)
        if name is None or path.rpartition(".")[2] in INSIDE:
            self._hide(path, "hook_in", "hook_out")
            return
        if component.name is None:  # a container without a module, for which its parts stand
            for io, part in (("hook_in", "in"), ("hook_out", "out")):
                if f"{path}.{part}.{io}" in points:
                    points[f"{path}.{io}"] = points[f"{path}.{part}.{io}"]
        else:
            points[f"{path}.hook_in"] = (name, Readout("in"))
            points[f"{path}.hook_out"] = (name, _returned(component))
            self._read_latents(component, path)
        if hasattr(component, "hook_pattern"):
            self._split_heads(component, path, module)
            self._add_patterns(component, path, module)
        self._add_aliases(component, f"{path}.", module)

    def _read_latents(self, component: Any, path: str) -> None:
        """Read latents of keys and values without Hugging Face's axis of size one for heads."""
        points = self.found.points
        if not hasattr(component, "hook_kv_latent"):
            return
        for io in ("in", "out"):
            name = f"{path}.kv_b_proj.hook_{io}"
            if name in points:
                points[name] = (points[name][0], Readout(io, part=_without_heads))

    def _hide(self, path: str, *names: str) -> None:
        self.found.inside.extend(f"{path}.{name}" for name in names)

    def _split_heads(self, component: Any, path: str, module: nn.Module) -> None:
        """Split queries, keys, values and the mixed values into heads."""
        points = self.found.points
        is_joint = f"{path}.qkv.hook_out" in points and hasattr(component, "split_qkv_matrix")
        if is_joint:
            joint, _ = points.pop(f"{path}.qkv.hook_out")
            del points[f"{path}.qkv.hook_in"]
            for key in "qkv":
                points[f"{path}.{key}.hook_in"] = (joint, Readout("in"))
                points[f"{path}.{key}.hook_out"] = (joint, Readout("out"))
            heads = self._joint_heads(component, module)
        else:
            heads = heads_of(component, module, self.sizes)
        for ending, key in _PROJECTIONS.items():
            name = f"{path}.{ending}"
            if key not in heads or name not in points:
                continue
            split, (projection, readout) = heads[key], points[name]
            if isinstance(split, Heads):
                points[name] = (projection, Readout(readout.io, part=split))
            elif is_joint and key in "qkv":
                why = (
                    f"TransformerLens' adapter cannot split {projection!r} into queries, keys and "
                    f"values ({split}); capture {projection!r}, and split what it returns"
                )
                self.found.lack(name, why)
                self.found.lack(name.replace("hook_out", "hook_in"), why)
            else:
                verb, io = ("is given", ", io='in'") if readout.io == "in" else ("returns", "")
                why = (
                    f"what {projection!r} {verb} cannot be reliably split into heads ({split}); "
                    f"capture it whole, with Site({projection!r}{io})"
                )
                self.found.lack(name, why)

    def _joint_heads(self, component: Any, module: nn.Module) -> dict[str, Heads | str]:
        """Split a joint projection, or say why that fails."""
        shapes = tuple(tuple(each.shape) for each in module.parameters())
        alike = (type(component), component.name, shapes)
        if alike not in self.divided:
            try:
                self.divided[alike] = joint_heads_of(component, module, self.sizes)
            except Exception as error:  # noqa: BLE001  as above
                why = dict.fromkeys("qkv", told(error))
                self.divided[alike] = {**heads_of(component, module, self.sizes), **why}
        return self.divided[alike]

    def _add_patterns(self, component: Any, path: str, module: nn.Module) -> None:
        """Add the attention patterns of a layer, if it computes any."""
        name = self.named[module]
        attention = self._implementation(name)
        # T5's returns a position bias before it.
        first = 2 if getattr(component, "requires_relative_position_bias", False) else 1
        is_merged = hasattr(component, "hook_cross_pattern")
        for point, place in (("hook_pattern", first), ("hook_cross_pattern", 2)):
            if not hasattr(component, point):
                continue
            if attention != "eager":
                why = (
                    f"the attention of this {type(self.modules['']).__name__} is {attention!r}, "
                    "which does not compute patterns; load the model with "
                    "attn_implementation='eager', or capture from a TransformerBridge of it"
                )
                self.found.lack(f"{path}.{point}", why)
                continue
            pattern = Pattern(
                name=f"{path}.{point}",
                module=name,
                attention=weakref.ref(self.modules[name]),
                place=place,
                is_part=is_merged or getattr(module, "sinks", None) is not None,
                is_optional="output_attentions" in inspect.signature(module.forward).parameters,
            )
            readout = Readout("out", place, pattern=pattern)
            self.found.points[f"{path}.{point}"] = (name, readout)

    def _implementation(self, name: str) -> str | None:
        """Return the attention implementation of a module; towers of one model may differ."""
        while name and "config" not in vars(self.modules[name]):
            name = name.rpartition(".")[0]
        config: Any = self.modules[name].config
        return getattr(config, "_attn_implementation", None)

    def _add_aliases(self, component: Any, prefix: str, module: nn.Module) -> None:
        """Add the aliases of a component, without those of parts that the layer does not have."""
        absent = {
            key
            for key, part in component.submodules.items()
            if _is_optional(part) and _submodule(module, part.name or "") is None
        }
        usual = type(component).hook_aliases
        aliases = {}
        for alias, targets in component.hook_aliases.items():
            listed = [targets] if isinstance(targets, str) else targets
            left = [each for each in listed if each.partition(".")[0] not in absent]
            fallback = usual.get(alias, ())
            aliases[alias] = left or ([fallback] if isinstance(fallback, str) else [*fallback])
        self.found.add_aliases(prefix, aliases)


def _is_optional(component: Any) -> bool:
    return bool(getattr(component, "optional", False))


def _returned(component: Any) -> Readout:
    """Choose what to read of a component: a router's logits, an embedding's scaled output."""
    scale = getattr(component, "_output_contribution_scale", 1.0)
    part = None if scale == 1 else functools.partial(torch.mul, other=scale)
    if hasattr(component, "hook_comb"):  # for a hyper-connection, the combination of its streams
        return Readout("out", 2)
    return Readout("out", getattr(component, "logits_index", None) or None, part)


def _without_heads(latent: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return latent.squeeze(1) if latent.dim() == _LATENT_RANK else latent


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
