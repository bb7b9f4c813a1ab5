"""One-D-Piece: any first tokens are an image, batches of mixed lengths, the legacy reshape, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F

from studio import StudioError
from studio.tokenizers.latent_transformer import Block
from studio.tokenizers.one_d_piece import PRESETS, OneDPieceTokenizer, sizes
from studio.tokenizers.patch_pixels import PatchPixels

SIZES = {
    "sample_size": 16,
    "patch_size": 4,
    "num_tokens": 6,
    "encoder_width": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_width": 24,
    "decoder_layers": 2,
    "decoder_heads": 3,
    "code_dim": 4,
    "codebook_size": 32,
    "pixel_codes": 8,
    "pixel_code_dim": 8,
    "pixel_base_channels": 8,
    "pixel_channel_multipliers": (1, 1, 2),
    "pixel_res_blocks": 1,
    "norm_groups": 4,
}
STAGES = pytest.mark.parametrize("stage", ["maskgit-vqgan", "patches"])


def tiny(**more):
    torch.manual_seed(0)
    return OneDPieceTokenizer(**{**SIZES, **more}).eval()


def images(n=3):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@STAGES
@torch.no_grad()
def test_the_first_tokens_are_an_image_and_the_rest_does_not_count(stage):
    model = tiny(pixel_stage=stage)
    tokens = model.encode(images())
    assert tokens.shape == (3, 6) and tokens.dtype == torch.int64
    for length in (1, 4, 6):
        restored = model.decode(tokens, length)
        assert restored.shape == (3, 3, 16, 16)
        torch.testing.assert_close(restored, model.decode(tokens[:, :length]))
        other = tokens.clone()
        other[:, length:] = (other[:, length:] + 1) % 32
        torch.testing.assert_close(restored, model.decode(other, length))
    assert not torch.allclose(model.decode(tokens, 5), model.decode(tokens), atol=1e-4)


@STAGES
@torch.no_grad()
def test_a_batch_of_mixed_lengths_equals_its_images_alone(stage):
    model = tiny(pixel_stage=stage)
    tokens, lengths = model.encode(images()), [2, 5, 1]
    together = model.decode(tokens, lengths)
    for index, length in enumerate(lengths):
        alone = model.decode(tokens[index : index + 1, :length])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_legacy_reshape_reads_rows_as_columns():
    model = tiny()
    rows = model.encoder((images() + 1) / 2, model.latent_tokens)
    n, width = rows.shape[1:]
    expected = torch.empty(3, width, n)
    for channel in range(width):
        for token in range(n):
            place = channel * n + token
            expected[:, channel, token] = rows[:, place // width, place % width]
    projected = F.conv1d(expected, model.encoder.conv_out.weight[..., 0], model.encoder.conv_out.bias)
    torch.testing.assert_close(model.encode_features(images()), projected.transpose(1, 2))
    model.register_to_config(legacy_reshape=False)
    projected = F.conv1d(rows.transpose(1, 2), model.encoder.conv_out.weight[..., 0], model.encoder.conv_out.bias)
    torch.testing.assert_close(model.encode_features(images()), projected.transpose(1, 2))


@torch.no_grad()
def test_a_block_equals_torchs_own_layer():
    torch.manual_seed(0)
    ours, x = Block(16, 4).eval(), torch.randn(2, 5, 16)
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 64, activation="gelu", batch_first=True, norm_first=True).eval()
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    state = {}
    for name, weight in ours.state_dict().items():
        part = next(part for part in names if name.startswith(part))
        state[names[part] + name[len(part) :]] = weight
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_are_the_nearest_codes_by_angle():
    model = tiny()
    features = model.encode_features(images())
    angles = F.cosine_similarity(features[:, :, None], model.quantize.embedding.weight, dim=-1)
    assert torch.equal(model.encode(images()), angles.argmax(dim=-1))


@torch.no_grad()
def test_patches_stand_side_by_side_and_see_their_neighbours():
    torch.manual_seed(0)
    stage, vectors = PatchPixels(3, 4, 8), torch.randn(1, 48, 3, 3)
    torch.testing.assert_close(stage(vectors), F.pixel_shuffle(vectors, 4))
    torch.nn.init.normal_(stage.conv_out.weight)
    changed = vectors.clone()
    changed[..., 0, 0] += 1
    difference = (stage(changed) - stage(vectors)).abs().amax(dim=1)[0]
    assert difference[0, 4] > 0 and difference[4, 0] > 0 and not difference[8:].any() and not difference[:, 8:].any()


def test_gradients_pass_the_quantiser_and_reach_the_codebook():
    model = tiny(pixel_stage="patches")
    features = model.encode_features(images()).detach().requires_grad_()
    quantized = model.quantize_features(features)
    assert torch.equal(quantized.vectors, model.codebook[quantized.tokens]) or torch.allclose(
        quantized.vectors, model.codebook[quantized.tokens], atol=1e-6
    )
    unit = F.normalize(features, dim=-1)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    [passed] = torch.autograd.grad((quantized.vectors * weights).sum(), features, retain_graph=True)
    [expected] = torch.autograd.grad((unit * weights).sum(), features)
    torch.testing.assert_close(passed, expected)
    restored, loss = model(images(), 3)
    (restored.square().mean() + loss).backward()
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    assert model.latent_tokens.grad.abs().sum() > 0
    torch.testing.assert_close(restored, model.decode(model.encode(images()), 3), atol=1e-5, rtol=1e-4)


def test_training_mode_drops_nothing():
    model = tiny().train()
    tokens = model.encode(images())
    torch.testing.assert_close(model.decode(tokens), tiny().decode(tokens))


def test_refusals():
    model = tiny()
    tokens = model.encode(images())
    for length in (0, 7, [1, 2], [1, 2, 7]):
        with pytest.raises(StudioError, match="length"):
            model.decode(tokens, length)
    for wrong in (tokens[:, :0], torch.cat((tokens, tokens), dim=1)):
        with pytest.raises(StudioError, match="from 1 to 6 tokens"):
            model.decode(wrong)
    with pytest.raises(StudioError, match="Images must be"):
        model.encode(torch.zeros(1, 3, 16, 20))
    for wrong in (
        {"pixel_stage": "none"},
        {"patch_size": 5},
        {"encoder_heads": 3},
        {"pixel_channel_multipliers": (1,)},
    ):
        with pytest.raises(StudioError):
            tiny(**wrong)
    with pytest.raises(StudioError, match="S, B, L"):
        sizes("XL")


def test_presets_make_tokenizers():
    with torch.device("meta"):
        for preset, size in PRESETS.items():
            model = OneDPieceTokenizer(**sizes(preset))
            assert model.latent_tokens.shape == (256, size["width"]) and model.bits_per_token == 12
