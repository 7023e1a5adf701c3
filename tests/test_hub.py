"""Without the hub: one message that names all that is missing, and no minute of trying again."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from driftrl import Trainer, hub
from driftrl.build import _demand_reachable
from driftrl.checks import InputError
from driftrl.config import ModelConfig, load_config
from driftrl.pipelines import _files, load_pipeline
from test_cli import apart

PAPER = Path(__file__).parents[1] / "experiments" / "paper"
NOWHERE = "http://127.0.0.1:9"
"""Where nobody listens."""


@pytest.fixture
def online(monkeypatch):
    """As without HF_HUB_OFFLINE, which tests have; what `hub.answers` found is forgotten before and after."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.answers.cache_clear()
    yield monkeypatch
    hub.answers.cache_clear()


@pytest.mark.parametrize("name", ["sd15-pickscore", "sd15-hpsv2"])
def test_the_papers_configurations_name_all_that_is_missing(name, tmp_path):
    reward = {"sd15-pickscore": "yuvalkirstain/PickScore_v1", "sd15-hpsv2": "weights/hpsv2"}[name]
    with pytest.raises(InputError) as caught:
        Trainer(
            load_config(PAPER / f"{name}.yaml", ["shaping.encoder=facebook/dinov2-small"]), tmp_path / "run"
        )
    message = str(caught.value)
    for part in (reward, "stable-diffusion-v1-5/stable-diffusion-v1-5", "facebook/dinov2-small"):
        assert part in message
    kind = name.partition("-")[2]
    assert f"--set model.path=FOLDER --set reward={kind}@FOLDER --set shaping.encoder=FOLDER" in message
    assert not (tmp_path / "run").exists()


def test_what_is_here_is_not_asked_for(config, tmp_path, monkeypatch):
    """Folders, rewards without a network and copies in the cache."""
    monkeypatch.setattr(hub, "answers", lambda: False)
    Trainer(config(iterations=0), tmp_path / "run").run()
    asked = []
    monkeypatch.setattr(hub, "has", lambda name, file, revision: asked.append((name, file, revision)) or True)
    changes = {"model__path": "owner/model", "model__revision": "v1", "reward": "clipscore"}
    with pytest.raises(InputError, match="clipscore cannot be loaded"):  # for in truth the cache has no copy
        Trainer(config(**changes), tmp_path / "other")
    assert asked == [
        ("owner/model", "model_index.json", "v1"), ("openai/clip-vit-large-patch14", "config.json", None)
    ]  # fmt: skip


@pytest.mark.parametrize("endpoint", [NOWHERE, "http://[", "nothing"])
def test_a_hub_that_does_not_answer_is_not_asked_again(online, endpoint):
    online.setattr(constants, "ENDPOINT", endpoint)
    assert not hub.answers()
    assert is_offline_mode()


def test_a_hub_that_answers(online):
    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)  # that it answers is enough
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.answers()
        server.shutdown()
    assert not is_offline_mode()


def test_names_that_are_none():
    assert not hub.has("no name at all", "config.json")
    assert not hub.has("owner/model", "config.json")


def test_the_command_says_it_once(tmp_path, monkeypatch):
    """Nothing of the libraries' own attempts is printed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delitem(os.environ, name, raising=False)
    monkeypatch.setitem(os.environ, "HF_ENDPOINT", NOWHERE)
    result = apart("train", PAPER / "sd15-pickscore.yaml", "--out", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.startswith("driftrl: the hub does not answer") and "Retrying" not in result.stderr


def test_a_hub_that_is_switched_off_is_said_to_be(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "answers", lambda: False)
    with pytest.raises(InputError, match="the hub is switched off by HF_HUB_OFFLINE, and here are neither"):
        _demand_reachable(load_config(PAPER / "sd15-pickscore.yaml"))


@pytest.mark.parametrize(
    ("files", "dtype", "wanted"),
    [
        (["unet/a.fp16.safetensors", "vae/b.fp16.safetensors"], "bfloat16", "fp16"),
        (["unet/a.bf16-00001-of-00002.safetensors", "vae/b.safetensors", "vae/b.bf16.safetensors"], "float32", "bf16"),
        (["unet/a.fp16.safetensors", "unet/a.safetensors", "vae/b.fp16.safetensors", "vae/b.safetensors"], "float32", None),
        (["unet/a.fp16.safetensors", "unet/a.safetensors", "vae/b.fp16.safetensors", "vae/b.safetensors"], "float16", "fp16"),
        (["unet/a.fp16.safetensors", "unet/a.safetensors", "vae/b.safetensors"], "float16", None),
        (["unet/a-00001-of-00002.safetensors", "vae/b.safetensors", "whole.fp16.safetensors"], "bfloat16", None),
    ],
)  # fmt: skip
def test_files_of_half_precision_are_asked_for_where_there_are_no_others_or_they_suffice(
    monkeypatch, files, dtype, wanted
):
    asked = {}

    def from_pretrained(name, **named):
        asked.update(named)
        raise OSError("no more than this")

    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(hub, "files", lambda name, revision: [*files, "model_index.json", "README.md"])
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="no more than this"):
        load_pipeline(ModelConfig(path="owner/model", dtype=dtype))
    assert asked["variant"] == wanted


def test_without_the_hub_the_files_in_the_cache_count(monkeypatch, tmp_path):
    for file in ("unet/a.fp16.safetensors", "vae/b.fp16.safetensors", "model_index.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(hub, "cached", lambda name, file, revision: tmp_path / file)
    assert _files("owner/model", None) == ["unet/a.fp16.safetensors", "vae/b.fp16.safetensors"]


@pytest.mark.parametrize(
    ("kind", "told"), [(GatedRepoError, "it is gated: accept its terms"), (RepositoryNotFoundError, "or a private one")]
)  # fmt: skip
def test_a_repository_that_is_closed_is_said_to_be(monkeypatch, kind, told):
    """Which lies below what the libraries raise."""

    def from_pretrained(name, **_):
        answer = SimpleNamespace(headers={}, request=None)
        try:
            raise kind("403 Client Error.\n\nCannot access it", response=answer)
        except kind as error:
            raise OSError("We could not load model_index.json") from error

    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(hub, "files", lambda name, revision: [])
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match=f"owner/model cannot be loaded: .*{told}.*hf auth login$"):
        load_pipeline(ModelConfig(path="owner/model"))
