"""What `emoji-rvq` and `emoji-kl` start with is what `emoji-vq` computes."""

import pytest
import torch
import torch.nn.functional as F

from studio.checkpoints.loading import load
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.training import emoji_kl, emoji_rvq
from studio.training.from_vq import start_kl, start_rvq


@pytest.fixture(scope="module")
def vq():
    return load("emoji-vq", device="cpu").to(memory_format=torch.contiguous_format)


def blocks(network):
    return {name for name in network.state_dict() if name.startswith(("encoder.", "decoder."))}


@torch.no_grad()
def test_an_rvq_has_the_whole_encoder_and_decoder(vq):
    rvq = RVQTokenizer(**emoji_rvq.CONFIG).eval()
    folded = F.pixel_unshuffle(torch.rand(1, 3, 32, 32), 4)
    assert not torch.equal(rvq.encoder(folded), vq.encoder(folded))
    assert start_rvq(rvq) == len(blocks(rvq))
    assert torch.equal(rvq.encoder(folded), vq.encoder(folded))
    features = torch.randn(1, 192, 4, 4)
    assert torch.equal(rvq.decoder(features), vq.decoder(features))


@torch.no_grad()
def test_an_autoencoder_kl_has_all_but_what_touches_its_latents(vq):
    kl = KLTokenizer(emoji_kl.AUTOENCODER, emoji_kl.UNSHUFFLE, scaling_factor=1.0, sample_size=emoji_kl.SIDE).network
    own = {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight"}
    assert start_kl(kl) == len(blocks(kl) - own)
    hidden = torch.randn(1, 96, 4, 4)
    of_vq = vq.encoder.mid[1](vq.encoder.mid[0](hidden))
    of_kl = kl.encoder.mid_block.attentions[0](kl.encoder.mid_block.resnets[0](hidden, None))
    torch.testing.assert_close(of_kl, of_vq, atol=1e-4, rtol=1e-4)
    of_vq = vq.decoder.conv_blocks[1].res[0](hidden)
    torch.testing.assert_close(kl.decoder.up_blocks[1].resnets[0](hidden, None), of_vq, atol=1e-4, rtol=1e-4)
