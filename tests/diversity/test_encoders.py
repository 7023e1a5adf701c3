"""Every image encoder: the real classes at tiny size, from a folder, against what transformers itself computes."""

import sys
import types
import zipfile
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

from driftrl import Trainer
from driftrl.build import build_encoder, build_policy
from driftrl.checks import InputError
from driftrl.diversity.encoders import MidBlockEncoder, TransformersEncoder
from driftrl.preprocess import preprocessing_of, resized

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vision = SMALL | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(
        CLIPConfig(text_config=SMALL | {"vocab_size": 50}, vision_config=vision, projection_dim=12)
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, processor, lambda x: model.get_image_features(pixel_values=x)


def siglip(folder):
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    vision = SMALL | {"image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=SMALL | {"vocab_size": 50}, vision_config=vision))
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return model, processor, lambda x: model.get_image_features(pixel_values=x)


def dinov2(folder):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8))
    processor = BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return model, processor, lambda x: model(pixel_values=x).pooler_output


@pytest.mark.parametrize("make", [clip, siglip, dinov2])
def test_features_are_those_of_transformers(make, tmp_path):
    torch.manual_seed(0)
    model, processor, reference = make(tmp_path)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 10), (48, 60), mode="bilinear")
    pixels = (smooth * 255).round().byte()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    wanted = torch.from_numpy(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    images = pixels.float() / 255
    ours = preprocessing_of(tmp_path, None)(images)
    torch.testing.assert_close(ours, wanted.float(), atol=1e-5, rtol=0)
    with torch.no_grad():
        features = reference(ours)
    features = getattr(features, "pooler_output", features)
    encoder = build_encoder(str(tmp_path), CPU)
    torch.testing.assert_close(encoder(images), features, atol=1e-5, rtol=1e-5)
    small = TransformersEncoder(tmp_path, batch_size=2)
    torch.testing.assert_close(small(images), features, atol=1e-5, rtol=1e-5)


def test_a_model_of_texts_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**SMALL, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a model of images; got BertModel"):
        build_encoder(str(tmp_path), CPU)


def test_the_latents_of_the_policy(config):
    policy = build_policy(config())
    encoder = build_encoder("policy:latents", CPU, policy)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        z = (
            policy.pipeline.vae.encode(images * 2 - 1).latent_dist.mean
            * policy.pipeline.vae.config.scaling_factor
        )
    torch.testing.assert_close(encoder(images), z.flatten(1))


def test_an_autoencoder_gets_few_pixels_at_once(config, monkeypatch):
    """It takes gigabytes for a large picture; the features stay the same."""
    policy, counts = build_policy(config()), []
    encoder, images = build_encoder("policy:latents", CPU, policy), torch.rand(5, 3, 16, 16)
    whole, encode = encoder(images), policy.pipeline.vae.encode
    monkeypatch.setattr("driftrl.diversity.encoders.PIXELS_AT_ONCE", 2 * 16 * 16)
    monkeypatch.setattr(policy.pipeline.vae, "encode", lambda x: counts.append(len(x)) or encode(x))
    torch.testing.assert_close(encoder(images), whole)
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_mid_block_of_the_policy_ignores_the_adapter(config, family, tmp_path):
    changes = {"model__path": str(families.make_sdxl(tmp_path / "sdxl"))} if family == "sdxl" else {}
    policy = build_policy(config(**changes))
    encoder = build_encoder("policy:mid-block", CPU, policy)
    assert isinstance(encoder, MidBlockEncoder)
    images = torch.rand(3, 3, 16, 16)
    before = encoder(images)
    assert before.shape == (3, 32)
    torch.testing.assert_close(encoder(images[1:2]), before[1:2], atol=1e-5, rtol=1e-5)
    assert (before[0] - before[1]).norm() > 1e-3 * before.norm()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(encoder(images), before)
    assert not policy.pipeline.unet.mid_block._forward_hooks


@pytest.mark.parametrize("name", ["policy:latents", "policy:mid-block"])
def test_training_with_the_policys_own_features(config, tmp_path, name):
    trainer = Trainer(config(iterations=1, shaping__encoder=name), tmp_path / "run")
    assert trainer.loop.iterate().metrics["diversity/kept_mean"] > 0


def test_policy_encoders_need_a_policy():
    with pytest.raises(InputError, match="needs a policy"):
        build_encoder("policy:latents", CPU)
    with pytest.raises(InputError, match="did you mean 'policy:latents'"):
        build_encoder("policy:latent", CPU)


def test_dreamsim_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(InputError, match=r"\.\[dreamsim\]"):
        build_encoder("dreamsim", CPU)


def test_dreamsim_is_asked_as_its_package_wants(monkeypatch, tmp_path):
    """The package cannot be installed without torchvision: a stand-in records what it is asked."""
    asked = {}

    class Model(torch.nn.Module):
        def embed(self, images):
            asked["shape"], asked["range"] = tuple(images.shape), (float(images.min()), float(images.max()))
            return images.mean((2, 3))

    def dreamsim(pretrained, device, dreamsim_type, cache_dir):
        asked["variant"], asked["cache"] = (pretrained, device, dreamsim_type), Path(cache_dir)
        with pytest.raises(Timeout), FileLock(asked["cache"] / "lock", timeout=0):
            pass  # another process waits until the files are there
        return Model(), None

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=dreamsim))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    features = build_encoder("dreamsim:dino_vitb16", CPU)(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 3)
    assert asked["variant"] == (True, "cpu", "dino_vitb16")
    assert asked["shape"] == (2, 3, 224, 224)
    assert 0 <= asked["range"][0] < asked["range"][1] <= 1
    assert asked["cache"] == tmp_path / "torch/dreamsim"
    build_encoder("dreamsim", CPU)
    assert asked["variant"][2] == "ensemble"

    def broken(**_):
        raise zipfile.BadZipFile("File is not a zip file")

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=broken))
    with pytest.raises(
        InputError, match="cannot be loaded: File is not a zip file; its weights come from the network"
    ):
        build_encoder("dreamsim", CPU)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients_through_pil_s_resizing_are_those_without_rounding(mode):
    """The pictures are PIL's to the last bit all the same."""
    images = torch.rand(2, 3, 9, 20, generator=torch.Generator().manual_seed(0)).mul(0.6).add(0.2)
    weights = torch.randn(2, 3, 6, 31, generator=torch.Generator().manual_seed(1))
    mine, theirs = (images.clone().requires_grad_() for _ in range(2))
    small = resized(mine, (6, 31), mode)
    assert torch.equal(small.detach(), resized(images, (6, 31), mode))
    (small * weights).sum().backward()
    # torch's bicubic has PIL's filter where it is asked to be antialiased.
    smooth = torch.nn.functional.interpolate(theirs, (6, 31), mode=mode, antialias=True, align_corners=False)
    (smooth * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["policy:latents", "policy:mid-block"])
def test_encoders_are_differentiable_where_the_images_ask_for_it(config, name):
    policy = build_policy(config())
    encoder = build_encoder(name, CPU, policy)
    images = torch.rand(2, *policy.image_shape, generator=torch.Generator().manual_seed(0)).mul(0.8).add(0.1)
    free, way = (
        images.clone().requires_grad_(),
        torch.randn(images.shape, generator=torch.Generator().manual_seed(1)),
    )
    plain = encoder(images)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    assert not plain.requires_grad
    (gradient,) = torch.autograd.grad((encoder(free) * weights).sum(), free)
    change = ((encoder(images + 2e-4 * way) - encoder(images - 2e-4 * way)) * weights).double().sum() / 4e-4
    assert float((gradient * way).double().sum()) == pytest.approx(float(change), rel=0.05, abs=1e-2)
