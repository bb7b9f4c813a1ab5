"""Decoders of image tokenizers in C against torch: the same pixels, for any grid, batch and number of threads."""

import copy

import pytest
import torch
from torch import nn

from studio import backends
from studio.backends import cpu_c_pixels
from studio.backends.cpu_c_pixels import NativeDecoder, can_decode
from studio.tokenizers import latent_autoencoder, vq
from studio.tokenizers.maskgit_decoder import MaskGITDecoder

DECODERS = {
    "vq": lambda: vq.Decoder(3, [16, 24], 1, 12, 8),
    "rvq": lambda: latent_autoencoder.Decoder(12, [8, 24], 1, 5, 8, (1,)),
    "maskgit": lambda: MaskGITDecoder(6, 3, 8, (1, 2), 2, 4),
}
FEATURES = {"vq": 12, "rvq": 5, "maskgit": 6}


def decoder_of(kind, halves=False):
    torch.manual_seed(0)
    decoder = DECODERS[kind]().eval()
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=0.2)
    return decoder.bfloat16().float() if halves else decoder


def features_of(kind, batch=1, height=4, width=5):
    return torch.randn(batch, FEATURES[kind], height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (4, 5), (3, 17)])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", DECODERS)
def test_pixels_equal_torchs(kind, halves, size):
    decoder, features = decoder_of(kind, halves), features_of(kind, 1, *size)
    assert can_decode(decoder)
    native = NativeDecoder(decoder)
    assert all(layer.bf16 == halves for layer in native._layers if layer.kind == 0 and kind != "maskgit")
    torch.testing.assert_close(native(features), decoder(features), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_threads_and_the_batch_change_no_bit(kind):
    native, features = NativeDecoder(decoder_of(kind)), features_of(kind, 3, 8, 8)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native(features))
            found.append(torch.cat([native(each) for each in features.split(1)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@torch.no_grad()
def test_a_tokenizer_decodes_with_it_until_its_weights_change(tiny_vq):
    tokens = torch.arange(16).view(1, 4, 4)
    twin = backends.select_pixels(tiny_vq)
    assert isinstance(twin.decoder, NativeDecoder) and not isinstance(tiny_vq.decoder, NativeDecoder)
    torch.testing.assert_close(twin.decode(tokens), tiny_vq.decode(tokens), atol=1e-4, rtol=1e-4)
    assert backends.select_pixels(tiny_vq).decoder is twin.decoder
    bias = tiny_vq.decoder.conv_out.bias
    bias.data += 1  # not counted by torch
    try:
        changed = backends.select_pixels(tiny_vq)
        torch.testing.assert_close(changed.decode(tokens), tiny_vq.decode(tokens), atol=1e-4, rtol=1e-4)
        assert (changed.decode(tokens) - twin.decode(tokens)).abs().min() > 0.9
    finally:
        bias.data -= 1


def test_others_are_decoded_by_torch(tiny_vq, monkeypatch):
    decoder = decoder_of("vq")
    decoder.norm_out = nn.BatchNorm2d(16)
    assert not can_decode(decoder)
    assert not can_decode(decoder_of("vq").bfloat16()) and not can_decode(nn.Conv2d(3, 3, 1))
    monkeypatch.setattr(cpu_c_pixels, "library", lambda: None)
    other = copy.deepcopy(tiny_vq)
    assert backends.select_pixels(other) is other
