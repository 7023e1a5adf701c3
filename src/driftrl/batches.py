"""How much goes through a network at once: fewer rows, where memory turns out not to suffice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from driftrl.checks import RunFailedError

Result = TypeVar("Result")


class MemoryWarning(UserWarning):
    """A batch was made smaller, for memory did not suffice."""


class BatchSize:
    """The rows of one batch; halved, for good, when a batch of that size runs out of memory.

    What is computed does not depend on it but for rounding, so work that failed is done again with less at once.
    """

    def __init__(self, size: int, setting: str, firm: bool = False) -> None:
        """Start with ``size`` rows; ``setting`` is the configuration's name for it. A ``firm`` size stays: an error of
        memory is then raised as it is.
        """
        self.now, self.setting, self.firm = size, setting, firm

    def attempt(self, work: Callable[[int], Result]) -> Result:
        """``work(size)``, tried again with half as much at once as long as it runs out of memory; one warning.

        Whatever ``work`` has begun when it fails, it must begin anew.

        Raises:
            RunFailedError: if memory does not suffice for a single row.
        """
        first = self.now
        while True:
            try:
                result = work(self.now)
            except RuntimeError as error:
                if self.firm or not out_of_memory(error):
                    raise
                if self.now == 1:
                    raise RunFailedError(
                        f"out of memory, though {self.setting} is down to 1; driftrl estimate says what takes it and "
                        f"what to change: {str(error).splitlines()[0]}"
                    ) from None
            else:
                break
            # Not before here: the error holds on to what the attempt had made.
            self.now //= 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if self.now < first:
            warnings.warn(
                f"memory does not suffice for {self.setting} {first}: it is {self.now} from here on",
                MemoryWarning,
                stacklevel=2,
            )
        return result


SHORTAGES = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # which cuDNN also answers where its workspace does not fit
)
"""What errors of other types say where memory does not suffice: of a CPU, the driver, cuBLAS and cuDNN."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory does not suffice, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in SHORTAGES)


def in_batches(size: BatchSize, count: int, work: Callable[[slice], Tensor]) -> Tensor:
    """The rows that ``work`` makes of ``count`` rows, so many at once as memory turns out to suffice for; at least one call."""
    parts: list[Tensor] = []
    done = 0

    def next_rows(most: int) -> Tensor:
        return work(slice(done, min(done + most, count)))

    while not parts or done < count:
        parts.append(size.attempt(next_rows))
        done += max(1, len(parts[-1]))
    return torch.cat(parts)
