"""A second device without hardware, named 'gpu': it computes on the CPU, and refuses what a GPU refuses.

Its tensors keep their numbers in a CPU tensor inside. An operation on tensors of both devices raises, as it does on a
GPU, but for copies, numbers of no dimension, and indices; so does handing one to numpy. Register it in a process of its own:
a device cannot be taken back.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "gpu"
COPIES = ("copy_", "_to_copy", "_copy_from")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
LOWERED = ("linear", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
"""What autocast computes in half precision."""
CROSSINGS: list[str] = []
"""Every copy from one device to the other so far, in either direction."""


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of both devices."""


class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class OnDevice(torch.Tensor):
    """A tensor of the second device; ``inside`` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inside):
        self.inside = inside

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inside = value.inside

    def tolist(self):
        return self.inside.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    __array__ = numpy


def compute(operation, args, kwargs):
    """An operation's result: on the CPU, wrapped again where it belongs to the second device."""
    name = operation.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    foreign = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    by_index = name in INDEXING and isinstance(args[0], OnDevice)
    if here and foreign and not by_index and name not in COPIES:
        raise MixedDevicesError(f"{operation}: " + ", ".join(f"{x.device} {tuple(x.shape)}" for x in tensors))

    device = kwargs.get("device")
    if name == "copy_":
        stays = isinstance(args[0], OnDevice)
    else:
        stays = bool(here) if device is None else torch.device(device).type == NAME
    stays = stays and name != "_local_scalar_dense"
    if name in COPIES and any(isinstance(x, OnDevice) != stays for x in tensors):
        CROSSINGS.append(str(operation))
    outside = {}

    def unwrap(x):
        if isinstance(x, OnDevice):
            outside[id(x.inside)] = x
            return x.inside
        if isinstance(x, torch.Tensor):
            outside[id(x)] = x
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        given = outside.get(id(x))  # by an operation in place, or one that had nothing to do
        if given is not None and isinstance(given, OnDevice) == stays:
            if given.shape != x.shape:  # it was resized for the result
                torch.Tensor.data.__set__(given, OnDevice(x))
            return given
        x = (
            x.resolve_conj() if given is None else x.clone()
        )  # kernels called from here take no lazy conjugate
        return OnDevice(x) if stays else x

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def lowered(operation):
    """As autocast calls it: with its tensors in half precision."""
    own = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def half(x):
        cast = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(torch.get_autocast_dtype(NAME)) if cast else x

    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(own):
            return operation(*tree_map(half, args), **tree_map(half, kwargs))

    return call


class Lists(TorchFunctionMode):
    """Makes tensors of Python's lists on the CPU first, for torch itself cannot make them on a device of this kind."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (
            function in (torch.tensor, torch.as_tensor)
            and device is not None
            and not isinstance(args[0], torch.Tensor)
        ):
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(x) if isinstance(x, list) else x for x in places)
            args = (args[0], places, *args[2:])
        return function(*args, **kwargs)


def register():
    """Make torch know the device, in this process, for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # modules move to it by new parameters
    libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
    libraries[0].fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
    libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOWERED:
        libraries[1].impl(name, lowered(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    mode = Lists()
    mode.__enter__()
    return libraries, mode  # they last as long as somebody holds them
