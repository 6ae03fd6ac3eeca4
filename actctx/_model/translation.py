"""TransformerLens' names in a Hugging Face model, and how to get each value from a module of it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from actctx._model.patterns import Pattern
from actctx._model.structure import tensor_of

Part = Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]]

INSIDE = frozenset({"rotary_emb", "q_norm", "k_norm"})
"""Components whose modules have other input shapes or other outputs in Hugging Face."""


@dataclass(frozen=True, eq=False)
class Readout:
    """How to get the value of a hook point from a module that does not have it.

    Attributes:
        io: Whether it is an input (`"in"`) or an output (`"out"`) of the module.
        output: Its position in a tuple, by default the first tensor.
        part: Turns it into the value, for example by splitting it into heads.
        pattern: Finds an attention pattern among all outputs.

    """

    io: str
    output: int | None = None
    part: Part | None = None
    pattern: Pattern | None = None

    def found(self, site: str, value: Any) -> Tensor:
        """Find the tensor in the inputs or outputs of a module.

        Raises:
            OutputError: It is not there.

        """
        if self.pattern is not None:
            return self.pattern(value)
        return tensor_of(site, value, self.output)

    def of(self, activation: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Get the value from the tensor, as a view if possible."""
        return activation if self.part is None else self.part(activation)


@dataclass(frozen=True, eq=False)
class Translation:
    """TransformerLens' names in a Hugging Face model.

    Attributes:
        points: The module and the readout of each hook point, by its canonical name.
        aliases: The canonical name of each alias.
        inside: The hook points that a bridge has in addition to the points.
        lacks: Why there are no names at all.
        reasons: Why a point is missing, by its name, if it has its own reason, such as queries that
            cannot be split into heads.

    """

    points: dict[str, tuple[str, Readout]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    lacks: str = ""
    reasons: dict[str, str] = field(default_factory=dict)

    def canonical(self, name: str) -> str | None:
        """Return the canonical name of a hook point, or None if there is none."""
        name = self.aliases.get(name, name)
        return name if name in self.points else None

    def lack(self, name: str, why: str) -> None:
        """Remove a name, and record why."""
        self.points.pop(name, None)
        self.aliases.pop(name, None)
        self.inside.append(name)
        self.reasons[name] = why

    def add_aliases(self, prefix: str, aliases: Mapping[str, Any]) -> None:
        """Add aliases, each for the first of its targets that a bridge has."""
        inside = {*self.inside}
        for alias, targets in aliases.items():
            listed = [
                prefix + each for each in ([targets] if isinstance(targets, str) else targets)
            ]
            target = next((each for each in listed if each in self.points or each in inside), None)
            if target is None:
                continue
            if target in self.points:
                self.aliases[prefix + alias] = target
                continue
            self.inside.append(prefix + alias)
            if target in self.reasons:
                self.reasons[prefix + alias] = self.reasons[target]

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """The names of each hook point, by its canonical name, which comes first."""
        named = {name: [name] for name in self.points}
        for alias, name in self.aliases.items():
            named[name].append(alias)
        return named

    @property
    def has_layers(self) -> bool:
        """Whether they include layers: an adapter of another model may share only a head."""
        return any(".0." in name for name in self.points)

    @functools.cached_property
    def siblings(self) -> set[str]:
        """The names of all hook points that a bridge has."""
        return {*self.points, *self.inside}

    def why_not(self, name: str) -> str:
        """Explain why a hook point of a bridge is missing, and what to do."""
        if name in self.reasons:
            return self.reasons[name]
        if not INSIDE.isdisjoint(name.split(".")):
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
            "Hugging Face's modules do not expose it; capture it from a TransformerBridge of the "
            "model"
        )
