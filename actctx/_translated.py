"""TransformerLens' hook names on a plain Hugging Face model, for which no bridge is built.

# NOTE [Whose mapping it is]
TransformerLens' architecture adapters tell which module of a Hugging Face model each component is,
which aliases its hook points have, and how a joint projection divides into queries, keys and
values. The adapter of the model is asked for all of that; there is no table of architectures here.
"""

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from actctx._dry_run import DryRun, dry_run
from actctx._heads import Heads, heads_of, joint_heads_of
from actctx._outputs import tensor_of
from actctx._patterns import Pattern
from actctx._stand_in import hollow

Part = Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]]

# Components whose modules Hugging Face calls with other shapes, or for other outputs.
_INSIDE = {"rotary_emb", "q_norm", "k_norm"}
_PATTERN_RANK = 4
_PROJECTIONS = {"q.hook_out": "q", "k.hook_out": "k", "v.hook_out": "v", "o.hook_in": "z"}


@dataclass(frozen=True, eq=False)
class Reading:
    """How the value of a hook point is read off a module that has none.

    Attributes:
        io: Whether it is given to the module (`"in"`), or returned by it (`"out"`).
        output: Where in a tuple it is returned, by default the first tensor.
        part: What makes the value of it, such as splitting it into heads.
        pattern: How the value is found among all that is returned, where that takes a look at it.

    """

    io: str
    output: int | None = None
    part: Part | None = None
    pattern: Pattern | None = None

    def found(self, site: str, value: Any) -> Tensor:
        """Find the tensor that is read in what a module was given or returned.

        Raises:
            OutputError: There is none.

        """
        if self.pattern is not None:
            return self.pattern(value)
        return tensor_of(site, value, self.output)

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
        reasons: Why a point is not among them, by its name, where there is a reason of its own,
            such as that queries cannot be divided into heads.

    """

    points: dict[str, tuple[str, Reading]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    lacks: str = ""
    reasons: dict[str, str] = field(default_factory=dict)

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

    @property
    def has_layers(self) -> bool:
        """Whether layers are among them: an adapter of another model may share a head with it."""
        return any(".0." in name for name in self.points)

    @functools.cached_property
    def siblings(self) -> set[str]:
        """The names of all hook points that a bridge has."""
        return {*self.points, *self.inside}

    def why_not(self, name: str) -> str:
        """Say why a hook point of a bridge is not among them, and what to do."""
        if name in self.reasons:
            return self.reasons[name]
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

    attention: tuple[str | None, ...]
    modules: dict[str, weakref.ref[nn.Module]]
    found: Translation

    def holds(self, attention: tuple[str | None, ...], modules: Mapping[str, nn.Module]) -> bool:
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
    configs = {id(each.config): each.config for each in modules.values() if "config" in vars(each)}
    attention = tuple(getattr(each, "_attn_implementation", None) for each in configs.values())
    known = _KNOWN.get(model)
    if known is None or not known.holds(attention, modules):
        held = {name: weakref.ref(module) for name, module in modules.items()}
        known = _KNOWN[model] = _Known(attention, held, _translate(model, modules))
    return known.found


def _translate(model: nn.Module, modules: Mapping[str, nn.Module]) -> Translation:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return Translation(lacks="TransformerLens 3 or later tells them; install it")
    name = type(model).__name__
    remedy = "give the names of its modules (see actctx.hook_names(model))"
    try:
        best, failed = _best(model, modules, TransformerBridge.hook_aliases)
        if best.points:
            _drop(best, dry_run(model))
            return best
    except Exception as error:  # noqa: BLE001  of a model that nothing stands in for
        failed = _told(error)
    if failed:
        lacks = f"TransformerLens' adapter fails on this {name} ({failed}); {remedy}"
    else:
        lacks = f"TransformerLens has no adapter for {name}; {remedy}"
    return Translation(lacks=lacks)


def _best(
    model: nn.Module, modules: Mapping[str, nn.Module], aliases: Mapping[str, Any]
) -> tuple[Translation, str]:
    """Find the names that the first adapter has which knows the layers, or why one fails."""
    best, failed = Translation(), ""
    kinds = dict.fromkeys(filter(None, map(_adapter, _relatives(model))))
    for name, kind in kinds:
        for number in range(len(_roots(model))):
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            whole = hollow(model, mode)  # a fresh one, since an adapter changes it
            try:
                adapter = kind(_config(whole, name))
                root = _roots(whole)[number]
                found = _walked(adapter, mode, (whole, root), modules, aliases)
            except Exception as error:  # noqa: BLE001  what an adapter raises for what it cannot do
                failed = failed or _told(error)
                continue
            best = best if best.points and not found.has_layers else found
            if best.has_layers:
                return best, ""
    return best, failed


def _roots(model: nn.Module) -> list[nn.Module]:
    """List what an adapter may take for the whole model.

    That is the model itself; the same as the body of a model with a head, which it has under a name
    such as `transformer` of GPT-2; and the body alone, where the adapter refuses the head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    bodies = [model] if body is None else [model, body]
    return [root for each in bodies for root in (each, _with_head(each))]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"


def _walked(
    adapter: Any,
    mode: FakeTensorMode,
    models: tuple[nn.Module, nn.Module],
    modules: Mapping[str, nn.Module],
    aliases: Mapping[str, Any],
) -> Translation:
    """Go through the components of an adapter, beside the modules of a stand-in.

    Args:
        adapter: A fresh one, which is prepared for the stand-in.
        mode: That of the stand-in's tensors.
        models: The stand-in of the model, under whose names its modules are; and what of it the
            adapter is given for the model.
        modules: The modules of the model itself.
        aliases: Those of a bridge.

    """
    whole, root = models
    with mode:
        adapter.prepare_model(root)
    # Backwards, so that of several names of a module the first stays.
    listed = reversed([*whole.named_modules(remove_duplicate=False)])
    named = {module: name for name, module in listed if name in modules}
    found = Translation()
    walk = _Walk(found, named, modules, adapter.cfg, mode)
    walk.over(adapter.component_mapping, "", root)
    _add_aliases(found, "", aliases)
    return found


def _drop(found: Translation, run: DryRun) -> None:
    """Drop the points that no forward reaches, and say so where they are asked for."""
    whose: dict[str, list[str]] = {}
    for alias, name in found.aliases.items():
        whose.setdefault(name, []).append(alias)
    for point, (module, reading) in [*found.points.items()]:
        why = _why_never(run, module, reading)
        for name in (point, *whose.get(point, ())) if why else ():
            found.aliases.pop(name, None)
            _lack(found, name, why)


def _why_never(run: DryRun, module: str, reading: Reading) -> str:
    """Say why a point is never read, if that is so."""
    call = run.calls.get(module)
    if run.is_passed_by(module):
        return (
            f"no forward of this {type(run.model).__name__} calls {module!r} (it may take its "
            "weights alone); capture the module around it, or capture from a TransformerBridge of "
            "the model"
        )
    if reading.io == "in" and not run.is_given_tensor(module):
        return f"what {module!r} is given first is no tensor"
    if reading.pattern is None or call is None or call.has_pattern:
        return ""
    if reading.pattern.is_optional:
        asked = run.with_attentions
        asked_call = asked.calls.get(module)
        if not asked.is_whole or asked_call is None or asked_call.has_pattern:
            return ""
    return (
        f"{module!r} returns no attention pattern of the shape batch head query key; capture what "
        "it returns by that name, or capture from a TransformerBridge of the model"
    )


def _lack(found: Translation, name: str, why: str) -> None:
    found.points.pop(name, None)
    found.inside.append(name)
    found.reasons[name] = why


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
    """Name the architectures whose modules a model has: its own, and others of its kind."""
    from transformers.models.auto import modeling_auto as auto

    config: Any = model.config
    kinds = sorted(name for name in vars(auto) if name.endswith("_MAPPING_NAMES"))
    # Of several, what most people load: a decoder first, then an encoder, then both.
    first = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    kinds = [*(f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in first), *kinds]
    found = dict.fromkeys(each.__name__ for each in type(model).__mro__)
    for kind in kinds:
        known = getattr(auto, kind, {}).get(config.model_type, ())
        found |= dict.fromkeys([known] if isinstance(known, str) else known)
    return [*found]


def _adapter(architecture: str) -> tuple[str, Any] | None:
    """Find the adapter of an architecture, and the name that it has there."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    ArchitectureAdapterFactory.discover_entry_points()
    # It spells some names as the first checkpoints did, such as PhiMoE for Phimoe.
    known = ArchitectureAdapterFactory._adapters
    spelled = {name.lower(): name for name in known}
    name = architecture if architecture in known else spelled.get(architecture.lower())
    if name is None:
        return None
    # Libraries that load a model's pictures are not needed for one that is loaded.
    return name, _without_libraries(known[name])


@functools.cache
def _without_libraries(adapter: Any) -> Any:
    return type(adapter.__name__, (adapter,), {"required_libraries": []})


def _config(model: Any, architecture: str) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    return build_bridge_config_from_hf(model.config, architecture, architecture, torch.float32)


def _with_head(model: nn.Module) -> nn.Module:
    """Put a model that has no head where a model with one has it, as `transformer` of GPT-2."""
    whole: Any = nn.Module()
    whole.add_module(getattr(model, "base_model_prefix", "") or "model", model)
    whole.config = model.config
    return whole  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class _Walk:
    """Goes through the components of an adapter, beside the modules that they stand for.

    Attributes:
        found: What it finds.
        named: The name of each module of the stand-in.
        modules: The modules of the model itself, by name.
        sizes: The adapter's config.
        mode: That of the stand-in's tensors.
        divided: How joint projections divide, by what they have in common.

    """

    found: Translation
    named: Mapping[nn.Module, str]
    modules: Mapping[str, nn.Module]
    sizes: Any
    mode: FakeTensorMode
    divided: dict[Any, dict[str, Heads | str]] = field(default_factory=dict)

    def over(self, components: Mapping[str, Any], prefix: str, module: nn.Module) -> None:
        """Go through the components of one module."""
        for key, component in components.items():
            target = module if component.name is None else _submodule(module, component.name)
            if target is None:  # a part of a joint module, or of another model
                if not _is_optional(component):
                    self._hide(f"{prefix}{key}", "hook_in", "hook_out")
            elif component.is_list_item and isinstance(target, nn.ModuleList):
                for number, child in enumerate(target):
                    # As on a bridge, whose layers may have other parts, and other aliases for them.
                    # A copy of the config would be as right, but takes longer.
                    layer = copy.deepcopy(component, {id(self.sizes): self.sizes})
                    self._add(layer, f"{prefix}{key}.{number}", child)
            else:
                self._add(component, prefix + key, target)

    def _add(self, component: Any, path: str, module: nn.Module) -> None:
        points = self.found.points
        if component.name is not None:
            with contextlib.suppress(Exception), self.mode:
                # What it raises is for a bridge, such as that it cannot split its weights.
                component.set_original_component(module)
        self.over(component.submodules, f"{path}.", module)
        own = (name for name in component._modules if name.startswith("hook_"))
        self._hide(path, *own)
        name = self.named.get(module)
        if name is None or path.rpartition(".")[2] in _INSIDE:
            self._hide(path, "hook_in", "hook_out")
            return
        if component.name is None:  # a container that is no module is what its parts are
            for io, part in (("hook_in", "in"), ("hook_out", "out")):
                if f"{path}.{part}.{io}" in points:
                    points[f"{path}.{io}"] = points[f"{path}.{part}.{io}"]
        else:
            points[f"{path}.hook_in"] = (name, Reading("in"))
            points[f"{path}.hook_out"] = (name, _returned(component))
            self._read_latents(component, path)
        if hasattr(component, "hook_pattern"):
            self._split_heads(component, path, module)
            self._add_patterns(component, path, module)
        self._add_aliases(component, f"{path}.", module)

    def _read_latents(self, component: Any, path: str) -> None:
        """Read latents of keys and values without the axis that Hugging Face has for one head."""
        points = self.found.points
        if not hasattr(component, "hook_kv_latent"):
            return
        for io in ("in", "out"):
            name = f"{path}.kv_b_proj.hook_{io}"
            if name in points:
                points[name] = (points[name][0], Reading(io, part=_without_heads))

    def _hide(self, path: str, *names: str) -> None:
        self.found.inside.extend(f"{path}.{name}" for name in names)

    def _split_heads(self, component: Any, path: str, module: nn.Module) -> None:
        """Split queries, keys, values and what is mixed of them into heads."""
        points = self.found.points
        is_joint = f"{path}.qkv.hook_out" in points and hasattr(component, "split_qkv_matrix")
        if is_joint:
            joint, _ = points.pop(f"{path}.qkv.hook_out")
            del points[f"{path}.qkv.hook_in"]
            for key in "qkv":
                points[f"{path}.{key}.hook_in"] = (joint, Reading("in"))
                points[f"{path}.{key}.hook_out"] = (joint, Reading("out"))
            heads = self._joint_heads(component, module)
        else:
            heads = heads_of(component, module, self.sizes)
        for ending, key in _PROJECTIONS.items():
            name = f"{path}.{ending}"
            if key not in heads or name not in points:
                continue
            split, (projection, reading) = heads[key], points[name]
            if isinstance(split, Heads):
                points[name] = (projection, Reading(reading.io, part=split))
            elif is_joint and key in "qkv":
                why = (
                    f"TransformerLens' adapter cannot divide {projection!r} into queries, keys and "
                    f"values ({split}); capture {projection!r}, and divide what it returns"
                )
                _lack(self.found, name, why)
                _lack(self.found, name.replace("hook_out", "hook_in"), why)
            else:
                verb, io = ("is given", ", io='in'") if reading.io == "in" else ("returns", "")
                why = (
                    f"what {projection!r} {verb} cannot be divided into heads for certain "
                    f"({split}); capture it whole, by Site({projection!r}{io})"
                )
                _lack(self.found, name, why)

    def _joint_heads(self, component: Any, module: nn.Module) -> dict[str, Heads | str]:
        """Divide a joint projection, or say why that fails."""
        shapes = tuple(tuple(each.shape) for each in module.parameters())
        alike = (type(component), component.name, shapes)
        if alike not in self.divided:
            try:
                self.divided[alike] = joint_heads_of(component, module, self.sizes)
            except Exception as error:  # noqa: BLE001  as above
                why = dict.fromkeys("qkv", _told(error))
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
                    "which computes no pattern; load the model with attn_implementation='eager', "
                    "or capture from a TransformerBridge of it"
                )
                _lack(self.found, f"{path}.{point}", why)
                continue
            pattern = Pattern(
                name=f"{path}.{point}",
                module=name,
                attention=weakref.ref(self.modules[name]),
                place=place,
                is_part=is_merged or getattr(module, "sinks", None) is not None,
                is_optional="output_attentions" in inspect.signature(module.forward).parameters,
            )
            reading = Reading("out", place, pattern=pattern)
            self.found.points[f"{path}.{point}"] = (name, reading)

    def _implementation(self, name: str) -> str | None:
        """Tell how an attention module attends: towers of one model may do so in different ways."""
        while name and "config" not in vars(self.modules[name]):
            name = name.rpartition(".")[0]
        config: Any = self.modules[name].config
        return getattr(config, "_attn_implementation", None)

    def _add_aliases(self, component: Any, prefix: str, module: nn.Module) -> None:
        """Add the aliases of a component, but those of parts that the layer does not have."""
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
        _add_aliases(self.found, prefix, aliases)


def _is_optional(component: Any) -> bool:
    return bool(getattr(component, "optional", False))


def _returned(component: Any) -> Reading:
    """Read what a component hands out: of a router its logits, of an embedding what is scaled."""
    scale = getattr(component, "_output_contribution_scale", 1.0)
    part = None if scale == 1 else functools.partial(torch.mul, other=scale)
    if hasattr(component, "hook_comb"):  # of a hyper-connection, what it makes of its streams
        return Reading("out", 2)
    return Reading("out", getattr(component, "logits_index", None) or None, part)


def _without_heads(latent: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return latent.squeeze(1) if latent.dim() == _PATTERN_RANK else latent


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _add_aliases(found: Translation, prefix: str, aliases: Mapping[str, Any]) -> None:
    """Add aliases, each of the first of its targets that a bridge has."""
    inside = {*found.inside}
    for alias, targets in aliases.items():
        listed = [prefix + each for each in ([targets] if isinstance(targets, str) else targets)]
        target = next((each for each in listed if each in found.points or each in inside), None)
        if target is None:
            continue
        if target in found.points:
            found.aliases[prefix + alias] = target
            continue
        found.inside.append(prefix + alias)
        if target in found.reasons:
            found.reasons[prefix + alias] = found.reasons[target]
