"""MAR's checkpoints in the authors' layout become folders; anything else is refused in one sentence."""

import argparse

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import studio
from studio import MAR, ContinuousSpeculative, MARPipeline, StudioError
from studio.checkpoints.mar import convert_mar, convert_mar_vae

SIZES = {
    "grid_size": 2,
    "token_dim": 4,
    "encoder_dim": 64,
    "encoder_depth": 1,
    "encoder_heads": 1,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 1,
    "num_classes": 3,
    "buffer_size": 2,
    "head_width": 16,
    "head_depth": 2,
}


@pytest.fixture
def kl(tmp_path, repository):
    """The authors' autoencoder at a small size, as their file."""
    with np.load(repository / "tests" / "golden" / "vae_small.npz") as stored:
        state = {name[3:]: torch.from_numpy(stored[name]) for name in stored if name.startswith("sd.")}
    torch.save({"model": state}, tmp_path / "kl.ckpt")
    return tmp_path / "kl.ckpt"


def test_a_pipeline_that_samples(tmp_path, kl):
    torch.manual_seed(0)
    averaged, last, small = MAR(**SIZES), MAR(**SIZES), MAR(**{**SIZES, "head_depth": 1})
    content = {"model": last.state_dict(), "model_ema": averaged.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    torch.save({"model_ema": small.state_dict()}, tmp_path / "small.pth")
    files = {"tokenizer": convert_mar_vae(kl, tmp_path / "kl"), "drafter": tmp_path / "small.pth"}
    pipe = studio.load(convert_mar(tmp_path / "checkpoint-last.pth", tmp_path / "out", **files), device="cpu")
    assert isinstance(pipe, MARPipeline) and pipe.config.default_num_inference_steps == 4
    network = pipe.transformer
    assert {name: network.config[name] for name in SIZES} == SIZES
    assert all(torch.equal(weight, averaged.state_dict()[name]) for name, weight in network.state_dict().items())
    assert pipe.drafter.config.head_depth == 1
    pipe.set_progress_bar_config(disable=True)
    decoding = ContinuousSpeculative(diffusion_steps=3)
    sampled = pipe(class_labels=2, generator=torch.Generator().manual_seed(0), decoding=decoding, output_type="pt")
    assert sampled.images.shape[:2] == (1, 3) and sampled.images.isfinite().all()
    again = convert_mar(tmp_path / "checkpoint-last.pth", tmp_path / "from-file", tokenizer=kl)
    assert torch.equal(studio.load(again, device="cpu").decode_tokens(sampled.tokens, "pt"), sampled.images)


def test_parts_that_do_not_fit_are_refused(tmp_path, kl):
    torch.save({"model": MAR(**SIZES).state_dict()}, tmp_path / "mar.pth")
    torch.save({"model": MAR(**{**SIZES, "num_classes": 4}).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(StudioError, match="num_classes 4"):
        convert_mar(tmp_path / "mar.pth", tmp_path / "out", tokenizer=kl, drafter=tmp_path / "other.pth")
    with pytest.raises(StudioError, match="not a checkpoint"):
        convert_mar(tmp_path / "mar.pth", tmp_path / "out", tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_network_is_strict(tmp_path, kl):
    state = MAR(**SIZES).state_dict()
    torch.save({"model_ema": {**state, "extra.weight": torch.zeros(1)}}, tmp_path / "more.pth")
    del state["decoder_blocks.0.attn.proj.bias"]
    torch.save({"model_ema": state}, tmp_path / "less.pth")
    with pytest.raises(StudioError, match=r"unknown weights, extra\.weight"):
        convert_mar(tmp_path / "more.pth", tmp_path / "out", tokenizer=kl)
    with pytest.raises(StudioError, match=r"missing weights, decoder_blocks\.0\.attn\.proj\.bias"):
        convert_mar(tmp_path / "less.pth", tmp_path / "out", tokenizer=kl)
    with pytest.raises(StudioError, match="not the checkpoint of a MAR"):
        torch.save({"model": {"some.weight": torch.zeros(1)}}, tmp_path / "other.pth")
        convert_mar(tmp_path / "other.pth", tmp_path / "out", tokenizer=kl)
    assert not (tmp_path / "out").exists()


def test_autoencoder_is_strict(tmp_path):
    torch.save({"model": {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}}, tmp_path / "kl.ckpt")
    with pytest.raises(StudioError, match="not the checkpoint of a KL autoencoder of MAR"):
        convert_mar_vae(tmp_path / "kl.ckpt", tmp_path / "out")


def test_autoencoder(tmp_path, kl):
    state = torch.load(kl)["model"]
    loaded = AutoencoderKL.from_pretrained(convert_mar_vae(kl, tmp_path / "out"))
    assert loaded.config.scaling_factor == 0.2325
    assert torch.equal(loaded.quant_conv.weight, state["quant_conv.weight"].float())
