"""What the kinds rvq and kl start with is what a trained vq computes."""

import pytest
import torch
import torch.nn.functional as F

from studio.checkpoints.loading import load
from studio.training.from_vq import is_vq, start_kl, start_rvq
from studio.training.kl import KLRecipe
from studio.training.rvq import RVQRecipe
from studio.training.vq import VQRecipe

SIZES = {"data": "emoji", "size": 16, "grid": 4, "dim": 32, "layers": 1}


@pytest.fixture
def folder(few_images, recipe, tmp_path):
    """A vq with random weights, as its training exports it."""
    few_images(8)
    torch.manual_seed(0)
    made = recipe(VQRecipe, codes=16, model={"z_channels": 32}, **SIZES)
    made.export(made.build(), tmp_path / "vq")
    return tmp_path / "vq"


@pytest.fixture
def vq(folder):
    return load(folder, device="cpu", dtype=torch.float32).to(memory_format=torch.contiguous_format)


def blocks(network):
    return {name for name in network.state_dict() if name.startswith(("encoder.", "decoder."))}


@torch.no_grad()
def test_an_rvq_has_the_whole_encoder_and_decoder(vq, folder, recipe):
    made = recipe(RVQRecipe, codes=16, model={"z_channels": 32}, **SIZES)
    rvq = made.build().tokenizer.eval()
    folded = F.pixel_unshuffle(torch.rand(1, 3, 16, 16), 2)
    assert not torch.equal(rvq.encoder(folded), vq.encoder(folded))
    assert start_rvq(rvq, folder) == len(blocks(rvq))
    torch.testing.assert_close(rvq.encoder(folded), vq.encoder(folded))
    features = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(rvq.decoder(features), vq.decoder(features))


@torch.no_grad()
def test_an_autoencoder_kl_has_all_but_what_touches_its_latents(vq, folder, recipe):
    kl = recipe(KLRecipe, model={"latent_channels": 4}, **SIZES).build().tokenizer.network
    own = {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight"}
    assert start_kl(kl, folder) == len(blocks(kl) - own)
    hidden = torch.randn(1, 32, 4, 4)
    of_vq = vq.encoder.mid[1](vq.encoder.mid[0](hidden))
    of_kl = kl.encoder.mid_block.attentions[0](kl.encoder.mid_block.resnets[0](hidden, None))
    torch.testing.assert_close(of_kl, of_vq, atol=1e-4, rtol=1e-4)
    of_vq = vq.decoder.conv_blocks[1].res[0](hidden)
    torch.testing.assert_close(kl.decoder.up_blocks[1].resnets[0](hidden, None), of_vq, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [None, "{", "[]", '{"_class_name": "RVQTokenizer"}'])
def test_other_folders_are_no_vq(folder, tmp_path, config):
    assert is_vq(folder)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert not is_vq(tmp_path)
