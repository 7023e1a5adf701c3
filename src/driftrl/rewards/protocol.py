"""How images and prompts travel to a reward in another process (docs/reward-server.md): bytes, never pickle.

Two forms: a safetensors file, which carries float32 exactly, and JSON with PNGs, which any language can read.
What is decoded comes from a stranger, so sizes are checked before anything of that size is made.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from driftrl.checks import InputError, is_finite
from driftrl.rewards.calling import metadata_of
from driftrl.types import Prompt

PROTOCOL = 1
"""The number in the paths (/v1/...); a change that breaks clients or servers raises it."""
MEDIA = {"safetensors": "application/x-safetensors", "png": "application/json"}
"""Content-Type of each form."""
TOKEN_VARIABLE = "DRIFTRL_REWARD_TOKEN"
MAX_PROMPT = 10_000
"""Characters of one prompt."""
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
SLACK = 0.01
"""How far outside 0..1 a pixel may be: rounding passes, images in -1..1 or 0..255 do not."""


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and how long it may take."""

    max_bytes: int = 256 * 2**20
    """Of the body, and of its images as float32."""
    max_images: int = 4096
    max_side: int = 4096
    """Height and width, in pixels."""
    read_seconds: float = 120.0
    """From the first byte of the body to the last."""
    wait_seconds: float = 600.0
    """In the queue, before the body is read."""


def token_of(token: str | None) -> str | None:
    """A bearer token that a header can carry, or None.

    Raises:
        InputError: if it is empty, or has spaces or characters outside ASCII; the message does not show it.
    """
    if token is not None and (not token.isascii() or not token.isprintable() or not token or " " in token):
        raise InputError(
            f"the reward server's token (--token, {TOKEN_VARIABLE}): expected printable ASCII without spaces"
        )
    return token


def encode_safetensors(images: Tensor, prompts: Sequence[str]) -> bytes:
    """Images [N, 3, H, W] as the float32 tensor ``images``, the prompts as a JSON list in its metadata, and theirs as another
    where they have any.
    """
    from safetensors.torch import save

    images = images.detach().to("cpu", torch.float32).contiguous()
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in _words(prompts).items()}
    return save({"images": images}, texts)


def decode_safetensors(body: bytes, limits: Limits) -> tuple[Tensor, list[str]]:
    """What `encode_safetensors` wrote.

    Raises:
        InputError: saying what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise InputError("the body is no safetensors file: its header is cut off")
    header = _json(body[8 : 8 + size], "the safetensors header")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompts"), str):
        raise InputError('the safetensors metadata: expected "prompts", a JSON list of strings')
    if set(header) != {"images"} or not isinstance(header["images"], dict):
        raise InputError(f"expected one tensor, 'images'; got {sorted(map(str, header))[:5]}")
    prompts = _prompts(
        _json(metadata["prompts"], "the safetensors metadata's prompts"),
        _json(str(metadata.get("metadata", "null")), "the safetensors metadata's metadata"),
    )
    dtype, shape = header["images"].get("dtype"), header["images"].get("shape")
    if dtype != "F32":
        raise InputError(f"images: expected dtype F32; got {str(dtype)[:20]}")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int for n in shape):
        raise InputError(f"images: expected shape [N, 3, H, W]; got {str(shape)[:80]}")
    _check_shape(shape, len(prompts), limits)
    try:
        images = load(body)["images"]
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"the body is no safetensors file: {_first_line(error)}") from error
    is_finite("images", images)
    low, high = float(images.min()), float(images.max())
    if low < -SLACK or high > 1 + SLACK:
        raise InputError(f"images: expected values in 0..1; got {low:g} to {high:g}")
    return images, prompts


def encode_pngs(images: Tensor) -> list[str]:
    """Each image [3, H, W] of images [N, 3, H, W] in 0..1, rounded to 8 bits, as a PNG in base64."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    texts = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
        texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return texts


def encode_json(pngs: Sequence[str], prompts: Sequence[str]) -> bytes:
    """PNGs in base64 and their prompts as a JSON object."""
    return json.dumps(_words(prompts) | {"images": list(pngs)}).encode("ascii")


def _words(prompts: Sequence[str]) -> dict[str, list[Any]]:
    metadata = metadata_of(prompts)
    return {"prompts": list(prompts)} | ({"metadata": metadata} if any(metadata) else {})


def decode_json(body: bytes, limits: Limits) -> tuple[Tensor, list[str]]:
    """What `encode_json` wrote: images float32 [N, 3, H, W] in 0..1, and prompts.

    Raises:
        InputError: saying what is wrong with it.
    """
    data = _json(body, "the body")
    if not isinstance(data, dict) or set(data) - {"metadata"} != {"prompts", "images"}:
        raise InputError(
            'the body: expected {"prompts": [...], "images": [...]}, perhaps "metadata": [...], and nothing else'
        )
    prompts, texts = _prompts(data["prompts"], data.get("metadata")), data["images"]
    if not isinstance(texts, list) or len(texts) != len(prompts):
        raise InputError(f"images: expected a list of {len(prompts)} PNGs in base64, one per prompt")
    files, sizes = [], set()
    for number, text in enumerate(texts):
        try:
            file = base64.b64decode(text, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise InputError(f"images[{number}]: expected a PNG in base64") from error
        if len(file) < 33 or not file.startswith(PNG_START):
            raise InputError(f"images[{number}]: expected a PNG in base64; it does not start like a PNG")
        files.append(file)
        sizes.add((int.from_bytes(file[20:24], "big"), int.from_bytes(file[16:20], "big")))
    if len(sizes) != 1:
        raise InputError(f"images: expected one size for all; got {len(sizes)} sizes")
    height, width = sizes.pop()
    _check_shape([len(files), 3, height, width], len(prompts), limits)
    return torch.stack([_pixels(file, number) for number, file in enumerate(files)]), prompts


def _pixels(file: bytes, number: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if image.mode != "RGB":
                raise InputError(f"images[{number}]: expected a PNG in RGB; got mode {image.mode}")
            size, data = image.size, bytearray(image.tobytes())
    except InputError:
        raise
    except Exception as error:  # a damaged PNG raises many things, and none of them is our fault
        raise InputError(f"images[{number}]: the PNG cannot be read: {_first_line(error)}") from error
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.view(size[1], size[0], 3).permute(2, 0, 1).float() / 255


def _check_shape(shape: Sequence[int], prompts: int, limits: Limits) -> None:
    n, channels, height, width = shape
    if n != prompts:
        raise InputError(f"images: expected one per prompt; got {n} images and {prompts} prompts")
    if channels != 3 or not (1 <= height <= limits.max_side and 1 <= width <= limits.max_side):
        raise InputError(
            f"images: expected [N, 3, H, W] with height and width in 1..{limits.max_side}; got {list(shape)}"
        )
    if n > limits.max_images:
        raise InputError(f"images: expected at most {limits.max_images} in one request; got {n}")
    if 4 * math.prod(shape) > limits.max_bytes:
        raise InputError(
            f"images: {list(shape)} as float32 is more than {limits.max_bytes} bytes; send fewer"
        )


def _prompts(value: Any, metadata: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InputError("prompts: expected a list of strings, at least one")
    if any(len(text) > MAX_PROMPT for text in value):
        raise InputError(f"prompts: expected at most {MAX_PROMPT} characters each")
    try:
        "".join(value).encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can say it, no tokenizer takes it
        raise InputError("prompts: expected Unicode text; got half of a surrogate pair") from error
    if metadata is None:
        return value
    if not isinstance(metadata, list) or not all(isinstance(each, dict) for each in metadata):
        raise InputError("metadata: expected a list of objects")
    if len(metadata) != len(value):
        raise InputError(f"metadata: expected {len(value)} objects, one per prompt; got {len(metadata)}")
    return [Prompt(text, more) for text, more in zip(value, metadata, strict=True)]


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is no JSON: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
