"""TransformerLens' hook names on a plain Hugging Face model, without building a bridge.

# NOTE [Where the mapping comes from]
TransformerLens' architecture adapters say which module of a Hugging Face model each component is,
which aliases its hook points have, and how to split a joint projection into queries, keys and
values. All of it is read from the adapter; there is no table of architectures here.
"""

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from actctx._model.adapters import Walk, told
from actctx._model.dry_run import DryRun, dry_run
from actctx._model.stand_in import hollow
from actctx._model.translation import Readout, Translation


@dataclass(frozen=True, eq=False)
class _Known:
    """The names found in a model, valid for as long as it has the same modules.

    It keeps no reference to them, so that it does not keep the model alive.
    """

    attention: tuple[str | None, ...]
    modules: dict[str, weakref.ref[nn.Module]]
    found: Translation

    def holds(self, attention: tuple[str | None, ...], modules: Mapping[str, nn.Module]) -> bool:
        """Return whether it is still valid."""
        return (
            self.attention == attention
            and self.modules.keys() == modules.keys()
            and all(self.modules[name]() is module for name, module in modules.items())
        )


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def translate(model: nn.Module, modules: Mapping[str, nn.Module]) -> Translation:
    """Find TransformerLens' names in a Hugging Face model, with the adapter of its architecture.

    Args:
        model: The model.
        modules: All of its modules, by name.

    Returns:
        The names, the same object as long as the model has the same modules and attention; or why
        there are none. Errors of an adapter are not raised.

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
        return Translation(lacks="TransformerLens 3 or later provides them; install it")
    name = type(model).__name__
    remedy = "give the names of its modules (see actctx.hook_names(model))"
    try:
        best, failed = _best(model, modules, TransformerBridge.hook_aliases)
        if best.points:
            _drop(best, dry_run(model))
            return best
    except Exception as error:  # noqa: BLE001  from a model that cannot have a stand-in
        failed = told(error)
    if failed:
        lacks = f"TransformerLens' adapter fails on this {name} ({failed}); {remedy}"
    else:
        lacks = f"TransformerLens has no adapter for {name}; {remedy}"
    return Translation(lacks=lacks)


def _best(
    model: nn.Module, modules: Mapping[str, nn.Module], aliases: Mapping[str, Any]
) -> tuple[Translation, str]:
    """Find the names of the first adapter that knows the layers, or why an adapter fails."""
    best, failed = Translation(), ""
    kinds = dict.fromkeys(filter(None, map(_adapter, _relatives(model))))
    for name, kind in kinds:
        for number in range(len(_roots(model))):
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            whole = hollow(model, mode)  # a fresh stand-in, since an adapter changes it
            try:
                adapter = kind(_config(whole, name))
                root = _roots(whole)[number]
                found = _walked(adapter, mode, (whole, root), modules, aliases)
            except Exception as error:  # noqa: BLE001  whatever an adapter raises
                failed = failed or told(error)
                continue
            best = best if best.points and not found.has_layers else found
            if best.has_layers:
                return best, ""
    return best, failed


def _roots(model: nn.Module) -> list[nn.Module]:
    """List what an adapter may treat as the whole model.

    That is the model itself; the model as the body of a model with a head, under a name such as
    GPT-2's `transformer`; and the body alone, if the adapter refuses the head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    bodies = [model] if body is None else [model, body]
    return [root for each in bodies for root in (each, _with_head(each))]


def _walked(
    adapter: Any,
    mode: FakeTensorMode,
    models: tuple[nn.Module, nn.Module],
    modules: Mapping[str, nn.Module],
    aliases: Mapping[str, Any],
) -> Translation:
    """Visit the components of an adapter together with the modules of a stand-in.

    Args:
        adapter: A fresh one, which is prepared for the stand-in.
        mode: That of the stand-in's tensors.
        models: The stand-in of the model, which provides the names of modules; and the part of it
            that the adapter is given as the model.
        modules: The modules of the model itself.
        aliases: Those of a bridge.

    """
    whole, root = models
    with mode:
        adapter.prepare_model(root)
    # In reverse, so that the first of several names of a module wins.
    listed = reversed([*whole.named_modules(remove_duplicate=False)])
    named = {module: name for name, module in listed if name in modules}
    found = Translation()
    walk = Walk(found, named, modules, adapter.cfg, mode)
    walk.over(adapter.component_mapping, "", root)
    found.add_aliases("", aliases)
    return found


def _drop(found: Translation, run: DryRun) -> None:
    """Drop the points that no forward reaches, and record why."""
    whose: dict[str, list[str]] = {}
    for alias, name in found.aliases.items():
        whose.setdefault(name, []).append(alias)
    for point, (module, readout) in [*found.points.items()]:
        why = _why_never(run, module, readout)
        for name in (point, *whose.get(point, ())) if why else ():
            found.lack(name, why)


def _why_never(run: DryRun, module: str, readout: Readout) -> str:
    """Explain why a point is never read, if that is so."""
    call = run.calls.get(module)
    if run.is_passed_by(module):
        return (
            f"no forward of this {type(run.model).__name__} calls {module!r} (it may take its "
            "weights alone); capture the module around it, or capture from a TransformerBridge of "
            "the model"
        )
    if readout.io == "in" and not run.is_given_tensor(module):
        return (
            f"what {module!r} is given first is not a tensor; capture what it returns, by its "
            "own name"
        )
    if readout.pattern is None or call is None or call.has_pattern:
        return ""
    if readout.pattern.is_optional:
        asked = run.with_attentions
        asked_call = asked.calls.get(module)
        if not asked.is_whole or asked_call is None or asked_call.has_pattern:
            return ""
    return (
        f"{module!r} returns no attention pattern of the shape batch head query key; capture what "
        "it returns by that name, or capture from a TransformerBridge of the model"
    )


def is_hugging_face(model: nn.Module) -> bool:
    """Recognize a `PreTrainedModel` without importing it; wrappers pass attributes through."""
    return hasattr(type(model), "base_model_prefix")


def why_wrapped(model: nn.Module) -> str:
    """Say which module holds the Hugging Face model, if a wrapper does."""
    named = model.named_modules()
    inside = next((name for name, module in named if is_hugging_face(module)), None)
    if inside is None:
        return ""
    return (
        f"it is a name in the Hugging Face model that this {type(model).__name__} holds as "
        f"{inside!r}; capture from that, as in capture(model.get_submodule({inside!r}), ...), and "
        "run the wrapper as before"
    )


def _relatives(model: nn.Module) -> list[str]:
    """List the architectures that share a model's modules: its own, and others of its kind."""
    from transformers.models.auto import modeling_auto as auto

    config: Any = model.config
    kinds = sorted(name for name in vars(auto) if name.endswith("_MAPPING_NAMES"))
    # Of several, the most common comes first: a decoder, then an encoder, then both.
    first = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    kinds = [*(f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in first), *kinds]
    found = dict.fromkeys(each.__name__ for each in type(model).__mro__)
    for kind in kinds:
        known = getattr(auto, kind, {}).get(config.model_type, ())
        found |= dict.fromkeys([known] if isinstance(known, str) else known)
    return [*found]


def _adapter(architecture: str) -> tuple[str, Any] | None:
    """Find the adapter of an architecture, and its name there."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    ArchitectureAdapterFactory.discover_entry_points()
    # TransformerLens spells some names as the first checkpoints did, such as PhiMoE for Phimoe.
    known = ArchitectureAdapterFactory._adapters
    spelled = {name.lower(): name for name in known}
    name = architecture if architecture in known else spelled.get(architecture.lower())
    if name is None:
        return None
    # Libraries that load images are not needed for a model that is already loaded.
    return name, _without_libraries(known[name])


@functools.cache
def _without_libraries(adapter: Any) -> Any:
    return type(adapter.__name__, (adapter,), {"required_libraries": []})


def _config(model: Any, architecture: str) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    return build_bridge_config_from_hf(model.config, architecture, architecture, torch.float32)


def _with_head(model: nn.Module) -> nn.Module:
    """Put a model without a head where a model with a head has it, as GPT-2's `transformer`."""
    whole: Any = nn.Module()
    whole.add_module(getattr(model, "base_model_prefix", "") or "model", model)
    whole.config = model.config
    return whole  # type: ignore[no-any-return]
