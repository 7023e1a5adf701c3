"""The client against servers that are down, slow or lying: one message with the address, and nothing lost."""

import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from driftrl import Trainer, checkpoint
from driftrl.build import build_reward
from driftrl.checks import InputError, RunFailedError
from driftrl.cli import main as command_line
from driftrl.config import dump_config
from driftrl.rewards.guarded import GuardedReward
from driftrl.rewards.http import HTTPReward
from driftrl.trainer import NotFiniteWarning

CPU = torch.device("cpu")
INFO = {"protocol": 1, "reward": "fake", "formats": ["safetensors", "png"]}


def decoded(body, media, folder):
    """Images [N, H, W, 3] and prompts, by PIL or by the library's own reader of files."""
    if media == "application/json":
        data = json.loads(body)
        files = [io.BytesIO(base64.b64decode(text)) for text in data["images"]]
        return np.stack([np.asarray(Image.open(f)) for f in files]) / 255, data["prompts"]
    path = folder / f"{time.monotonic_ns()}.safetensors"
    path.write_bytes(body)
    with safe_open(path, "numpy") as file:
        return file.get_tensor("images").transpose(0, 2, 3, 1), json.loads(file.metadata()["prompts"])


def rewards(*values):
    return 200, json.dumps({"rewards": list(values)}).encode()


def brightness(images):
    """Means of images [N, H, W, 3]."""
    return np.ascontiguousarray(images, np.float32).mean((1, 2, 3)).tolist()


class Fake:
    """A server by Python's own http.server: ``answers`` are given one after the other, the last for ever.

    An answer is (status, bytes), a function that gets the handler, images and prompts, or None: brightness.
    """

    def __init__(self, folder, *answers, info=INFO, info_status=200):
        self.answers, self.requests, fake = list(answers) or [None], [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, content, **headers):
                self.send_response(status)
                for name, value in ({"Content-Length": len(content)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                fake.requests.append((self.path, dict(self.headers), None, None))
                content = info if isinstance(info, bytes) else json.dumps(info).encode()
                self.reply(info_status, content)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                images, prompts = decoded(body, self.headers["Content-Type"], folder)
                fake.requests.append((self.path, dict(self.headers), images, prompts))
                answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                if answer is None:
                    answer = rewards(*brightness(images))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(self) if callable(answer) else self.reply(*answer)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def scored(self):
        return [images for path, _, images, _ in self.requests if path.endswith("/v1/score")]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake(tmp_path):
    running = []

    def make(*answers, **options):
        running.append(Fake(tmp_path, *answers, **options))
        return running[-1]

    yield make
    for one in running:
        one.stop()


@pytest.mark.parametrize("form", ["auto", "safetensors", "png"])
def test_what_the_server_gets(fake, form):
    server, images = fake(), torch.rand(3, 3, 8, 6, generator=torch.manual_seed(0))
    prompts = ["a cat", 'a "quoted" \\ 猫 \n', "a cat"]
    scores = HTTPReward(server.url, format=form)(images, prompts)
    (got,) = server.scored
    assert server.requests[-1][3] == prompts
    if form == "png":
        assert np.abs(got - images.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    else:
        assert (got == images.permute(0, 2, 3, 1).numpy()).all()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, images.mean((1, 2, 3)), atol=5e-3, rtol=0)


@pytest.mark.parametrize("form", ["safetensors", "png"])
@pytest.mark.parametrize("limit", [{"max_bytes": 6000}, {"max_images": 3}])
def test_large_batches_go_in_parts(fake, form, limit):
    server, images = fake(info=INFO | limit), torch.rand(10, 3, 8, 8)
    scores = HTTPReward(server.url, format=form)(images, ["a cat"] * 10)
    torch.testing.assert_close(scores, images.mean((1, 2, 3)), atol=5e-3, rtol=0)
    assert sum(map(len, server.scored)) == 10
    assert len(server.scored) > 1
    for (_, headers, got, _) in server.requests[1:]:  # fmt: skip
        assert int(headers["Content-Length"]) <= limit.get("max_bytes", 10**9)
        assert len(got) <= limit.get("max_images", 10)


def test_one_image_over_the_limit(fake):
    reward = HTTPReward(fake(info=INFO | {"max_bytes": 5000}).url)
    with pytest.raises(InputError, match=r"takes at most 5000 bytes.*--max-megabytes"):
        reward(torch.rand(1, 3, 32, 32), ["a cat"])


def test_the_servers_first_format_is_taken(fake):
    assert HTTPReward(fake(info=INFO | {"formats": ["png", "other"]}).url).format == "png"
    with pytest.raises(InputError, match="takes the formats"):
        HTTPReward(fake(info=INFO | {"formats": ["pickle"]}).url)
    with pytest.raises(InputError, match="did you mean 'png'"):
        HTTPReward(fake().url, format="pmg")


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def hang(handler):
    time.sleep(3)


def cut_off(handler):
    handler.reply(200, b'{"rewards": [1, 2]}', **{"Content-Length": 100})


def hang_up(handler):
    handler.connection.close()


TROUBLE = {
    "slow": (hang, "no answer within 0.5 s"),
    "dripping": (drip, "no answer within 0.5 s"),
    "cut off": (cut_off, "cut off"),
    "hung up": (hang_up, "RemoteDisconnected|ConnectionReset"),
    "status 500": ((500, b'{"error": "CUDA is out of \x1b[31mmemory"}'), "status 500"),
    "status 500, with text": ((500, b'{"error": "out of memory"}'), "status 500: out of memory"),
    "status 502, no JSON": ((502, b"<html>bad gateway"), "status 502: '<html>bad gateway'"),
    "too few": (rewards(1.0), "1 rewards for 2 images"),
    "too many": (rewards(1.0, 2.0, 3.0), "3 rewards for 2 images"),
    "text": (rewards("high", "low"), r"rewards\[0\]: expected a number, or null; got str 'high'"),
    "booleans": (rewards(True, False), "got bool"),
    "nested": (rewards([1.0], [2.0]), "got list"),
    "huge integer": (rewards(1, 10**400), "too large"),
    "a number": ((200, b'{"rewards": 3}'), "not"),
    "no object": ((200, b"[1, 2]"), "not"),
    "no JSON": ((200, b"<html>hello\x1b[2J"), "<html>hello"),
    "deep JSON": ((200, b"[" * 50_000), "not"),
    "pickle": ((200, b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94"), "not"),
    "nothing": ((200, b""), "not"),
    "giant": ((200, b" " * 5_000_000), "longer than 65664 bytes"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_tried_again_and_then_reported(fake, kind):
    answer, message = TROUBLE[kind]
    server = fake(answer)
    reward = HTTPReward(server.url, timeout=0.5, attempts=2, pause=0)
    start = time.monotonic()
    with pytest.raises(RunFailedError, match=message) as caught:
        GuardedReward(reward, attempts=3, pause=0)(torch.rand(2, 3, 8, 8), ["a cat"] * 2)
    assert time.monotonic() - start < 5
    assert len(server.scored) == 2  # and not 3 times 2
    text = str(caught.value)
    assert server.url in text
    assert "failed 2 times" in text
    assert text.isprintable()
    assert len(text) < 700


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_that_passes_is_not_seen(fake, kind):
    images = torch.rand(2, 3, 8, 8)
    reward = HTTPReward(fake(TROUBLE[kind][0], None).url, timeout=0.5, attempts=2, pause=0)
    torch.testing.assert_close(reward(images, ["a cat"] * 2), images.mean((1, 2, 3)))


def test_what_is_not_finite_comes_back_as_nan(fake):
    bare = 200, b'{"rewards": [NaN, -Infinity, 2, 1e999, null]}'
    scores = HTTPReward(fake(bare).url)(torch.rand(5, 3, 8, 8), ["a cat"] * 5)
    assert torch.isfinite(scores).tolist() == [False, False, True, False, False]
    assert scores[2] == 2


@pytest.mark.parametrize(
    ("status", "hint"),
    [(400, "a bad image"), (401, "DRIFTRL_REWARD_TOKEN"), (413, "a bad image"), (302, "redirects")],
)
def test_a_refusal_is_not_tried_again(fake, status, hint):
    server = fake((status, b'{"error": "a bad image"}'))
    with pytest.raises(InputError, match=rf"{server.url} refused.*status {status}.*{hint}"):
        HTTPReward(server.url, pause=0)(torch.rand(1, 3, 8, 8), ["a cat"])
    assert len(server.scored) == 1


def test_redirects_are_not_followed(fake):
    other = fake()

    def redirect(handler):
        handler.reply(307, b"", Location=f"{other.url}/v1/score")

    with pytest.raises(InputError, match="redirects are not followed"):
        HTTPReward(fake(redirect).url, token="secret")(torch.rand(1, 3, 8, 8), ["a cat"])
    assert not other.requests


@pytest.mark.parametrize(
    ("info", "status", "message"),
    [
        (b"<html>", 200, "no reward server.*driftrl serve-reward"),
        ([], 200, "no reward server"),
        ({"protocol": True}, 200, "no reward server"),
        ({"protocol": 2}, 200, "speaks protocol 2.*install the same version"),
        ({"protocol": 1}, 200, "formats"),
        (INFO | {"max_bytes": "many"}, 200, "max_bytes"),
        (INFO | {"max_images": 0}, 200, "max_images"),
        (b" " * 100_000, 200, "no reward server answers.*longer than"),
        ({}, 404, "status 404.*driftrl serve-reward"),
        ({"error": "no"}, 401, "DRIFTRL_REWARD_TOKEN"),
        ({"error": "no"}, 500, "status 500: no"),
    ],
)
def test_a_server_of_something_else(fake, info, status, message):
    server = fake(info=info, info_status=status)
    with pytest.raises(InputError, match=message) as caught:
        build_reward(server.url, CPU)
    assert server.url in str(caught.value)


def test_a_server_that_is_down():
    message = r"no reward server answers at http://127.0.0.1:9: Connection.*; start it on 127.0.0.1 with: driftrl serve-reward NAME --port 9$"
    with pytest.raises(InputError, match=message):
        build_reward("http://127.0.0.1:9", CPU)


def test_a_server_on_another_machine_has_to_let_others_in():
    message = (
        r"; start it on nohost\.invalid with: driftrl serve-reward NAME --host 0\.0\.0\.0 --port 80, which lets other machines in; "
        r"those that have the token, if DRIFTRL_REWARD_TOKEN is set there and here$"
    )
    with pytest.raises(InputError, match=message):
        build_reward("http://nohost.invalid:80", CPU)


@pytest.mark.parametrize(
    "url",
    ["http://", "http://me:hidden@127.0.0.1", "http://127.0.0.1/?token=hidden", "http://127.0.0.1:8300#hidden",
     "http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1", "http://127.0.0.1/a b", "http://hé:1",
     "http://127.0.0.1/\r\nX: y"],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match="expected http://host:port") as caught:
        build_reward(url, CPU)
    assert "hidden" not in str(caught.value)


def test_a_path_before_the_protocols_own(fake):
    server = fake()
    HTTPReward(f"{server.url}/rewards/a/")(torch.rand(1, 3, 8, 8), ["a cat"])
    assert [path for path, *_ in server.requests] == ["/rewards/a/v1/info", "/rewards/a/v1/score"]


def test_the_token_goes_to_the_server_and_nowhere_else(fake, config, tmp_path, monkeypatch):
    server = fake()
    monkeypatch.setenv("DRIFTRL_REWARD_TOKEN", "verysecret")
    run = Trainer(config(iterations=1, reward=server.url), tmp_path / "run").run()
    assert [headers["Authorization"] for _, headers, _, _ in server.requests] == ["Bearer verysecret"] * 2
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files)
    assert not any(b"verysecret" in path.read_bytes() for path in files)
    for bad in ("", "two words", "tab\t", "ключ"):
        with pytest.raises(InputError, match="printable ASCII") as caught:
            HTTPReward(server.url, token=bad)
        assert not bad or bad not in str(caught.value)


def test_training_over_http_is_training(fake, config, tmp_path):
    remote = Trainer(config(reward=fake().url), tmp_path / "remote").run()
    trainer = Trainer(config(), tmp_path / "local")
    trainer.loop.reward = lambda images, prompts: torch.tensor(brightness(images.permute(0, 2, 3, 1).numpy()))
    local = trainer.run()
    assert (remote / "metrics.jsonl").read_bytes() == (local / "metrics.jsonl").read_bytes()
    name = "checkpoints/000002/training.safetensors"
    assert (remote / name).read_bytes() == (local / name).read_bytes()


def test_nan_skips_the_iteration(fake, config, tmp_path):
    nan = (200, json.dumps({"rewards": [None] * 18}).encode())
    trainer = Trainer(config(iterations=2, reward=fake(nan, None).url), tmp_path / "run")
    with pytest.warns(NotFiniteWarning, match="iteration 1 was skipped: a reward is not finite for 'a"):
        trainer.run()
    assert trainer.loop.position.failures == 0


def test_a_server_that_dies_in_training(fake, config, tmp_path, monkeypatch, capsys):
    """Exit status 3 and a checkpoint of what was finished, which resumes to what an undisturbed run gives."""
    server = fake(None, None, (500, b'{"error": "out of memory"}'))
    (tmp_path / "impatient.py").write_text(
        "from driftrl.rewards.http import HTTPReward\n"
        f"reward = HTTPReward({server.url!r}, attempts=2, pause=0.01)\n"
    )
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    settings = config(iterations=4, reward="impatient:reward", logging__checkpoint_every=100)
    path.write_text(dump_config(settings))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["driftrl", "train", str(path), "--out", str(run), "--quiet"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    message = capsys.readouterr().err
    assert caught.value.code == 3, message
    assert f"the reward server {server.url} failed 2 times" in message
    assert "status 500: out of memory" in message
    assert checkpoint.newest(run / "checkpoints").name == "000002"
    server.answers[:] = [None]
    Trainer(settings, run, resume=True).run()
    whole = Trainer(settings, tmp_path / "whole").run()
    name = "checkpoints/000004/training.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_training_does_not_start_without_its_server(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(reward="http://127.0.0.1:9")))
    command = [sys.executable, "-m", "driftrl.cli.main", "train", str(path), "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "driftrl serve-reward NAME --port 9" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_server_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs/reward-server.md").read_text("utf-8")
    (code,) = [part for part in page.split("```python\n")[1:] if "HTTPServer" in part]
    (tmp_path / "own.py").write_text(code.split("```")[0])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, tmp_path / "own.py", str(port)], stderr=subprocess.DEVNULL)
    try:
        reward, until = None, time.monotonic() + 30
        while reward is None and time.monotonic() < until:
            with contextlib.suppress(InputError):  # until it listens
                reward = build_reward(f"http://127.0.0.1:{port}", CPU)
        images = torch.rand(3, 1, 1, 1, generator=torch.manual_seed(0)).expand(3, 3, 8, 8)
        scores = reward(images, ["a cat"] * 3)
    finally:
        process.kill()
        process.wait()
    torch.testing.assert_close(scores, images[:, 0, 0, 0], atol=0.5 / 255 + 1e-6, rtol=0)
