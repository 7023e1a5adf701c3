"""A reward served over HTTP to another process: the protocol of docs/reward-server.md on FastAPI and uvicorn.

Needs the extra ``serve``. One request is scored at a time; while that goes on, one more is read and the others
wait unread, so that memory stays bounded whatever comes.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from driftrl import __version__
from driftrl.checks import InputError, RunFailedError
from driftrl.rewards.calling import asks_for_metadata
from driftrl.rewards.guarded import GuardedReward
from driftrl.rewards.protocol import MEDIA, PROTOCOL, Limits, decode_json, decode_safetensors, token_of
from driftrl.types import Reward

T = TypeVar("T")
DECODERS = {MEDIA["safetensors"]: decode_safetensors, MEDIA["png"]: decode_json}
DRAIN_SECONDS = 5.0


class RefusedError(Exception):
    """Why a request is not answered with rewards."""

    def __init__(self, status: int, message: str, unread: bool = True) -> None:
        """An HTTP status, what to do about it, and whether (more of) the request's body may be to come."""
        super().__init__(message)
        self.status, self.message, self.unread = status, message, unread


class Refusal(JSONResponse):
    """``{"error": message}``, sent at once; what the client is still sending is then read and dropped for a while.

    Without that, closing the connection would reset it, and the client might never see why it was refused.
    """

    def __init__(self, error: RefusedError) -> None:
        """The answer that ``error`` asks for."""
        headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "10"}}.get(error.status, {})
        super().__init__({"error": error.message}, error.status, {"connection": "close"} | headers)
        self.unread = error.unread

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send, drain, close."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if self.unread:
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while (await receive()).get("more_body", False):
                        pass
        await send({"type": "http.response.body", "body": b""})


class RewardService:
    """What the paths of the server do."""

    def __init__(
        self,
        reward: Reward,
        name: str,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        token: str | None = None,
        batch_size: int | None = None,
        tell: Callable[[str], Any] | None = None,
    ) -> None:
        """Serve ``reward``.

        Args:
            reward: ``(images [N, 3, H, W] on device, prompts) -> Tensor[N]``.
            name: what /v1/info calls it.
            device: where the images are put.
            limits: of a request.
            token: the bearer token that /v1/... asks for; None asks for none.
            batch_size: images scored at once; None scores all of a request at once.
            tell: called with a line for each request that was scored or refused.
        """
        self.reward, self.name, self.device = GuardedReward(reward, attempts=1), name, torch.device(device)
        self.limits, self.batch_size = limits or Limits(), batch_size
        self.tell = tell or (lambda line: None)
        token = token_of(token)
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._places, self._turn = asyncio.Semaphore(2), asyncio.Lock()

    async def healthz(self, request: Request) -> JSONResponse:
        """The server answers, whatever it is scoring; asks for no token."""
        return JSONResponse({"status": "ok"})

    async def info(self, request: Request) -> JSONResponse:
        """What this server is and takes."""
        self._admit(request)
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "reward": self.name,
                "formats": list(MEDIA),
                "metadata": asks_for_metadata(self.reward.reward),
                "max_bytes": self.limits.max_bytes,
                "max_images": self.limits.max_images,
                "max_side": self.limits.max_side,
                "server": f"driftrl {__version__}",
            }
        )

    async def score(self, request: Request) -> JSONResponse:
        """Rewards of the images in the body."""
        self._admit(request)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in DECODERS:
            raise RefusedError(415, f"Content-Type: expected {' or '.join(DECODERS)}; got {media[:80]!r}")
        if int(request.headers.get("content-length", "0")) > self.limits.max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.wait_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise RefusedError(503, "busy with other requests; try again later") from None
        try:
            body = await self._read(request)
            async with self._turn:
                if await request.is_disconnected():
                    raise RefusedError(499, "the client has gone", unread=False)
                start = time.perf_counter()
                try:
                    images, prompts = await _in_thread(partial(DECODERS[media], body, self.limits))
                except InputError as error:
                    raise RefusedError(400, str(error), unread=False) from error
                try:
                    rewards = await _in_thread(partial(self._rewards, images, prompts))
                except (InputError, RunFailedError) as error:
                    raise RefusedError(500, str(error), unread=False) from error
        except asyncio.CancelledError:  # a second Ctrl-C, or half a minute after the first
            raise RefusedError(503, "the server was stopped", unread=False) from None
        finally:
            self._places.release()
        height, width = images.shape[-2:]
        seconds = time.perf_counter() - start
        self.tell(f"scored {len(prompts)} images of {width} x {height} in {seconds:.2f} s")
        return JSONResponse({"rewards": rewards})

    def refuse(self, request: Request, error: Any) -> JSONResponse:
        """The answer to a request that raised a `RefusedError`, the framework's own 404 or 405, or a mistake of ours."""
        if isinstance(error, HTTPException):
            path = request.url.path[:80]
            error = RefusedError(error.status_code, f"{request.method} {path!r}: {error.detail}")
        elif not isinstance(error, RefusedError):
            error = RefusedError(500, f"a mistake in the server: {type(error).__name__}: {error}")
        self.tell(f"refused, status {error.status}: {error.message}")
        return Refusal(error)

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.max_bytes:
                        raise self._too_large()
        except TimeoutError:
            message = f"the body took more than {self.limits.read_seconds:g} s to arrive"
            raise RefusedError(408, message) from None
        except ClientDisconnect:
            raise RefusedError(499, "the client has gone", unread=False) from None
        return bytes(body)

    def _rewards(self, images: Tensor, prompts: list[str]) -> list[float | None]:
        """Rewards as JSON has them: null stands for what is not finite."""
        size, parts = self.batch_size or len(prompts), []
        with torch.no_grad():
            for start in range(0, len(prompts), size):
                piece = images[start : start + size].to(self.device)
                parts.append(self.reward(piece, prompts[start : start + size]).cpu())
        return [value if math.isfinite(value) else None for value in torch.cat(parts).tolist()]

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            raise RefusedError(401, "a valid bearer token is needed")

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the body is larger than {self.limits.max_bytes} bytes; send fewer images")


def create_app(service: RewardService) -> FastAPI:
    """The paths of a service as an ASGI application."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return service.refuse(request, error)

    app = FastAPI(title="driftrl reward", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(Exception, refuse)  # uvicorn then logs the traceback too
    app.add_api_route("/healthz", service.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/v1/info", service.info, methods=["GET"], response_model=None)
    app.add_api_route("/v1/score", service.score, methods=["POST"], response_model=None)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InputError: if the address cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--host {host} --port {port}: cannot listen there: {reason}; "
            "choose another --port (0 takes a free one) or --host"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Says that it stops when a signal asks for it."""

    on_stop: Callable[[], Any] = bool

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.should_exit:
            self.on_stop()
        super().handle_exit(sig, frame)


def server_of(app: FastAPI, on_stop: Callable[[], Any] = bool) -> Any:
    """A `uvicorn.Server` for ``app``: ``run(sockets=[listener])`` serves until Ctrl-C or ``should_exit``.

    When a signal comes it calls ``on_stop``, takes no more requests, and answers those in hand within half a
    minute; at a second one it stops at once.
    """
    server = _Server(
        uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, http="h11", ws="none", lifespan="off",
            server_header=False, proxy_headers=False, limit_concurrency=128, timeout_graceful_shutdown=30,
        )
    )  # fmt: skip
    server.on_stop = on_stop
    return server


async def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that does not keep the process alive, as a pool's would: a reward may hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except BaseException as error:
            problem = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, result, problem)

    threading.Thread(target=run, daemon=True).start()
    return await future
