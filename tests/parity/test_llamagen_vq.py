"""The authors' VQ tokenizer, recorded."""

import pytest
import torch

from studio.checkpoints.llamagen import vq_from_state_dict
from tests.parity.recordings import Recording, find, stem

TOLERANCE = 1e-4


@pytest.mark.parametrize("path", find("llamagen_vq"), ids=stem)
@pytest.mark.parametrize("usage", [False, True], ids=["bare", "with-usage-buffer"])
@torch.no_grad()
def test_vq(path, usage):
    recording = Recording(path)
    io, state, config = recording.io, recording.state, recording.info["config"]
    if usage:
        state = {**state, "quantize.codebook_used": torch.zeros(65536)}
    model = vq_from_state_dict(state)
    assert list(model.config.channel_multipliers) == config["ch_mult"]
    assert model.downsample_factor == config["downsample"]
    assert model.config.codebook_size == config["codebook_size"]
    assert sum(weight.numel() for weight in model.parameters()) == recording.info["params"]

    close(model.encode_features(io["image"]), io["pre_quant"])
    assert torch.equal(model.encode(io["image"]), io["indices"])
    close(model.quantize.lookup(io["indices"]), io["quantized"])
    close(model.decode_features(io["quantized"]), io["reconstruction"])
    close(model(io["image"]), io["reconstruction"])
    batch, _, *cells = io["decoded"].shape
    grid = [side // model.downsample_factor for side in cells]
    close(model.decode(io["codes"].view(batch, *grid)), io["decoded"])


def close(ours, recorded):
    torch.testing.assert_close(ours, recorded, atol=TOLERANCE, rtol=0)
