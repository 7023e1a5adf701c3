"""Checkpoints: adapter, optimiser and position as safetensors and JSON, whole or absent.

Noise is keyed by iteration, so there is no generator state to keep: the position is the state, and for some methods
what they remember of earlier iterations.
"""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from driftrl.checks import InputError
from driftrl.distributed import part, whole
from driftrl.files import new_folder, read_json, sha256, sort_header, write_json
from driftrl.types import Policy

FORMAT = 1
MEMORY = "memory.safetensors"
"""What a method remembers between iterations; absent where that is nothing."""

_WHOLE: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Of checkpoints that `prune` found whole: name, size and time of each file."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    iteration: int
    """Iterations that are done."""
    failures: int = 0
    """How many of the last iterations, in a row, were skipped because something was not finite."""


def name_of(position: Position) -> str:
    """The name of a checkpoint's folder."""
    return f"{position.iteration:06d}"


def versions() -> dict[str, str]:
    """What a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("driftrl", "torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def gathered(policy: Policy, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, torch.Tensor]:
    """Trained parameters and the optimiser's state by name, in main memory; where processes hold parts of them, all
    must ask. One that does not ``keep`` them lends its parts, holds a single whole tensor at a time, and gets nothing.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in policy.named_parameters():
        for key, value in {"value": parameter, **optimizer.state.get(parameter, {})}.items():
            if isinstance(value, torch.Tensor):
                everything = whole(value.detach())
                if keep:
                    found[f"{name}/{key}"] = everything.cpu().contiguous()
    return found


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    position: Position,
    configuration: dict[str, Any] | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    sizes: list[list[int]] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    handed_out: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Path:
    """Write ``folder/000050`` for iteration 50, and return it; on any failure nothing is left behind.

    ``memory`` is whatever else the method needs to go on exactly; ``sizes`` are the batch sizes of each process, on
    which rounding depends; ``tensors`` is what `gathered` gave. Within ``handed_out`` the policy is the one whose adapter is
    written.
    """
    from safetensors.torch import save_file

    path = folder / name_of(position)
    tensors = gathered(policy, optimizer) if tensors is None else tensors
    with new_folder(path) as place:
        with handed_out():
            policy.save_adapter(
                place, {k.removesuffix("/value"): v for k, v in tensors.items() if k.endswith("/value")}
            )
        save_file(dict(tensors), place / "training.safetensors")
        if memory:
            save_file({k: v.detach().cpu().contiguous() for k, v in memory.items()}, place / MEMORY)
        for file in place.glob("*.safetensors"):
            sort_header(file)
        write_json(
            place / "state.json",
            asdict(position)
            | {"versions": versions(), "batch_sizes": sizes or [], "configuration": configuration},
        )
        files = {f.name: sha256(f) for f in sorted(place.iterdir())}
        write_json(place / "manifest.json", {"format": FORMAT, "files": files})
    return path


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer | None = None) -> Position:
    """Read a checkpoint into the policy's adapter: to go on, with the ``optimizer``; without one to draw, from the average of
    the weights where the run keeps one.

    Raises:
        InputError: if it is damaged or does not fit.
    """
    from safetensors import SafetensorError, safe_open

    problem = damage(path)
    if problem:
        raise InputError(f"{path}: {problem}")
    named = dict(policy.named_parameters())
    averages = _averages(load_memory(path), named) if optimizer is None else {}
    try:
        # Tensor by tensor, for all of them may be more than memory holds beside the model; and each is copied, for it is a view
        # of the file, and would change or crash with it.
        with safe_open(path / "training.safetensors", "pt") as file, torch.no_grad():
            keys: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, _, kind = key.rpartition("/")
                keys.setdefault(name, []).append(kind)
            for name, parameter in named.items():
                value = averages.get(name)
                if value is None and "value" in keys.get(name, ()):
                    value = file.get_tensor(f"{name}/value")
                if value is None or value.shape != parameter.shape:
                    raise InputError(
                        f"{path}: the checkpoint does not fit this model, rank or targets (at {name})"
                    )
                parameter.copy_(part(value, parameter))
            if optimizer is not None:
                for name, parameter in named.items():
                    kinds = [kind for kind in keys[name] if kind != "value"]
                    if kinds:
                        optimizer.state[parameter] = {
                            kind: _state(kind, file.get_tensor(f"{name}/{kind}"), parameter, optimizer)
                            for kind in kinds
                        }
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path / 'training.safetensors'}: {error}") from error
    state = read_json(path / "state.json")
    return Position(int(state["iteration"]), int(state.get("failures", 0)))


def _state(
    kind: str, value: torch.Tensor, parameter: torch.Tensor, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """A copy of what an optimiser keeps of ``parameter``: its count of steps, or a moment, which lies in memory as the parameter
    does, channels last for instance, which a fused optimiser insists on.
    """
    if kind == "step":  # a fused one counts on the device
        return value.to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(part(value, parameter))


def load_memory(path: Path) -> dict[str, torch.Tensor]:
    """What the method of a checkpoint remembered, by name; nothing if it keeps none. `load` checks the files.

    Raises:
        InputError: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / MEMORY).is_file():
        return {}
    try:
        return {name: value.clone() for name, value in load_file(path / MEMORY).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path / MEMORY}: {error}") from error


def _averages(memory: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The averaged weights of a `driftrl.memory.Memory`, by the parameters' names; nothing where none are kept."""
    return {name: memory[key] for i, name in enumerate(names) if (key := f"average/{i:05d}") in memory}


def batch_sizes(path: Path) -> list[list[int]]:
    """Of rollout and update, in each process that wrote a checkpoint; nothing where it does not say."""
    found = read_json(path / "state.json").get("batch_sizes")
    return [[int(size) for size in sizes] for sizes in found or []]


def configuration(path: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint was written under, if it says so."""
    found = read_json(path / "state.json").get("configuration")
    return found if isinstance(found, dict) else None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    if not path.is_dir():
        return "no such checkpoint"
    try:
        manifest: Any = read_json(path / "manifest.json")
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"checkpoint format {manifest['format']}, this version reads {FORMAT}"
        for name, checksum in files.items():
            if Path(name).name != name or sha256(path / name) != checksum:
                return f"{name} is damaged"
        if not isinstance(read_json(path / "state.json")["iteration"], int):
            return "state.json is damaged"
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete: {error}"
    return None


def listing(folder: Path) -> list[Path]:
    """The checkpoints in a run's ``checkpoints`` folder, oldest first, damaged ones included."""
    return (
        sorted(p for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isascii() and p.name.isdigit())
        if folder.is_dir()
        else []
    )


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning that names them."""
    for path in reversed(listing(folder)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is passed over: {problem}", CheckpointWarning, stacklevel=2)
    return None


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint is not damaged; as many bytes as before, written when they were, are not read again."""
    try:
        stamps = tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir()))
    except OSError:
        return False
    if _WHOLE.get(path) != stamps:
        if damage(path) is not None:
            return False
        _WHOLE[path] = stamps
    return True


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, and those of iterations divisible by ``keep_every``.

    What a crash left half-written goes too. A damaged checkpoint does not count among the newest; what was found whole is
    read again only where a file of it has changed since.
    """
    paths, whole = listing(folder), 0
    for path in reversed(paths if len(paths) > keep_last else []):
        if whole < keep_last:
            whole += _is_whole(path)
        elif keep_every is None or int(path.name) % keep_every:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
