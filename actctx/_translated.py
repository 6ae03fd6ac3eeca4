"""TransformerLens' hook names on a plain Hugging Face model, for which no bridge is built.

# NOTE [Whose mapping it is]
TransformerLens' architecture adapters tell which module of a Hugging Face model each component is,
which aliases its hook points have, and how a joint projection divides into queries, keys and
values. The adapter of the model is asked for all of that; there is no table of architectures here.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._errors import OutputError
from actctx._heads import Heads, divided

Part = Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]]

# Components whose modules Hugging Face calls with other shapes, or for other outputs.
_INSIDE = {"rotary_emb", "q_norm", "k_norm"}
_PATTERN_RANK = 4


@dataclass(frozen=True, eq=False)
class Reading:
    """How the value of a hook point is read off a module that has none.

    Attributes:
        io: Whether it is given to the module (`"in"`), or returned by it (`"out"`).
        output: Where in a tuple it is returned, by default the first tensor.
        part: What makes the value of it, such as splitting it into heads.

    """

    io: str
    output: int | None = None
    part: Part | None = None

    def of(self, activation: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Read the value: a view of what the module was given or returned, where that is enough."""
        return activation if self.part is None else self.part(activation)


@dataclass(frozen=True, eq=False)
class Translation:
    """TransformerLens' names in a Hugging Face model.

    Attributes:
        points: The name of the module of each hook point, and how it is read, by its canonical
            name.
        aliases: The canonical name of each alias.
        inside: The hook points that a bridge has beside the points.
        lacks: Why there are no names at all.
        lacks_pattern: Why there are no attention patterns.
        lacks_heads: Why queries, keys and values are not among the points, by the name of each.

    """

    points: dict[str, tuple[str, Reading]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    lacks: str = ""
    lacks_pattern: str = ""
    lacks_heads: dict[str, str] = field(default_factory=dict)

    def canonical(self, name: str) -> str | None:
        """Return the canonical name of a hook point, or None where there is none."""
        name = self.aliases.get(name, name)
        return name if name in self.points else None

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """The names of each hook point, by the canonical one, which comes first."""
        named = {name: [name] for name in self.points}
        for alias, name in self.aliases.items():
            named[name].append(alias)
        return named

    @functools.cached_property
    def siblings(self) -> set[str]:
        """The names of all hook points that a bridge has."""
        return {*self.points, *self.inside}

    def why_not(self, name: str) -> str:
        """Say why a hook point of a bridge is not among them, and what to do."""
        if name in self.lacks_heads:
            return self.lacks_heads[name]
        if name.endswith("hook_pattern"):
            return self.lacks_pattern
        if not _INSIDE.isdisjoint(name.split(".")):
            return (
                "Hugging Face's module has other shapes or outputs than a bridge's; capture that "
                "module by its own name (see named_modules()), or from a TransformerBridge"
            )
        if name.startswith("unembed."):
            return (
                "a model without a head, as AutoModel loads it, has no unembedding; load it with "
                "one, as AutoModelForCausalLM does"
            )
        return (
            "a module of Hugging Face does not expose it; capture it from a TransformerBridge of "
            "the model"
        )


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found in a model, for as long as it has the same modules.

    It holds none of them, so that a model is freed as if nobody had asked.
    """

    attention: str | None
    modules: dict[str, weakref.ref[nn.Module]]
    found: Translation

    def holds(self, attention: str | None, modules: Mapping[str, nn.Module]) -> bool:
        """Tell whether it is still right."""
        return (
            self.attention == attention
            and self.modules.keys() == modules.keys()
            and all(self.modules[name]() is module for name, module in modules.items())
        )


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def translate(model: nn.Module, modules: Mapping[str, nn.Module]) -> Translation:
    """Find TransformerLens' names in a Hugging Face model, by the adapter of its architecture.

    Args:
        model: The model.
        modules: All of its modules, by name.

    Returns:
        The names, the same object as long as the model has the same modules and attention; or
        why there are none. Nothing is raised, whatever an adapter raises.

    """
    attention = getattr(model.config, "_attn_implementation", None)
    known = _KNOWN.get(model)
    if known is None or not known.holds(attention, modules):
        held = {name: weakref.ref(module) for name, module in modules.items()}
        known = _KNOWN[model] = _Known(attention, held, _translate(model, attention, modules))
    return known.found


def _translate(
    model: nn.Module, attention: str | None, modules: Mapping[str, nn.Module]
) -> Translation:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return Translation(lacks="TransformerLens 3 or later tells them; install it")
    name = type(model).__name__
    remedy = "give the names of its modules (see actctx.hook_names(model))"
    try:
        adapters = map(functools.partial(_adapter, model), _relatives(model))
        adapter = next(filter(None, adapters), None)
        if adapter is None:
            return Translation(lacks=f"TransformerLens has no adapter for {name}; {remedy}")
        return _walked(adapter, model, attention, modules, TransformerBridge.hook_aliases)
    except Exception as error:  # noqa: BLE001  what an adapter raises for a model that it cannot do
        return Translation(
            lacks=f"TransformerLens' adapter fails on this {name} ({_told(error)}); {remedy}"
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"


def _walked(
    adapter: Any,
    model: nn.Module,
    attention: str | None,
    modules: Mapping[str, nn.Module],
    aliases: Mapping[str, Any],
) -> Translation:
    name = type(model).__name__
    found = Translation(
        lacks_pattern=f"the attention of this {name} is {attention!r}, which computes no pattern; "
        "load the model with attn_implementation='eager', or capture from a TransformerBridge of it"
    )
    # Backwards, so that of several names of a module the first stays.
    named = {module: name for name, module in reversed([*modules.items()])}
    walk = _Walk(found, named, adapter.cfg.d_head, is_eager=attention == "eager")
    for root in (model, _with_head(model)):
        if not found.points:
            found.inside.clear()  # of a walk that came to nothing
            walk.over(adapter.component_mapping, "", root)
    _add_aliases(found, "", aliases)
    return found


def is_hugging_face(model: nn.Module) -> bool:
    """Recognise a `PreTrainedModel` without importing it; wrappers pass attributes through."""
    return hasattr(type(model), "base_model_prefix")


def why_wrapped(model: nn.Module) -> str:
    """Say where the Hugging Face model is that another module holds, if it does."""
    named = model.named_modules()
    inside = next((name for name, module in named if is_hugging_face(module)), None)
    if inside is None:
        return ""
    return (
        f"it is a name in the Hugging Face model that this {type(model).__name__} holds as "
        f"{inside!r}; capture from that, as in capture(model.get_submodule({inside!r}), ...), "
        "and run the whole as before"
    )


def _relatives(model: nn.Module) -> list[str]:
    """Name the architectures that have the modules of a model: itself, and those with a head."""
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    config: Any = model.config
    with_head = [kind[config.model_type] for kind in kinds if config.model_type in kind]
    return [type(model).__name__, *with_head]


def _adapter(model: nn.Module, architecture: str) -> Any:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    config = build_bridge_config_from_hf(model.config, architecture, architecture, torch.float32)
    try:
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        if "Unsupported architecture" in str(error):
            return None
        raise


def _with_head(model: nn.Module) -> nn.Module:
    """Put a model that has no head where a model with one has it, as `transformer` of GPT-2."""
    whole = nn.Module()
    whole.add_module(getattr(model, "base_model_prefix", "") or "model", model)
    return whole


@dataclass(frozen=True, eq=False)
class _Walk:
    """Goes through the components of an adapter, beside the modules that they stand for."""

    found: Translation
    named: Mapping[nn.Module, str]
    d_head: int
    is_eager: bool
    divided: dict[Any, list[Heads] | str] = field(default_factory=dict)

    def over(self, components: Mapping[str, Any], prefix: str, module: nn.Module) -> None:
        for key, component in components.items():
            target = module if component.name is None else _submodule(module, component.name)
            if target is None:  # a part of a joint module, or of another model of the family
                self.found.inside.extend(f"{prefix}{key}.{io}" for io in ("hook_in", "hook_out"))
                continue
            if component.is_list_item and isinstance(target, nn.ModuleList):
                for number, child in enumerate(target):
                    self._add(component, f"{prefix}{key}.{number}", child)
            else:
                self._add(component, prefix + key, target)

    def _add(self, component: Any, path: str, module: nn.Module) -> None:
        points = self.found.points
        self.over(component.submodules, f"{path}.", module)
        if f"{path}.qkv.hook_out" in points and hasattr(component, "split_qkv_matrix"):
            self._divide(component, path, module)
        own = (name for name in component._modules if name.startswith("hook_"))
        self.found.inside.extend(f"{path}.{name}" for name in own)
        if path.rpartition(".")[2] in _INSIDE:
            return
        if component.name is None:  # a container that is no module is what its parts are
            for io, part in (("hook_in", "in"), ("hook_out", "out")):
                if f"{path}.{part}.{io}" in points:
                    points[f"{path}.{io}"] = points[f"{path}.{part}.{io}"]
        else:
            points[f"{path}.hook_in"] = (self.named[module], Reading("in"))
            points[f"{path}.hook_out"] = (self.named[module], _returned(component))
        if hasattr(component, "hook_pattern"):
            for name in ("q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in"):
                self._split_heads(f"{path}.{name}")
            if self.is_eager:
                pattern = Reading("out", -1, functools.partial(_as_pattern, path))
                points[f"{path}.hook_pattern"] = (self.named[module], pattern)
        _add_aliases(self.found, f"{path}.", _aliases_of(component, module))

    def _divide(self, component: Any, path: str, module: nn.Module) -> None:
        """Put queries, keys and values in the place of a joint projection."""
        points = self.found.points
        joint, _ = points.pop(f"{path}.qkv.hook_out")
        del points[f"{path}.qkv.hook_in"]
        if component not in self.divided:  # it stands for the attention of all layers
            self.divided[component] = self._division(component, module)
        division = self.divided[component]
        if isinstance(division, str):
            self._lack_heads(path, joint, division)
            return
        for key, heads in zip("qkv", division, strict=True):
            points[f"{path}.{key}.hook_in"] = (joint, Reading("in"))
            points[f"{path}.{key}.hook_out"] = (joint, Reading("out", part=heads))

    def _division(self, component: Any, module: nn.Module) -> list[Heads] | str:
        """Divide a joint projection, or say why that fails."""
        try:
            return divided(component, module, self.d_head)
        except Exception as error:  # noqa: BLE001  as above
            return _told(error)

    def _lack_heads(self, path: str, joint: str, why: str) -> None:
        names = [f"{path}.{key}.{io}" for key in "qkv" for io in ("hook_in", "hook_out")]
        self.found.inside.extend(names)
        self.found.lacks_heads.update(
            dict.fromkeys(
                names,
                f"TransformerLens' adapter cannot divide {joint!r} into queries, keys and values "
                f"({why}); capture {joint!r}, and divide what it returns",
            )
        )

    def _split_heads(self, name: str) -> None:
        module, reading = self.found.points.get(name, (None, None))
        if module is not None and reading is not None and reading.part is None:
            self.found.points[name] = (module, Reading(reading.io, part=Heads(self.d_head)))


def _returned(component: Any) -> Reading:
    """Read what a component hands out: of a router its logits, of an embedding what is scaled."""
    scale = getattr(component, "_output_contribution_scale", 1.0)
    part = None if scale == 1 else functools.partial(torch.mul, other=scale)
    return Reading("out", getattr(component, "logits_index", None) or None, part)


def _as_pattern(attention: str, returned: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    if returned.dim() != _PATTERN_RANK:
        raise OutputError(
            f"'{attention}.hook_pattern' is what its module returns last, but that has the shape "
            f"{tuple(returned.shape)} and is no pattern; call the model with output_attentions=True"
        )
    return returned


def _aliases_of(component: Any, module: nn.Module) -> Mapping[str, Any]:
    """Tell the aliases of a component, which may depend on whether a layer is a mixture."""
    if hasattr(component, "DENSE_SUBMODULE_KEYS"):
        component = copy.deepcopy(component)  # it stands for all layers
        component.set_original_component(module)
    aliases: Mapping[str, Any] = component.hook_aliases
    return aliases


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _add_aliases(found: Translation, prefix: str, aliases: Mapping[str, Any]) -> None:
    for alias, targets in aliases.items():
        named = [targets] if isinstance(targets, str) else targets
        known = next((name for each in named if (name := prefix + each) in found.points), None)
        lacking = next((name for each in named if (name := prefix + each) in found.lacks_heads), "")
        if known is not None:
            found.aliases[prefix + alias] = known
        elif lacking:
            found.inside.append(prefix + alias)
            found.lacks_heads[prefix + alias] = found.lacks_heads[lacking]
