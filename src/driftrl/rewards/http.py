"""A reward in another process, asked over HTTP by the protocol of docs/reward-server.md."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from driftrl import __version__
from driftrl.checks import InputError, RunFailedError, nearest
from driftrl.rewards.calling import metadata_of
from driftrl.rewards.protocol import (
    MEDIA,
    PROTOCOL,
    TOKEN_VARIABLE,
    Limits,
    encode_json,
    encode_pngs,
    encode_safetensors,
    token_of,
)

OVERHEAD = 1024
"""Bytes of a body that are neither images nor prompts, with room to spare."""


class HTTPReward:
    """A reward that another process computes, such as ``driftrl serve-reward NAME``.

    Images go as float32 where the server takes them, else as PNGs, in as many requests as its limits ask for.
    What is not finite comes back as NaN. Redirects are not followed and proxy settings not read, so that images
    and token go to the address named and nowhere else.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 300.0,
        attempts: int = 6,
        token: str | None = None,
        format: str = "auto",
        pause: float = 1.0,
    ) -> None:
        """Ask the server what it is and takes.

        Args:
            url: such as ``http://127.0.0.1:8300``, without user, query or fragment.
            timeout: seconds for one request, from connecting to the last byte of the answer.
            attempts: how often a request is tried, at least once.
            token: bearer token; None takes the environment variable DRIFTRL_REWARD_TOKEN, if there is one.
            format: 'safetensors', 'png' or 'auto'.
            pause: seconds before the second attempt; doubled before each further one.

        Raises:
            InputError: if the address cannot be used, or no server of this protocol answers there now.
        """
        self.url = url
        parts, self._port = _address(url)
        self._host, self._secure, self._path = parts.hostname or "", parts.scheme == "https", parts.path
        if format not in ("auto", *MEDIA):
            allowed = ("auto", *MEDIA)
            raise InputError(
                f"format: expected one of {', '.join(allowed)}; got {format!r}{nearest(format, allowed)}"
            )
        self.timeout, self.attempts, self.pause = timeout, attempts, pause
        self._token = token_of(os.environ.get(TOKEN_VARIABLE) if token is None else token)
        info = self._ask_info()
        self.name = str(info.get("reward", ""))
        """What the server calls its reward."""
        self.format = self._choose(format, info.get("formats"))
        self.takes_metadata = info.get("metadata") is True
        """Whether the server's reward asks for what prompts have beside their words; else it is not sent."""
        limits = Limits()
        self.max_bytes = self._limit(info, "max_bytes", limits.max_bytes)
        self.max_images = self._limit(info, "max_images", limits.max_images)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1: float32 [N] on the CPU, NaN where the reward was not finite.

        Raises:
            InputError: if the server refuses the request (a status of 4xx): it would do so again.
            RunFailedError: if every attempt failed, was too slow or was answered with something else.
        """
        images = images.detach().to("cpu", torch.float32)
        if not self.takes_metadata:
            prompts = [str(prompt) for prompt in prompts]
        pngs = encode_pngs(images) if self.format == "png" else []
        parts: list[Tensor] = []
        start = 0
        for stop in self._stops(images, pngs, prompts):
            asked = list(prompts[start:stop])
            if self.format == "png":
                body = encode_json(pngs[start:stop], asked)
            else:
                body = encode_safetensors(images[start:stop], asked)
            parts.append(self._score(body, len(asked)))
            start = stop
        return torch.cat(parts)

    def _stops(self, images: Tensor, pngs: Sequence[str], prompts: Sequence[str]) -> list[int]:
        """Where each request ends, so that none is over the server's limits."""
        decoded = 4 * images[0].numel()  # what a server bounds too, however small the PNG
        stops, size, count, pixels = [], OVERHEAD, 0, 0
        for i, prompt in enumerate(prompts):
            image = max(len(pngs[i]) + 4 if pngs else 0, 0 if pngs else decoded)
            words = json.dumps(prompt) + (json.dumps(metadata_of([prompt])[0]) if self.takes_metadata else "")
            more = image + 2 * len(words) + 8  # twice, for a JSON string within JSON is escaped again
            if OVERHEAD + more > self.max_bytes or decoded > self.max_bytes:
                raise InputError(
                    f"reward: {self.url} takes at most {self.max_bytes} bytes in a request, and one image of "
                    f"{list(images.shape[1:])} is more; start it with a larger --max-megabytes"
                )
            if count and (
                size + more > self.max_bytes or pixels + decoded > self.max_bytes or count == self.max_images
            ):
                stops.append(i)
                size, count, pixels = OVERHEAD, 0, 0
            size, count, pixels = size + more, count + 1, pixels + decoded
        return [*stops, len(prompts)]

    def _score(self, body: bytes, count: int) -> Tensor:
        """Rewards [count] of one request, tried again as often as allowed."""
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                status, answer = self._request("POST", "/v1/score", body, 65_536 + 64 * count)
                if status == 200:
                    return _rewards(answer, count)
            except _TroubleError as trouble:
                problem = str(trouble)
                continue
            problem = f"status {status}: {_error_of(answer)}"
            if status < 500:
                raise InputError(f"reward: {self.url} refused the request: {problem}{_hint(status)}")
        often = "once" if self.attempts == 1 else f"{self.attempts} times"
        raise RunFailedError(
            f"the reward server {self.url} failed {often}; the last time: {problem}; see what it printed, and "
            "that it still runs (driftrl serve-reward); then go on with --resume"
        )

    def _ask_info(self) -> dict[str, Any]:
        try:
            status, answer = self._request("GET", "/v1/info", None, 65_536, min(self.timeout, 30.0))
        except _TroubleError as trouble:
            raise InputError(
                f"reward: no reward server answers at {self.url}: {trouble}; start it on {self._host} with: {self._command()}"
            ) from trouble
        if status != 200:
            raise InputError(
                f"reward: {self.url} refused to say what it is: status {status}: {_error_of(answer)}{_hint(status)}"
            )
        info = _json(answer)
        version = info.get("protocol") if isinstance(info, dict) else None
        if not isinstance(info, dict) or type(version) is not int:
            raise InputError(
                f'reward: {self.url} is no reward server: /v1/info has no "protocol"; start one there with: '
                f"{self._command()}"
            )
        if version != PROTOCOL:
            raise InputError(
                f"reward: {self.url} speaks protocol {version}, and this is driftrl {__version__}, which speaks "
                f"{PROTOCOL}; install the same version on both sides"
            )
        return info

    def _command(self) -> str:
        """What starts a server at this address: by itself it listens to its own machine only."""
        if self._host in ("127.0.0.1", "localhost", "::1"):
            return f"driftrl serve-reward NAME --port {self._port}"
        return (
            f"driftrl serve-reward NAME --host 0.0.0.0 --port {self._port}, which lets other machines in; those that have "
            f"the token, if {TOKEN_VARIABLE} is set there and here"
        )

    def _choose(self, wanted: str, offered: Any) -> str:
        takes = [f for f in MEDIA if isinstance(offered, list) and f in offered]
        if not takes or (wanted != "auto" and wanted not in takes):
            raise InputError(
                f"reward: {self.url} takes the formats {str(offered)[:80]}; expected "
                + (" or ".join(MEDIA) if wanted == "auto" else wanted)
                + ' in the "formats" of /v1/info'
            )
        return takes[0] if wanted == "auto" else wanted

    def _limit(self, info: dict[str, Any], key: str, default: int) -> int:
        value = info.get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(
                f'reward: {self.url}: expected a number of at least 1 as "{key}" in /v1/info; got {str(value)[:40]}'
            )
        return value

    def _request(
        self, method: str, path: str, body: bytes | None, most: int, timeout: float | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer, which may have ``most`` bytes.

        Raises:
            _TroubleError: if no whole answer came in time.
        """
        timeout = timeout or self.timeout
        headers = {
            "User-Agent": f"driftrl/{__version__}",
            "Accept": "application/json",
            "Connection": "close",
        }
        if body is not None:
            headers["Content-Type"] = MEDIA[self.format]
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout)
        answer: http.client.HTTPResponse | None = None
        line: socket.socket | None = None
        late = threading.Event()

        def cut() -> None:
            late.set()
            if line is not None:
                with suppress(OSError):
                    socket.socket.shutdown(line, socket.SHUT_RDWR)

        # The socket's own timeout starts anew with every byte; this one does not.
        timer = threading.Timer(timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            line = connection.sock
            with suppress(BrokenPipeError, ConnectionResetError):
                # A server may say why it refuses, and close, before it has read everything.
                connection.request(method, self._path + path, body, headers)
            answer = connection.getresponse()
            content = answer.read(most + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _TroubleError(f"no answer within {timeout:g} s") from error
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise _TroubleError(f"{type(error).__name__}: {reason}") from error
        finally:
            timer.cancel()
            if answer is not None:
                answer.close()
            connection.close()
        if late.is_set():
            raise _TroubleError(f"no answer within {timeout:g} s")
        if len(content) > most:
            raise _TroubleError(f"the answer is longer than {most} bytes")
        if (
            answer.length
        ):  # http.client does not count what is missing when asked for a certain number of bytes
            raise _TroubleError(f"the answer was cut off: {answer.length} bytes are missing")
        return answer.status, content


class _TroubleError(Exception):
    """A request failed in a way that may not happen again."""


def _address(url: str) -> tuple[Any, int]:
    """The parts of a server's address and its port.

    Raises:
        InputError: if it is none; where it may hold a password, without showing it.
    """
    form = "expected http://host:port or https://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError(f"reward: {form}: {error}") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"reward: {form}, without user, query or fragment, for it is written to config.yaml; "
            f"a token goes into the environment variable {TOKEN_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"reward: {form}; got {url!r}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"reward: {form}, in ASCII without spaces; got {url!r}")
    return parts._replace(path=parts.path.rstrip("/")), port


def _rewards(answer: bytes, count: int) -> Tensor:
    data = _json(answer)
    values = data.get("rewards") if isinstance(data, dict) else None
    if not isinstance(values, list):
        raise _TroubleError(f'the answer is not {{"rewards": [...]}} but {_shown(answer)}')
    if len(values) != count:
        raise _TroubleError(f"the answer has {len(values)} rewards for {count} images")
    for number, value in enumerate(values):
        if value is not None and type(value) not in (int, float):
            raise _TroubleError(
                f"rewards[{number}]: expected a number, or null; got {type(value).__name__} {str(value)[:40]!r}"
            )
    try:
        floats = [float("nan") if value is None else float(value) for value in values]
    except OverflowError as error:
        raise _TroubleError("a reward is an integer too large for a number") from error
    return torch.tensor(floats, dtype=torch.float64).to(torch.float32)


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


def _error_of(answer: bytes) -> str:
    data = _json(answer)
    error = data.get("error") if isinstance(data, dict) else None
    return _printable(error) if isinstance(error, str) else _shown(answer)


def _shown(answer: bytes) -> str:
    return repr(_printable(answer.decode("utf-8", errors="replace"))) if answer else "nothing"


def _printable(text: str) -> str:
    """A stranger's text in one short line without control characters: it is printed to a terminal."""
    short = "".join(c if c.isprintable() else " " for c in text[:300]).strip()
    return short + ("..." if len(text) > 300 else "")


def _hint(status: int) -> str:
    if status == 401:
        return f"; set the environment variable {TOKEN_VARIABLE} to the server's token"
    if status == 404:
        return "; expected a reward server, such as driftrl serve-reward"
    if 300 <= status < 400:
        return "; redirects are not followed: give the address itself"
    return ""
