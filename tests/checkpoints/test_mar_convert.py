"""MAR's checkpoints in the authors' layout become folders; anything else is refused in one sentence."""

import argparse

import pytest
import torch
from diffusers import AutoencoderKL

from studio import MAR, StudioError
from studio.checkpoints.mar import convert_mar, convert_mar_vae

SIZES = {
    "grid_size": 2,
    "token_dim": 16,
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


def test_network(tmp_path):
    torch.manual_seed(0)
    averaged, last = MAR(**SIZES), MAR(**SIZES)
    content = {"model": last.state_dict(), "model_ema": averaged.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    loaded = MAR.from_pretrained(convert_mar(tmp_path / "checkpoint-last.pth", tmp_path / "out"))
    assert {name: loaded.config[name] for name in SIZES} == SIZES
    assert all(torch.equal(weight, averaged.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_network_is_strict(tmp_path):
    state = MAR(**SIZES).state_dict()
    torch.save({"model_ema": {**state, "extra.weight": torch.zeros(1)}}, tmp_path / "more.pth")
    del state["decoder_blocks.0.attn.proj.bias"]
    torch.save({"model_ema": state}, tmp_path / "less.pth")
    with pytest.raises(StudioError, match=r"unknown weights, extra\.weight"):
        convert_mar(tmp_path / "more.pth", tmp_path / "out")
    with pytest.raises(StudioError, match=r"missing weights, decoder_blocks\.0\.attn\.proj\.bias"):
        convert_mar(tmp_path / "less.pth", tmp_path / "out")
    with pytest.raises(StudioError, match="not the checkpoint of a MAR"):
        torch.save({"model": {"some.weight": torch.zeros(1)}}, tmp_path / "other.pth")
        convert_mar(tmp_path / "other.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_autoencoder_is_strict(tmp_path):
    torch.save({"model": {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}}, tmp_path / "kl.ckpt")
    with pytest.raises(StudioError, match="not the checkpoint of a KL autoencoder of MAR"):
        convert_mar_vae(tmp_path / "kl.ckpt", tmp_path / "out")


def test_autoencoder(tmp_path, repository):
    import numpy as np

    with np.load(repository / "tests" / "golden" / "vae_small.npz") as stored:
        state = {name[3:]: torch.from_numpy(stored[name]) for name in stored if name.startswith("sd.")}
    torch.save({"model": state}, tmp_path / "kl.ckpt")
    loaded = AutoencoderKL.from_pretrained(convert_mar_vae(tmp_path / "kl.ckpt", tmp_path / "out"))
    assert loaded.config.scaling_factor == 0.2325
    assert torch.equal(loaded.quant_conv.weight, state["quant_conv.weight"].float())
