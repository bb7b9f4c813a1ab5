"""T5 encoders in C against transformers': the same states, alone and in a batch."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from studio import backends
from studio.backends import cpu_c_text
from studio.backends.cpu_c_text import NativeT5, can_encode


def encoder_of(activation, halves=False):
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 2, "vocab_size": 50}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj=activation)).eval()
    return encoder.bfloat16().float() if halves else encoder


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["relu", "gated-gelu", "gelu"])
def test_states_equal_transformers(activation, halves, length):
    encoder = encoder_of(activation, halves)
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    expected = encoder(input_ids=ids).last_hidden_state
    native = backends.select_text(encoder)
    assert isinstance(native, NativeT5)
    torch.testing.assert_close(native(ids), expected, atol=2e-5, rtol=2e-5)
    assert (native(ids.flip(1)) - expected).abs().max() > 0.1 or length == 1


def test_others_are_left_to_transformers(monkeypatch):
    assert not can_encode(encoder_of("relu").bfloat16()) and not can_encode(encoder_of("gated-silu"))
    assert backends.select_text(encoder_of("relu").train()) is None
    monkeypatch.setattr(cpu_c_text, "library", lambda: None)
    assert backends.select_text(encoder_of("relu")) is None
