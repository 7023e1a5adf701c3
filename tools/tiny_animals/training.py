"""The loop that trains every network of tiny-animals: two single-threaded processes, EMA, resumable.

Two processes of one thread each use two cores better than one process of two, and slow down gracefully when
something else runs beside them.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def rank() -> int:
    """This process's number among those that `torchrun` started."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> None:
    """Join the other processes, if there are any; each computes with one thread."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


class Training:
    """Trains `model` by AdamW with warm-up, constant and linearly falling learning rate, and keeps its EMA.

    The schedule counts images, so it does not depend on the machine. A file named `finish` in `folder` starts
    the falling part at once. State is saved every `save_minutes` and taken up again on the next start.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        images: int,
        batch: int,
        lr: float,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
        falling: float = 0.25,
        save_minutes: float = 4.0,
    ) -> None:
        self.model, self.folder, self.images, self.batch, self.lr = model, folder, images, batch, lr
        self.ema_decay, self.falling, self.save_minutes = ema_decay, falling, save_minutes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.step, self.seen, self.fall_from = 0, 0, int(images * (1 - falling))
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        path = self.folder / "state.json"
        if not path.is_file():
            return
        state = json.loads(path.read_text())
        self.step, self.seen = state["step"], state["seen"]
        self.model.load_state_dict(load_file(self.folder / "model.safetensors"))
        self.ema.load_state_dict(load_file(self.folder / "ema.safetensors"))
        moments = load_file(self.folder / "moments.safetensors")
        for i, p in enumerate(self.parameters):
            self.optimiser.state[p] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": moments[f"{i}.exp_avg"].view_as(p),
                "exp_avg_sq": moments[f"{i}.exp_avg_sq"].view_as(p),
            }
        print(f"resumed {self.folder.name} at {self.seen:,} images", flush=True)

    def _save(self) -> None:
        if rank() != 0:
            return
        moments = {
            f"{i}.{k}": self.optimiser.state[p][k].contiguous()
            for i, p in enumerate(self.parameters)
            for k in ("exp_avg", "exp_avg_sq")
        }
        save_file(
            {k: v.contiguous() for k, v in self.model.state_dict().items()}, self.folder / "model.safetensors"
        )
        save_file(
            {k: v.contiguous() for k, v in self.ema.state_dict().items()}, self.folder / "ema.safetensors"
        )
        save_file(moments, self.folder / "moments.safetensors")
        (self.folder / "state.json").write_text(json.dumps({"step": self.step, "seen": self.seen}))

    def _rate(self) -> float:
        if (self.folder / "finish").exists() and self.fall_from > self.seen:
            self.fall_from = self.seen
            self.images = int(self.seen / (1 - self.falling))
        warm = min(1.0, (self.step + 1) / 200)
        fall = (self.images - self.seen) / max(1, self.images - self.fall_from)
        return self.lr * warm * min(1.0, max(0.02, fall))

    def run(self, loss: Callable[[int, torch.Generator], dict[str, Tensor]]) -> nn.Module:
        """Train until `images` were seen; `loss(n, generator)` returns terms, of which "loss" is minimised."""
        start = last_save = last_print = time.time()
        first_seen, averages = self.seen, {}
        while True:
            rate = self._rate()
            ended = torch.tensor([float(self.images), float(self.fall_from)], dtype=torch.float64)
            if world() > 1:  # all processes agree on when to fall and to end
                dist.broadcast(ended, 0)
                self.images, self.fall_from = int(ended[0]), int(ended[1])
            if self.seen >= self.images:
                break
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            generator = torch.Generator().manual_seed(1_000_003 * (self.step * world() + rank()) % 2**63)
            terms = loss(self.batch // world(), generator)
            self.optimiser.zero_grad(set_to_none=True)
            terms["loss"].backward()
            if world() > 1:
                flat = torch.cat([p.grad.flatten() for p in self.parameters])
                dist.all_reduce(flat)
                flat /= world()
                for p, g in zip(
                    self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
                ):
                    p.grad.copy_(g.view_as(p))
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.step += 1
            self.seen += self.batch
            decay = min(self.ema_decay, self.step / (self.step + 20))
            with torch.no_grad():
                ema = [
                    p
                    for p, q in zip(self.ema.parameters(), self.model.parameters(), strict=True)
                    if q.requires_grad
                ]
                torch._foreach_lerp_(ema, [p.data for p in self.parameters], 1 - decay)
            for name, term in terms.items():
                value = float(term.detach())
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            now = time.time()
            if rank() == 0 and now - last_print > 20:
                last_print = now
                speed = (self.seen - first_seen) / (now - start)
                shown = " ".join(f"{k} {v:.5f}" for k, v in averages.items())
                print(
                    f"{self.seen:>9,} / {self.images:,} images  {speed:6.1f}/s  lr {rate:.1e}  {shown}",
                    flush=True,
                )
            if now - last_save > 60 * self.save_minutes:
                last_save = now
                self._save()
        self._save()
        return self.ema
