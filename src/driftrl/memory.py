"""What a method carries from one iteration to the next: past rewards, a reference that moves, a policy that draws, an average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from driftrl.advantages import AdvantageRule, History, no_history, remember
from driftrl.checks import InputError
from driftrl.multipliers import Multipliers, begun, followed
from driftrl.objectives.gate import Anchor, reference_is_due
from driftrl.shaping import Shaping
from driftrl.types import Policy

COPIES = ("reference", "behavior", "average", "anchor")
"""Of the parameters, that a method may keep."""


@dataclass(frozen=True)
class Memory:
    """Empty for GRPO and DRIFT. Never changed in place: an iteration that is skipped leaves what there was."""

    history: History | None = None
    """The last rewards of each prompt of the set (DDPO)."""
    reference: tuple[Tensor, ...] | None = None
    """The adapter's parameters when the reference last moved (GARDO); None while it is the base model."""
    age: int = 0
    """Iterations since then."""
    behavior: tuple[Tensor, ...] | None = None
    """The parameters that samples are drawn with (DiffusionNFT), or were (AWM, DGPO); None where no objective asks for them."""
    average: tuple[Tensor, ...] | None = None
    """An exponential moving average of the parameters, which checkpoints hand out; None where there is none."""
    anchor: tuple[Tensor, ...] | None = None
    """Another one, which the loss is held to (AWM); None where there is none."""
    multipliers: Multipliers | None = None
    """Each prompt's lambda, where a share of its diversity is to be kept."""

    @staticmethod
    def empty(
        rule: AdvantageRule,
        prompts: int,
        policy: Policy,
        own_behavior: bool = False,
        averaged: bool = False,
        anchored: bool = False,
        ratio: float | None = None,
    ) -> Memory:
        """At the start of a run over a set of ``prompts``; with ``own_behavior`` a copy of ``policy`` draws, if ``averaged`` an average
        of it is kept, and if ``anchored`` another one, which its loss is held to. Lambda begins at ``ratio`` where each prompt is to
        have its own.
        """
        running = rule.baseline == "running"
        return Memory(
            no_history(prompts, rule.history, policy.device) if running else None,
            behavior=_copies(policy) if own_behavior else None,
            average=_copies(policy) if averaged else None,
            anchor=_copies(policy) if anchored else None,
            multipliers=None if ratio is None else begun(prompts, ratio),
        )

    def with_rewards(self, which: Sequence[int], rewards: Tensor) -> Memory:
        """With what the prompts ``which`` earned now, ``rewards`` [P, N], if rewards are remembered at all."""
        if self.history is None:
            return self
        return replace(self, history=remember(self.history, which, rewards))

    def with_diversity(
        self, which: Sequence[int], diversity: Tensor | None, shaping: Shaping
    ) -> tuple[Memory, Tensor | None, Tensor | None]:
        """With how varied the prompts ``which`` are now, ``diversity`` [P], and lambda and the share of the base model's diversity of
        each, [P]; as it is where no share is to be kept.
        """
        if self.multipliers is None or shaping.target is None or diversity is None:
            return self, None, None
        new, ratio, share = followed(
            self.multipliers, which, diversity, shaping.target, shaping.ratio, shaping.target_rate
        )
        return replace(self, multipliers=new), ratio.to(diversity), share

    def rows(self, which: Sequence[int]) -> History | None:
        """The past of the prompts ``which``."""
        return None if self.history is None else self.history.rows(which)

    def drawing(self, policy: Policy) -> AbstractContextManager[None]:
        """Within this context ``policy`` is the one that draws."""
        return nullcontext() if self.behavior is None else _standing_in(policy.parameters(), self.behavior)

    def anchoring(self, policy: Policy) -> AbstractContextManager[None]:
        """Within this context ``policy`` is the average that its loss is held to."""
        return nullcontext() if self.anchor is None else _standing_in(policy.parameters(), self.anchor)

    def handed_out(self, policy: Policy) -> AbstractContextManager[None]:
        """Within this context ``policy`` is the one that checkpoints hand out."""
        return nullcontext() if self.average is None else _standing_in(policy.parameters(), self.average)

    def after(
        self,
        divergence: float,
        anchor: Anchor,
        policy: Policy,
        kept: float = 0.0,
        averaged: float = 0.0,
        anchor_kept: float = 0.0,
    ) -> Memory:
        """After an update that ended ``divergence`` away from the reference: moved to ``policy`` if it is due. A copy that draws
        keeps the share ``kept`` of itself, an average ``averaged``, one that the loss is held to ``anchor_kept``, and they follow
        ``policy`` with the rest.
        """
        moved = replace(
            self,
            behavior=_following(self.behavior, policy, kept),
            average=_following(self.average, policy, averaged),
            anchor=_following(self.anchor, policy, anchor_kept),
        )
        if not anchor.moves:
            return moved
        if reference_is_due(divergence, self.age + 1, anchor.threshold, anchor.every):
            return replace(moved, reference=_copies(policy), age=0)
        return replace(moved, age=self.age + 1)

    def reference_of(self, policy: Policy) -> AbstractContextManager[None]:
        """Within this context ``policy`` is the reference; enter it outside of any gradient that is to be taken."""
        if self.reference is None:
            return policy.reference()
        return _standing_in(policy.parameters(), self.reference)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name, for a checkpoint; nothing for an empty memory."""
        found: dict[str, Tensor] = {}
        if self.history is not None:
            found |= {"history/values": self.history.values, "history/filled": self.history.filled}
        if self.multipliers is not None:
            found |= {f"multipliers/{name}": value for name, value in self.multipliers._asdict().items()}
        for name in COPIES:
            found |= {f"{name}/{i:05d}": value for i, value in enumerate(getattr(self, name) or ())}
        if self.age or self.reference is not None:
            found["age"] = torch.tensor(self.age)
        return found

    def restored(self, found: Mapping[str, Tensor], policy: Policy) -> Memory:
        """This empty memory, with what `tensors` gave.

        Raises:
            InputError: if it belongs to another prompt set, adapter or method.
        """
        # As it was called in earlier checkpoints.
        found = {key.replace("drawer/", "behavior/"): value for key, value in found.items()}
        history = self.history
        if history is not None and "history/values" in found:
            if found["history/values"].shape != history.values.shape:
                raise InputError(
                    f"the checkpoint remembers {list(found['history/values'].shape)} rewards; this run's prompt set "
                    f"needs {list(history.values.shape)}: has the prompt file changed?"
                )
            history = History(*(found[f"history/{k}"].to(policy.device) for k in History._fields))
        reference, behavior, average, held = (_restored_copies(name, found, policy) for name in COPIES)
        if (behavior is None) != (self.behavior is None):
            raise InputError(
                f"the checkpoint has {'a' if behavior else 'no'} copy that draws, and objective.loss asks for "
                f"{'none' if behavior else 'one'}: it is of another method"
            )
        if (average is None) != (self.average is None):
            raise InputError(
                f"the checkpoint has {'an' if average else 'no'} average of its weights, and optimizer.ema_decay asks for "
                f"{'none' if average else 'one'}"
            )
        if (held is None) != (self.anchor is None):
            raise InputError(
                f"the checkpoint has {'an' if held else 'no'} average that its loss is held to, and objective.awm_decay asks for "
                f"{'none' if held else 'one'}"
            )
        age = int(found["age"]) if "age" in found else 0
        return Memory(history, reference, age, behavior, average, held, self._restored_multipliers(found))

    def _restored_multipliers(self, found: Mapping[str, Tensor]) -> Multipliers | None:
        if self.multipliers is None or "multipliers/ratio" not in found:
            return self.multipliers
        values = Multipliers(*(found[f"multipliers/{name}"].cpu() for name in Multipliers._fields))
        if values.ratio.shape != self.multipliers.ratio.shape:
            raise InputError(
                f"the checkpoint has the lambdas of {len(values.ratio)} prompts; this run's prompt set has "
                f"{len(self.multipliers.ratio)}: has the prompt file changed?"
            )
        return values


def _copies(policy: Policy) -> tuple[Tensor, ...]:
    return tuple(p.detach().clone() for p in policy.parameters())


def _following(copies: tuple[Tensor, ...] | None, policy: Policy, kept: float) -> tuple[Tensor, ...] | None:
    """Copies that have moved towards ``policy``, and kept the share ``kept`` of themselves."""
    if copies is None:
        return None
    return tuple(new.lerp_(old, kept) for old, new in zip(copies, _copies(policy), strict=True))


def _restored_copies(name: str, found: Mapping[str, Tensor], policy: Policy) -> tuple[Tensor, ...] | None:
    """The parameters that `Memory.tensors` gave under ``name/``, if there are any."""
    copies = [found[key] for key in sorted(found) if key.startswith(f"{name}/")]
    if not copies:
        return None
    parameters = policy.parameters()
    if [c.shape for c in copies] != [p.shape for p in parameters]:
        raise InputError(f"the checkpoint's {name} does not fit this model, rank or targets")
    # In the memory format of the parameters, on which rounding depends.
    return tuple(torch.empty_like(p.data).copy_(c) for p, c in zip(parameters, copies, strict=True))


@contextmanager
def _standing_in(parameters: list[torch.nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within this context the parameters hold ``values``; pointers are exchanged, nothing is copied."""
    own = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
