"""The embeddings of a prompt set: on the device where they fit, else in main memory, else made when a prompt is drawn.

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
HOST_ROOM = 8 * 2**30
"""Bytes of embeddings that each process keeps in main memory where they do not fit on the device."""
HALVES = (torch.bfloat16, torch.float16)


def nbytes(conditioning: Conditioning) -> int:
    """Of all rows; the empty prompt is left out."""
    return sum(t.numel() * t.element_size() for t in (conditioning.embeds, *conditioning.extra.values()))


class Embeddings:
    """Rows of a prompt set's conditioning, on the policy's device.

    Where the set is too large, each prompt is embedded on its own, so that what else is drawn with it changes nothing: a run that is
    resumed sees the same embeddings to the bit. That is done at the start, for text encoders are slow to move, and main memory keeps
    them; of a set that is too large for it too, when a prompt is drawn.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[str], room: int = ROOM, host_room: int = HOST_ROOM
    ) -> None:
        """Embed all of ``prompts``, or, where they take more than ``room`` bytes on the device and ``host_room`` in main memory,
        only the first.
        """
        self._policy, self._prompts, self._host_room = policy, prompts, host_room
        self._kept: dict[int, Conditioning] = {}
        self._all: Conditioning | None = None
        with torch.no_grad():
            if len(prompts) > FEW:
                self.first = policy.encode(prompts[:1])
            if len(prompts) <= FEW or len(prompts) * nbytes(self.first) <= room:
                self._all = policy.encode(prompts)
                self.first = self._all.rows(torch.zeros(1, dtype=torch.long, device=policy.device))
        if self._all is None and len(prompts) * nbytes(_kept(self.first)) <= host_room:
            together = max(1, room // nbytes(self.first))
            for at in range(0, len(prompts), together):
                self._embed(range(at, min(at + together, len(prompts))))

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
        if missing := sorted(set(numbers) - found.keys()):
            found |= self._embed(missing)
        rows = [found[number] for number in numbers]
        extra = {name: torch.cat([row.extra[name] for row in rows]) for name in rows[0].extra}
        joined = Conditioning(torch.cat([row.embeds for row in rows]), self.first.null_embeds, extra)
        return _moved(joined, device)

    @torch.no_grad()
    def _embed(self, numbers: Sequence[int]) -> dict[int, Conditioning]:
        """The prompts at these places, each on its own, in main memory, which keeps them while there is room."""
        device, found = self._policy.device, {}
        fresh = self._policy.encode([self._prompts[n] for n in numbers], at_once=1)
        for place, number in enumerate(numbers):
            row = _kept(fresh.rows(torch.tensor([place], device=device)))
            found[number] = row
            if (len(self._kept) + 1) * nbytes(row) <= self._host_room:
                self._kept[number] = row
        return found


def _kept(rows: Conditioning) -> Conditioning:
    """The same in main memory, in half precision where that is exact, as what half-precision encoders give is; the empty prompt stays
    where it is.
    """
    extra = {name: _short(value.cpu()) for name, value in rows.extra.items()}
    return Conditioning(_short(rows.embeds.cpu()), rows.null_embeds, extra)


def _short(value: Tensor) -> Tensor:
    if value.dtype == torch.float32:
        for dtype in HALVES:
            if torch.equal(value.to(dtype).float(), value):
                return value.to(dtype)
    return value


def _moved(rows: Conditioning, device: torch.device) -> Conditioning:
    """What `_kept` gave, as it was, on the device."""

    def long(value: Tensor) -> Tensor:
        return value.to(device, torch.float32 if value.dtype in HALVES else value.dtype)

    extra = {name: long(value) for name, value in rows.extra.items()}
    return Conditioning(long(rows.embeds), rows.null_embeds, extra)
