"""The embeddings of a prompt set: all at once where they fit, else when a prompt is drawn.

A prompt takes 0.2 MiB of Stable Diffusion 1.5 and 8 MiB of FLUX, so ten thousand of them do not fit on any card.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from driftrl.types import Conditioning, Policy

FEW = 64
"""Prompts that are embedded without asking how large they are."""
ROOM = 2**30
"""Bytes of embeddings that may stay on the device."""
HOST_ROOM = 4 * 2**30
"""Bytes of embeddings that are kept in main memory where they do not fit on the device."""


def nbytes(conditioning: Conditioning) -> int:
    """Of all rows; the empty prompt is left out."""
    return sum(t.numel() * t.element_size() for t in (conditioning.embeds, *conditioning.extra.values()))


class Embeddings:
    """Rows of a prompt set's conditioning, on the policy's device.

    Where the set is too large, each prompt is embedded on its own when it is drawn, so that what else is drawn with it
    changes nothing: a run that is resumed sees the same embeddings to the bit. Main memory keeps them while there is room.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[str], room: int = ROOM, host_room: int = HOST_ROOM
    ) -> None:
        """Embed all of ``prompts``, or, where they take more than ``room`` bytes, only the first."""
        self._policy, self._prompts, self._host_room = policy, prompts, host_room
        self._kept: dict[int, Conditioning] = {}
        self._all: Conditioning | None = None
        with torch.no_grad():
            if len(prompts) > FEW:
                self.first = policy.encode(prompts[:1])
            if len(prompts) <= FEW or len(prompts) * nbytes(self.first) <= room:
                self._all = policy.encode(prompts)
                self.first = self._all.rows(torch.zeros(1, dtype=torch.long, device=policy.device))

    def held(self, drawn: int) -> int:
        """Bytes on the policy's device while ``drawn`` prompts are at work; on a CPU, with what is kept there."""
        whole, null = len(self._prompts) * nbytes(self.first), self.first.null_embeds
        rest = null.numel() * null.element_size()
        if self._all is not None:
            return whole + rest
        kept = min(whole, self._host_room) if self._policy.device.type == "cpu" else 0
        return drawn * nbytes(self.first) + kept + rest

    def rows(self, index: Tensor | Sequence[int]) -> Conditioning:
        """The conditioning of the prompts at these places, [n] whole numbers."""
        device = self._policy.device
        if self._all is not None:
            return self._all.rows(torch.as_tensor(index, device=device))
        numbers = [int(number) for number in index]
        found = {n: self._kept[n] for n in numbers if n in self._kept}
        missing = sorted(set(numbers) - found.keys())
        if missing:
            with torch.no_grad():
                fresh = self._policy.encode([self._prompts[n] for n in missing], at_once=1)
            for place, number in enumerate(missing):
                row = _moved(fresh.rows(torch.tensor([place], device=device)), torch.device("cpu"))
                found[number] = row
                if (len(self._kept) + 1) * nbytes(row) <= self._host_room:
                    self._kept[number] = row
        rows = [found[number] for number in numbers]
        extra = {name: torch.cat([row.extra[name] for row in rows]) for name in rows[0].extra}
        joined = Conditioning(torch.cat([row.embeds for row in rows]), self.first.null_embeds, extra)
        return _moved(joined, device)


def _moved(rows: Conditioning, device: torch.device) -> Conditioning:
    """The same on another device; the empty prompt stays where it is."""
    extra = {name: value.to(device) for name, value in rows.extra.items()}
    return Conditioning(rows.embeds.to(device), rows.null_embeds, extra)
