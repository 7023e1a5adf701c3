"""What each of two processes finds in a network of which it holds parts: `launch` runs this for tests/test_distributed.py.

Arguments: a configuration in half precision with `adapter.shard`, and a folder for checkpoints.
"""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from driftrl import checkpoint
from driftrl.build import build_policy
from driftrl.checkpoint import Position
from driftrl.config import load_config
from driftrl.distributed import in_parts, join, own, whole

HALF = torch.bfloat16


class Operations(TorchDispatchMode):
    """Names of all that is computed within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def built(config):
    """The policy in parts, of which never more than a block was whole and in float32."""
    from torch.distributed import fsdp

    share, seen = fsdp.fully_shard, []

    def watched(module, **settings):
        apart = {id(p) for block in seen for p in block.parameters()}
        mine = [p for p in module.parameters() if id(p) not in apart and not in_parts(p)]
        wide = [p for p in networks[0].parameters() if not in_parts(p) and p.dtype == torch.float32]
        assert {id(p) for p in wide} == {id(p) for p in mine}, "more than a block is whole"
        seen.append(module)
        return share(module, **settings)

    networks, kind = [], torch.nn.Module.requires_grad_

    def noticed(module, on=True):
        networks[:] = [module]
        return kind(module, on)

    fsdp.fully_shard, torch.nn.Module.requires_grad_ = watched, noticed
    try:
        policy = build_policy(config, sharded=True)
    finally:
        fsdp.fully_shard, torch.nn.Module.requires_grad_ = share, kind
    assert len(seen) > 2 and seen[-1] is policy.network
    assert all(p.dtype == torch.float32 and in_parts(p) for p in policy.parameters())
    return policy


def asked(policy):
    """The same latents, steps and prompts for any policy."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(4, *policy.latent_shape, generator=draw)
    return latents, torch.tensor([0, 1, 2, 1]), policy.encode(["a cat", "a dog", "a cow", "a fox"])


def gradient(policy, arguments):
    policy.transition(*arguments).mean.square().sum().backward()
    gradients = (p.grad if p.grad is not None else torch.zeros(p.shape) for p in policy.parameters())
    return torch.cat([whole(g).flatten().double() for g in gradients])


def forget(policy):
    for parameter in policy.parameters():
        parameter.grad = None


def half_copies(policy, arguments):
    """Bytes of weights in half precision that wait for a backward pass."""
    weights = [whole(p.detach()).to(HALF) for p in policy.parameters() if p.dim() > 1]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mean = policy.transition(*arguments).mean
    held = 0
    for tensor in saved:
        # What FSDP has taken back has an address, but no memory.
        if tensor.dtype == HALF and tensor.dim() > 1 and tensor.untyped_storage().nbytes():
            forms = (tensor, tensor.transpose(-1, -2))
            if any(f.shape == w.shape and torch.equal(f, w) for f in forms for w in weights):
                held += tensor.nbytes
    mean.sum().backward()
    forget(policy)
    return held


def main(path, folder):
    team = join()
    config = load_config(path)
    policy = built(config)
    half = build_policy(config)
    exact = build_policy(
        config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    )
    with torch.no_grad():  # float32 weights are those that half precision has
        for a, b in zip(exact.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    arguments = asked(policy)

    assert half_copies(half, arguments) > 0  # autocast's
    assert half_copies(policy, arguments) == 0
    with torch.no_grad():
        # The very numbers of a network that is in half precision altogether.
        frozen = build_policy(config, adapter=False)
        frozen.network.to(memory_format=torch.contiguous_format)
        plain = frozen.transition(*arguments).mean
        assert torch.equal(policy.transition(*arguments).mean, plain)

    # About as near to float32 as whole weights with autocast are, which leaves norms in float32.
    truth, whole_ones, found = (gradient(p, arguments) for p in (exact, half, policy))
    assert (found - truth).norm() < 2 * (whole_ones - truth).norm() < 0.2 * truth.norm()

    # The reference between two micro-batches: it is what the network came as, and changes nothing else.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    optimizer.step()
    optimizer.zero_grad()
    gradient(policy, arguments)
    twice = gradient(policy, arguments)
    forget(policy)
    before = [own(p).clone() for p in policy.parameters()]
    gradient(policy, arguments)
    for _ in range(2):
        with Operations() as operations, policy.reference():
            pass
        with torch.no_grad(), policy.reference(), policy.reference():
            assert torch.equal(policy.transition(*arguments).mean, plain)
    assert not operations.names & {"clone", "_to_copy", "empty_like"}, operations.names
    assert {value.dtype for value in policy.weights._start.values()} == {HALF}
    assert all(torch.equal(own(p), b) for p, b in zip(policy.parameters(), before, strict=True))
    assert torch.equal(gradient(policy, arguments), twice)
    with torch.no_grad():
        assert not torch.equal(policy.transition(*arguments).mean, plain)
    optimizer.step()

    # Only who writes holds all; what was written is there again, bit for bit, and no more of it than a part.
    tensors = checkpoint.gathered(policy, optimizer, team.leads)
    assert bool(tensors) == team.leads
    everything = checkpoint.gathered(policy, optimizer)
    if team.leads:
        assert tensors.keys() == everything.keys()
        checkpoint.save(folder, policy, optimizer, Position(1), tensors=tensors)
    team.wait()
    again = build_policy(config, sharded=True)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    checkpoint.load(folder / "000001", again, optimizer)
    found = checkpoint.gathered(again, optimizer)
    assert found.keys() == everything.keys() and any(key.endswith("/exp_avg") for key in found)
    assert all(torch.equal(found[key], everything[key]) for key in found)
    for parameter, state in optimizer.state.items():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert own(moment).untyped_storage().nbytes() <= own(parameter).nbytes
    team.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
