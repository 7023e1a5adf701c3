"""`driftrl serve-reward`."""

from __future__ import annotations

import ipaddress
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape

from driftrl.checks import InputError, one_of


def serve_reward(
    name: str,
    host: str,
    port: int,
    device: str,
    dtype: str,
    max_megabytes: int,
    batch_size: int | None,
    token: str | None,
) -> None:
    """Serve a reward until Ctrl-C."""
    missing = [module for module in ("fastapi", "uvicorn") if find_spec(module) is None]
    if missing:
        raise InputError(
            f"serve-reward needs {' and '.join(missing)}, which this Python does not have: "
            "pip install '.[serve]' in driftrl's folder"
        )
    console = Console(stderr=True)
    with console.status(f"loading {escape(name)}", spinner="dots") as status, ExitStack() as stack:
        from driftrl.build import REWARD_DTYPES, build_reward, device_of
        from driftrl.rewards.protocol import TOKEN_VARIABLE, Limits, token_of
        from driftrl.rewards.server import RewardService, create_app, listen, server_of

        token, dtype = token_of(token), one_of("--dtype", dtype, REWARD_DTYPES)
        listener = stack.enter_context(listen(host, port))  # a taken port should not wait for the model
        try:
            where = device_of(device)
        except InputError as error:
            raise InputError(str(error).replace("model.device", "--device", 1)) from error
        with suppress(ImportError):  # an environment made for one reward may do without transformers
            from transformers.utils import logging

            logging.disable_progress_bar()  # its bars for loading weights would come between ours
        reward = build_reward(name, where, dtype)
        status.stop()

        def tell(line: str) -> None:
            console.print(f"{time.strftime('%H:%M:%S')} {escape(line)}", highlight=False, soft_wrap=True)

        limits = Limits(max_bytes=max_megabytes * 2**20)
        service = RewardService(reward, name, where, limits, token, batch_size, tell)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if token is None and not _is_loopback(host):
            console.print(
                f"[yellow]anyone who reaches {escape(url)} can have images scored: there is no "
                f"authentication; set --token or {TOKEN_VARIABLE}, or leave --host at 127.0.0.1[/]",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        console.print(
            f"[bold]{escape(name)}[/] on {where}; train with: --set reward={escape(url)}\nCtrl-C stops it",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

        def on_stop() -> None:
            tell("stopping when the requests in hand are answered; again to stop at once")

        server_of(create_app(service), on_stop).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
