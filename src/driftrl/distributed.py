"""Several processes that train as one: who has which prompts, and what they tell each other.

A launcher (torchrun, ``accelerate launch``) starts the processes; `join` lets them meet. One process alone, `ALONE`,
tells nobody anything: each method then returns what it was given.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from driftrl.checks import InputError, NotFiniteError, RunFailedError

if TYPE_CHECKING:  # who speaks for all is asked before torch is needed
    from torch import Tensor

PATIENCE = timedelta(hours=2)
"""How long the others wait for a process, whose reward may be slow, before the run ends."""
BUCKET = 2**24
"""Numbers that are summed in one message."""
LINGER = 3.0
"""Seconds that the first process has, to say what is wrong for all."""
SHARED: tuple[type[Exception], ...] = (InputError, RunFailedError, NotFiniteError)
"""Errors that all processes raise where one does, the gravest first."""


class LostProcessError(RuntimeError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees it. What they are to do together, all must call."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """The GPU of this process, where there are any."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` places are this process's: consecutive ones, as evenly as can be."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of `share`; their numbers may differ, the other dimensions not."""
        if self.size == 1:
            return rows
        import torch

        with _listening() as group:
            count = torch.tensor([len(rows)], device=rows.device)
            counts = [torch.empty_like(count) for _ in range(self.size)]
            group.all_gather(counts, count)
            most = max(int(c) for c in counts)
            padded = rows.new_zeros(most, *rows.shape[1:])
            padded[: len(rows)] = rows
            everyone = [torch.empty_like(padded) for _ in range(self.size)]
            group.all_gather(everyone, padded)
        return torch.cat([part[: int(n)] for part, n in zip(everyone, counts, strict=True)])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes: the same bits in all of them."""
        if self.size == 1:
            return
        import torch

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _listening() as group:
                group.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest value of each element over the processes."""
        if self.size == 1:
            return tensor
        with _listening() as group:
            group.all_reduce(tensor := tensor.clone(), op=group.ReduceOp.MAX)
        return tensor

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        import torch

        return int(self.largest(torch.tensor(number)))

    def texts(self, text: str) -> list[str]:
        """The text of each process."""
        if self.size == 1:
            return [text]
        import torch

        content = text.encode()
        sizes = self.gather(torch.tensor([len(content)])).tolist()
        letters = self.gather(torch.tensor(list(content), dtype=torch.uint8))
        return [bytes(part.tolist()).decode() for part in letters.split(sizes)]

    def first(self, value: Any) -> Any:
        """What the first process says, as JSON has it; what the others hand in is ignored."""
        return value if self.size == 1 else json.loads(self.texts(json.dumps(value) if self.leads else "")[0])

    def wait(self) -> None:
        """Until all processes are here."""
        import torch

        self.largest(torch.zeros(1))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What stops one process in here stops all, with the same error, so that they decide alike what comes next.

        Raises:
            InputError: as the block does, here or in another process; so too RunFailedError and NotFiniteError.
        """
        problem = ""
        try:
            yield
        except SHARED as error:
            if self.size == 1:
                raise
            kind = next(n for n, kind in enumerate(SHARED) if isinstance(error, kind))
            problem = f"{kind} {error}"
        found = [text for text in self.texts(problem) if text]
        if found:
            number, _, message = min(found, key=lambda text: text[0]).partition(" ")
            shared = SHARED[int(number)](message)
            _everywhere.add(shared)
            raise shared


ALONE = Team()
_everywhere: WeakSet[Exception] = WeakSet()
"""Errors that all processes raise alike."""


def raised_by_all(error: Exception) -> bool:
    """Whether every process raises this error, so that the first one's message is enough."""
    return error in _everywhere


def in_parts(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is there in parts, which all processes must ask for; any other as it is."""
    shared: Any = tensor
    return shared.full_tensor() if in_parts(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; no gradient flows through it."""
    shared: Any = tensor.detach()
    return shared.to_local() if in_parts(tensor) else shared


def part(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which all processes have, shared out as ``like`` is; itself where that is not."""
    if not in_parts(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    return distribute_tensor(value.to(like.device), place.device_mesh, place.placements, src_data_rank=None)


def join() -> Team:
    """The processes that were launched together, after meeting them; `ALONE` where none were.

    Raises:
        InputError: for a launch that driftrl cannot take part in.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return ALONE
    for name, flag in (
        ("FSDP", "--use_fsdp"),
        ("DEEPSPEED", "--use_deepspeed"),
        ("MEGATRON_LM", "--use_megatron_lm"),
    ):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InputError(
                f"accelerate launch {flag}: driftrl shards prompts, not weights; those too, by FSDP, with "
                f"adapter.kind=full and adapter.shard=true, but launched without {flag} (docs/guide/several-gpus.md)"
            )
    import torch
    from accelerate import PartialState

    environment = dict(os.environ)
    met = torch.distributed.is_initialized()
    on_cpu = not torch.cuda.is_available()
    try:
        state = PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "cuda:nccl,cpu:gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        _forget(environment)
        raise InputError(
            f"WORLD_SIZE is {size}, but the processes cannot meet: {str(error).splitlines()[0]}; start them with "
            "torchrun or accelerate launch"
        ) from error
    here = state.num_processes
    if here != size:
        _forget(environment)
        raise InputError(
            f"WORLD_SIZE is {size}, but {here} came; start them with torchrun or accelerate launch"
        )
    if not met:  # left to the interpreter's end, its threads may be in the way
        atexit.register(state.destroy_process_group)
    return Team(state.process_index, state.num_processes, str(state.device))


def _forget(environment: dict[str, str]) -> None:
    """Undo what accelerate half did: it would be in the way of the next run in this Python."""
    from accelerate import PartialState

    PartialState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


def leads() -> bool:
    """Whether this process speaks for all, known before they meet."""
    return int(os.environ.get("RANK", "0")) == 0


def linger() -> None:
    """Before saying what is wrong: the first process speaks at once, and then its launcher ends the others.

    So what all of them found is said once, and what one of them found is said too.
    """
    if not leads():
        time.sleep(LINGER)


def leave() -> None:
    """End a process of several that has done everything, after what is to be done at exit, but without taking apart what native
    threads may still hold. In some hundreds of runs over gloo that ended two finished processes with an abort (docs/log.md),
    and a launcher takes such a run for a failed one.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _listening() -> Iterator[Any]:
    """torch.distributed, whose errors mean that somebody is gone."""
    import torch.distributed as group

    try:
        yield group
    except RuntimeError as error:
        raise LostProcessError(f"the processes lost each other: {str(error).splitlines()[0]}") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of at most `BUCKET` numbers or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
