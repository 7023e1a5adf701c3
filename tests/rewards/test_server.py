"""The server, run by uvicorn on a free port of this machine: right scores, and plain refusals of everything else."""

import base64
import contextlib
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from driftrl.build import build_reward
from driftrl.checks import InputError, RunFailedError
from driftrl.rewards.http import HTTPReward
from driftrl.rewards.protocol import Limits, decode_json, decode_safetensors, encode_json, encode_pngs
from driftrl.rewards.server import DECODERS, RewardService, create_app, listen, server_of
from driftrl.types import Prompt

CPU = torch.device("cpu")
TENSORS, PNGS = "application/x-safetensors", "application/json"


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@contextlib.contextmanager
def serving(reward=brightness, **options):
    """The address of a server in a thread."""
    lines = []
    service = RewardService(reward, "test", tell=lines.append, **options)
    with listen("127.0.0.1", 0) as listener:
        server = server_of(create_app(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", lines
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def url():
    with serving(limits=Limits(max_bytes=200_000, max_images=50, max_side=300)) as (address, _):
        yield address


def ask(url, path="/v1/score", body=None, media=TENSORS, method="POST", **headers):
    """Status and JSON of an answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        headers = {"Content-Type": media} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def tensors(images=None, prompts="a cat", **more):
    images = torch.rand(1, 3, 8, 8) if images is None else images
    prompts = json.dumps([prompts] * len(images)) if isinstance(prompts, str) else json.dumps(prompts)
    return save({"images": images} | more, {"prompts": prompts})


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_scores_are_those_of_the_reward_here():
    local = build_reward("tiny-animals", CPU)
    images = torch.rand(6, 3, 64, 64, generator=torch.manual_seed(0))
    prompts = ["a cat", "a dog", "a cat face on a blue background"] * 2
    expected = local(images, prompts)
    with serving(build_reward("tiny-animals", CPU)) as (url, lines):
        remote = build_reward(url, CPU)
        assert remote.format == "safetensors"
        assert torch.equal(remote(images, prompts), expected)
        rounded = local((images * 255).round() / 255, prompts)
        assert torch.equal(HTTPReward(url, format="png")(images, prompts), rounded)
        remote.max_images = 2
        torch.testing.assert_close(remote(images, prompts), expected, atol=1e-4, rtol=0)
    assert any("scored 6 images of 64 x 64" in line for line in lines)


@pytest.mark.parametrize("form", ["safetensors", "png"])
def test_what_prompts_have_beside_their_words_goes_along(form):
    def counts(images, prompts, metadata):
        assert prompts == ["a cat", "a dog"][-len(prompts) :]
        return [each.get("count", 0) for each in metadata]

    def indifferent(images, prompts):
        assert not any(isinstance(prompt, Prompt) for prompt in prompts)
        return torch.zeros(len(prompts))

    images, prompts = torch.rand(2, 3, 8, 8), [Prompt("a cat", {"count": 2, "où": "\u2028"}), "a dog"]
    with serving(counts) as (url, _):
        remote = HTTPReward(url, format=form)
        assert remote.takes_metadata
        assert remote(images, prompts).tolist() == [2, 0]
        remote.max_images = 1
        assert remote(images[1:], prompts[1:]).tolist() == [0]
    with serving(indifferent) as (url, _):
        assert HTTPReward(url, format=form)(images, prompts).tolist() == [0, 0]


def test_images_are_scored_in_batches():
    sizes = []

    def reward(images, prompts):
        assert len(images) == len(prompts)
        sizes.append(len(images))
        return brightness(images, prompts)

    images = torch.rand(5, 3, 8, 8)
    with serving(reward, batch_size=2) as (url, _):
        assert torch.equal(HTTPReward(url)(images, ["a cat"] * 5), brightness(images, None))
    assert sizes == [2, 2, 1]


def test_what_is_not_finite_is_null():
    with serving(lambda images, prompts: torch.tensor([float("nan"), 1.5, float("inf")])) as (url, _):
        status, answer = ask(url, body=tensors(torch.rand(3, 3, 8, 8)))
        assert (status, answer) == (200, {"rewards": [None, 1.5, None]})
        assert torch.isnan(HTTPReward(url)(torch.rand(3, 3, 8, 8), ["a cat"] * 3)).tolist() == [
            True,
            False,
            True,
        ]


def test_a_reward_that_fails_is_a_message_and_not_the_end():
    def moody(images, prompts):
        if prompts[0] == "raise":
            raise ZeroDivisionError("no images today")
        return images if prompts[0] == "lie" else brightness(images, prompts)

    with serving(moody) as (url, _):
        status, answer = ask(url, body=tensors(prompts="raise"))
        assert status == 500
        assert (
            answer["error"]
            .partition(" (")[0]
            .endswith("failed once for 'raise'; the last time: ZeroDivisionError: no images today")
        )
        status, answer = ask(url, body=tensors(prompts="lie"))
        assert status == 500
        assert "expected a tensor of 1 numbers" in answer["error"]
        with pytest.raises(
            RunFailedError, match=r"failed 2 times; the last time: status 500: .*no images today"
        ):
            HTTPReward(url, attempts=2, pause=0)(torch.rand(1, 3, 8, 8), ["raise"])
        assert ask(url, body=tensors())[0] == 200


def test_a_mistake_of_ours_is_a_message_too(monkeypatch, caplog):
    def broken(body, limits):
        raise KeyError("images")

    monkeypatch.setitem(DECODERS, TENSORS, broken)
    with serving() as (url, _):
        status, answer = ask(url, body=tensors())
        assert (status, answer) == (500, {"error": "a mistake in the server: KeyError: 'images'"})
        assert ask(url, "/healthz", method="GET")[0] == 200
    assert "Traceback" in caplog.text  # for whoever runs the server


def test_info_and_health(url):
    assert ask(url, "/healthz", method="GET") == (200, {"status": "ok"})
    status, info = ask(url, "/v1/info", method="GET")
    assert status == 200
    assert info["protocol"] == 1
    assert info["formats"] == ["safetensors", "png"]
    assert (info["max_bytes"], info["max_images"], info["max_side"]) == (200_000, 50, 300)


@pytest.mark.parametrize(("path", "method", "status"), [("/", "GET", 404), ("/v2/score", "POST", 404),
    ("/v1/score", "GET", 405), ("/docs", "GET", 404), ("/openapi.json", "GET", 404)])  # fmt: skip
def test_other_paths(url, path, method, status):
    got, answer = ask(url, path, method=method)
    assert got == status
    assert list(answer) == ["error"]


@pytest.mark.parametrize("given", [None, "", "wrong", "secre", "secretx"])
def test_a_wrong_token(given):
    with serving(token="secret") as (url, lines):
        headers = {} if given is None else {"Authorization": f"Bearer {given}"}
        assert ask(url, "/healthz", method="GET")[0] == 200
        assert ask(url, "/v1/info", method="GET", **headers)[0] == 401
        assert ask(url, body=tensors(), **headers)[0] == 401
        assert ask(url, body=tensors(), Authorization="Bearer secret")[0] == 200
        with pytest.raises(InputError, match=r"status 401.*DRIFTRL_REWARD_TOKEN"):
            HTTPReward(url, token=given or None)
        HTTPReward(url, token="secret")
    assert not any("secret" in line for line in lines)


def test_no_token_no_spaces():
    with pytest.raises(InputError, match="printable ASCII"):
        RewardService(brightness, "test", token="")


def test_a_large_body_is_refused_before_it_is_read(url):
    status, answer = ask(url, body=b"\0" * 5_000_000)  # far more than sockets hold: it was read and dropped
    assert status == 413
    assert "larger than 200000 bytes" in answer["error"]
    status, _ = ask(url, body=iter([b"\0" * 50_000] * 100))  # sent in chunks, without a length
    assert status == 413
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as line:
        line.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 999999999999\r\n\r\n")  # fmt: skip
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")  # and nothing of the body was sent


def test_a_body_that_does_not_arrive():
    with serving(limits=Limits(read_seconds=0.3)) as (url, _):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as line:
            line.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 100\r\n\r\n{")  # fmt: skip
            assert line.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as line:
            line.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        assert ask(url, body=tensors())[0] == 200  # whoever hung up left no mark


def test_one_at_a_time_and_the_rest_wait():
    running, most, gate = [], [], threading.Event()

    def slow(images, prompts):
        running.append(1)
        most.append(len(running))
        gate.wait(10)
        running.pop()
        return brightness(images, prompts)

    with serving(slow, limits=Limits(wait_seconds=0.5)) as (url, _):
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(ask(url, body=tensors())[0])) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while len(results) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert results == [503] * 3
        assert ask(url, "/healthz", method="GET")[0] == 200
        gate.set()
        for thread in threads:
            thread.join()
    assert sorted(results) == [200, 200, 503, 503, 503]
    assert max(most) == 1


def crafted(shape, offsets):
    """A safetensors file that says what a library would not write."""
    header = {
        "__metadata__": {"prompts": '["a"]'},
        "images": {"dtype": "F32", "shape": shape, "data_offsets": offsets},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


IMAGE = torch.rand(1, 3, 8, 8)
BAD_TENSORS = {
    "empty": (b"", "cut off"),
    "cut off": (tensors()[:-1], "no safetensors file"),
    "longer": (tensors() + b"\0", "no safetensors file"),
    "header too long": (b"\xff" * 8 + b"{}", "cut off"),
    "no JSON": (b"\x03" + b"\0" * 7 + b"abc", "no JSON"),
    "deep": ((100_000).to_bytes(8, "little") + b"[" * 100_000, "no JSON"),
    "a list": (b"\x02" + b"\0" * 7 + b"[]", "metadata"),
    "no prompts": (save({"images": IMAGE}), "metadata"),
    "prompts no JSON": (save({"images": IMAGE}, {"prompts": "a cat"}), "no JSON"),
    "prompts an object": (save({"images": IMAGE}, {"prompts": "{}"}), "list of strings"),
    "prompts numbers": (tensors(prompts=[1]), "list of strings"),
    "too few prompts": (tensors(torch.rand(2, 3, 8, 8), prompts=["a"]), "2 images and 1 prompts"),
    "half a surrogate": (save({"images": IMAGE}, {"prompts": '["\\ud800"]'}), "surrogate"),
    "a book as prompt": (tensors(prompts="a" * 10_001), "10000 characters"),
    "another tensor": (tensors(more=IMAGE), "one tensor"),
    "another name": (save({"pictures": IMAGE}, {"prompts": '["a"]'}), "one tensor"),
    "float64": (tensors(IMAGE.double()), "F32"),
    "uint8": (tensors(IMAGE.to(torch.uint8)), "F32"),
    "3 dimensions": (tensors(torch.rand(3, 8, 8), prompts=["a"]), r"\[N, 3, H, W\]"),
    "4 channels": (tensors(torch.rand(1, 4, 8, 8)), r"\[N, 3, H, W\]"),
    "no pixels": (tensors(torch.rand(1, 3, 0, 8)), "height and width in 1..300"),
    "no images": (tensors(torch.rand(0, 3, 8, 8)), "at least one"),
    "too wide": (tensors(torch.rand(1, 3, 1, 301)), "height and width in 1..300"),
    "too many": (tensors(torch.rand(51, 3, 2, 2)), "at most 50"),
    "NaN": (tensors(torch.full((1, 3, 2, 2), float("nan"))), "12 of 12 values are not finite"),
    "0 to 255": (tensors(IMAGE * 255), r"in 0\.\.1"),
    "-1 to 1": (tensors(IMAGE * 2 - 1), r"in 0\.\.1"),
    "a lie about the shape": (tensors().replace(b"[1,3,8,8]", b"[1,3,8,9]"), "no safetensors file"),
    "a huge shape": (crafted([10**6, 3, 10**6, 10**6], [0, 0]), "1000000 images and 1 prompts"),
    "a shape of true": (crafted([1, 3, True, True], [0, 12]), r"\[N, 3, H, W\]"),
    "a negative shape": (crafted([1, 3, -1, -1], [0, 12]), "height and width in 1..300"),
    "more than is there": (crafted([1, 3, 8, 8], [0, 768]), "no safetensors file"),
    "more than allowed": (crafted([1, 3, 300, 300], [0, 1_080_000]), "more than 200000 bytes"),
    "pickle": (pickle.dumps({"images": [1]}), "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_safetensors(url, kind):
    body, message = BAD_TENSORS[kind]
    status, answer = ask(url, body=body)
    assert status == 400, answer
    assert re.search(message, answer["error"]), answer


GOOD = png(np.zeros((8, 8, 3), np.uint8))
GREY = np.zeros((8, 8), np.uint8)


def bomb():
    """A PNG of one colour, far larger decoded than encoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


BAD_JSON = {
    "no JSON": (b"{", "no JSON"),
    "no UTF-8": (b"\xff\xfe{", "no JSON"),
    "a list": (b"[]", "expected {"),
    "another key": (json.dumps({"prompts": ["a"], "images": [GOOD], "code": ""}), "nothing else"),
    "metadata": (json.dumps({"prompts": ["a"], "images": [GOOD], "metadata": ["b"]}), "a list of objects"),
    "too much": (json.dumps({"prompts": ["a"], "images": [GOOD], "metadata": [{}, {}]}), "expected 1 objects, one per"),
    "numbers": (json.dumps({"prompts": ["a"], "images": [1]}), r"images\[0\]: expected a PNG in base64"),
    "no base64": (json.dumps({"prompts": ["a"], "images": ["@@@@"]}), "expected a PNG in base64"),
    "non-ASCII": (json.dumps({"prompts": ["a"], "images": ["é"]}), "expected a PNG in base64"),
    "too few": (json.dumps({"prompts": ["a", "b"], "images": [GOOD]}), "a list of 2 PNGs"),
    "no PNG": (json.dumps({"prompts": ["a"], "images": [base64.b64encode(b"GIF89a" * 9).decode()]}), "start like"),
    "half a PNG": (json.dumps({"prompts": ["a"], "images": [GOOD[:64]]}), "cannot be read"),
    "grey": (json.dumps({"prompts": ["a"], "images": [png(GREY)]}), "mode L"),
    "two sizes": (json.dumps({"prompts": ["a"] * 2, "images": [GOOD, png(np.zeros((9, 8, 3), np.uint8))]}), "2 sizes"),
    "too wide": (json.dumps({"prompts": ["a"], "images": [png(np.zeros((1, 301, 3), np.uint8))]}), "1..300"),
    "a bomb": (json.dumps({"prompts": ["a"], "images": [bomb()]}), "more than 200000 bytes"),
    "pickle": (pickle.dumps([1]), "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json(url, kind):
    body, message = BAD_JSON[kind]
    status, answer = ask(url, body=body, media=PNGS)
    assert status == 400, answer
    assert message.replace("\\", "") in answer["error"]


@pytest.mark.parametrize("media", ["application/octet-stream", "application/x-pickle", "text/plain", ""])
def test_pickle_is_refused_and_not_run(url, tmp_path, media):
    struck = tmp_path / "struck"

    class Evil:
        def __reduce__(self):
            return Path.touch, (struck,)

    for kind in (media, TENSORS, PNGS):
        status, _ = ask(url, body=pickle.dumps(Evil()), media=kind)
        assert status == (415 if kind == media else 400)
    assert not struck.exists()


def spoilt(draw, body):
    """The body with a few bytes changed, cut, or put in."""
    content = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["set", "cut", "insert"]))
        if how == "set" and place < len(content):
            content[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[place : place + draw(st.integers(1, 200))]
        else:
            content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["images", "__metadata__", "prompts", "dtype", "shape", "data_offsets"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@st.composite
def bodies(draw):
    """Bodies that are almost right, or not at all."""
    kind = draw(st.sampled_from(["tensors", "pngs", "header", "bytes"]))
    images = torch.rand(2, 3, 4, 4, generator=torch.manual_seed(0))
    if kind == "tensors":
        return TENSORS, spoilt(draw, tensors(images))
    if kind == "pngs":
        return PNGS, spoilt(draw, encode_json(encode_pngs(images), ["a", "b"]))
    if kind == "header":
        header = json.dumps(draw(HEADERS)).encode()
        return TENSORS, len(header).to_bytes(8, "little") + header + draw(st.binary(max_size=400))
    return draw(st.sampled_from([TENSORS, PNGS])), draw(st.binary(max_size=200))


@settings(max_examples=600, deadline=2000, suppress_health_check=list(HealthCheck))
@given(bodies())
def test_any_bytes_are_read_or_refused(case):
    media, body = case
    decode = decode_safetensors if media == TENSORS else decode_json
    try:
        images, prompts = decode(body, Limits(max_bytes=10_000, max_side=50))
    except InputError as error:
        assert str(error)
        return
    assert images.dtype == torch.float32
    assert images.dim() == 4
    assert images.shape[:2] == (len(prompts), 3)
    assert bool(torch.isfinite(images).all())


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
@given(bodies())
def test_any_bytes_over_http(url, case):
    media, body = case
    status, answer = ask(url, body=body, media=media)
    assert status in (200, 400)
    assert list(answer) == ["rewards" if status == 200 else "error"]


def test_an_address_that_is_taken():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot listen there: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="--host"):
        listen("no.such.host.invalid", 0)


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "driftrl.cli.main", "serve-reward", *arguments],
        stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip


def test_the_command_until_ctrl_c(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys, time\n"
        "assert not {'transformers', 'diffusers', 'peft', 'accelerate'} & set(sys.modules)\n"
        "def score(images, prompts):\n    time.sleep(1 if prompts[0] == 'slow' else 0)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in (
        "transformers",
        "diffusers",
        "peft",
        "accelerate",
    ):  # an environment made for another package
        (absent / f"{name}.py").write_text("raise ImportError('not here')\n")
    process = start(
        "mine:score", "--port", "0", PYTHONPATH=os.pathsep.join([str(absent), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        assert "reward=http://127.0.0.1:" in line, line + process.stderr.read()
        url = line.split("reward=")[1].strip()
        reward = HTTPReward(url)
        assert reward.name == "mine:score"
        assert reward(torch.ones(1, 3, 8, 8), ["a cat"]).tolist() == [1.0]
        late = []
        thread = threading.Thread(target=lambda: late.append(reward(torch.ones(1, 3, 8, 8), ["slow"])))
        thread.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        thread.join()
        assert late[0].tolist() == [1.0]  # what was in hand is answered
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "scored 1 images of 8 x 8" in message


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    (tmp_path / "stuck.py").write_text("import time\ndef score(images, prompts):\n    time.sleep(600)\n")
    process = start("stuck:score", "--port", "0", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    try:
        url = process.stderr.readline().split("reward=")[1].strip()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(url, body=tensors())))
        thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=20)
        thread.join()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "again to stop at once" in message
    assert "Traceback" not in message
    assert answers == [(503, {"error": "the server was stopped"})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-animal"], "did you mean 'tiny-animals'"),
        (["compressibility", "--device", "cuda:99"], "--device: 'cuda:99' is not available"),
        (["compressibility", "--token", "a b"], "printable ASCII"),
        (["compressibility", "--host", "999.1.1.1"], "--host 999.1.1.1"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    from driftrl.cli import main as command_line

    monkeypatch.setattr(sys, "argv", ["driftrl", "serve-reward", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    from driftrl.cli import main as command_line
    from driftrl.cli import serve_reward

    monkeypatch.setattr(serve_reward, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["driftrl", "serve-reward", "compressibility"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "token", "warned"), [("0.0.0.0", None, True), ("0.0.0.0", "s", False),
    ("127.0.0.1", None, False), ("localhost", None, False)])  # fmt: skip
def test_others_can_reach_it_only_when_asked(monkeypatch, capsys, host, token, warned):
    from driftrl.cli import serve_reward
    from driftrl.rewards import server

    bound = []

    class Nothing:
        def run(self, sockets):
            bound.append(sockets[0].getsockname())

    monkeypatch.setattr(server, "server_of", lambda app, on_stop: Nothing())
    serve_reward.serve_reward("compressibility", host, 0, "cpu", "auto", 1, None, token)
    assert ("no authentication" in capsys.readouterr().err) is warned
    assert bound[0][0] in (host, "127.0.0.1")
