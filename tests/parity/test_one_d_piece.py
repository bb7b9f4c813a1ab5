"""The authors' One-D-Piece, recorded; names and shapes of the published files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from studio.checkpoints.one_d_piece import _config, one_d_piece_from_state_dict
from studio.tokenizers.one_d_piece import OneDPieceTokenizer, sizes
from tests.parity.recordings import find, stem

KEYS = find("one_d_piece_official_keys")
recordings = pytest.mark.parametrize("path", [path for path in find("one_d_piece") if path not in KEYS], ids=stem)
official = pytest.mark.parametrize(
    ("name", "entry"), [(name, entry) for path in KEYS for name, entry in json.loads(path.read_text()).items()]
)


def close(ours, recorded, **tolerance):
    torch.testing.assert_close(ours, recorded, **{"atol": 2e-5, "rtol": 1e-4, **tolerance})


class Case:
    """A recording and the tokenizer with its weights."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.arrays = load_file(path.with_suffix(".safetensors"))
        settings, widths = self.info["config"]["model"]["vq_model"], self.info["vit_sizes"]
        heads = {f"{part}oder_heads": widths[settings[f"vit_{part}_model_size"]]["heads"] for part in ("enc", "dec")}
        state = {name[6:]: array for name, array in self.arrays.items() if name.startswith("state.")}
        self.model = one_d_piece_from_state_dict(state, **heads)
        self.settings = settings
        self.images = self["image"] * 2 - 1

    def __getitem__(self, name):
        return self.arrays[name]

    @property
    def vectors(self):
        """The recorded quantised vectors (B, N, code_dim)."""
        return self["z_quantized"][:, :, 0].transpose(1, 2)


@recordings
def test_sizes_are_inferred(path):
    case = Case(path)
    config, pixels = case.model.config, case.info["pixel_decoder"]
    assert config.sample_size == case.info["config"]["dataset"]["preprocessing"]["crop_size"]
    assert (config.num_tokens, config.codebook_size, config.code_dim) == tuple(
        case.settings[name] for name in ("num_latent_tokens", "codebook_size", "token_size")
    )
    assert [config.pixel_codes, config.pixel_code_dim] == case.info["pixel_codebook"]
    assert list(config.pixel_channel_multipliers) == pixels["channel_mult"]
    assert (config.pixel_base_channels, config.pixel_res_blocks) == (
        pixels["hidden_channels"],
        pixels["num_res_blocks"],
    )


@recordings
@torch.no_grad()
def test_tokens(path):
    case = Case(path)
    rows = case.model.encoder(case["image"], case.model.latent_tokens)
    close(rows, case["encoder_tokens_after_ln_post"])
    features = case.model.encode_features(case.images)
    close(features, case["encoder_z"][:, :, 0].transpose(1, 2))
    assert torch.equal(case.model.encode(case.images), case["token_ids"][:, 0])
    quantized = case.model.quantize_features(features)
    assert torch.equal(quantized.tokens, case["token_ids"][:, 0])
    close(quantized.vectors, case.vectors)


@recordings
@torch.no_grad()
def test_without_the_legacy_reshape_tokens_differ(path):
    """The negative control: the transpose that the authors did not make changes most of the tokens."""
    case = Case(path)
    case.model.register_to_config(legacy_reshape=False)
    assert (case.model.encode(case.images) != case["token_ids"][:, 0]).float().mean() > 0.5


@recordings
@torch.no_grad()
def test_images_of_any_first_tokens(path):
    case = Case(path)
    tokens, lengths = case["token_ids"][:, 0], case.info["lengths"]
    assert lengths
    for length in lengths:
        close(case.model.decode_features(case.vectors, length), case[f"decoder_logits_len{length}"])
        for images in (case.model.decode(tokens, length), case.model.decode(tokens[:, :length])):
            close((images + 1) / 2, case[f"decoded_len{length}"], atol=1e-4)


@recordings
@torch.no_grad()
def test_a_batch_of_mixed_lengths(path):
    """Each image of a batch is what was recorded for its own length."""
    case = Case(path)
    tokens, lengths = case["token_ids"][:, 0], case.info["lengths"]
    for first in range(len(lengths)):
        mixed = [lengths[(first + index) % len(lengths)] for index in range(len(tokens))]
        for index, image in enumerate((case.model.decode(tokens, mixed) + 1) / 2):
            close(image, case[f"decoded_len{mixed[index]}"][index], atol=1e-4)


@recordings
def test_losses_of_the_first_stage(path):
    case = Case(path)
    quantized = case.model.quantize_features(case.model.encode_features(case.images))
    weight = case.settings["commitment_cost"]
    close(weight * quantized.commitment, case["stage1_commitment_loss"].squeeze())
    close(quantized.codebook, case["stage1_codebook_loss"].squeeze())
    close(weight * quantized.commitment + quantized.codebook, case["stage1_quantizer_loss"].squeeze())
    if weight == 0.25:
        close(case.model(case.images)[1], case["stage1_quantizer_loss"].squeeze())
    logits = case.model.decode_features(quantized.vectors)
    cross_entropy = F.cross_entropy(logits.flatten(2), case["stage1_target_codes"])
    close(cross_entropy, case["stage1_ce_loss_full_length"].squeeze())


@recordings
@torch.no_grad()
def test_dropped_tails(path):
    case = Case(path)
    assert len(case["tail_drop_k"])
    for kept, logits in zip(case["tail_drop_k"].tolist(), case["tail_drop_stage1_logits"]):
        close(case.model.decode_features(case.vectors, kept), logits)


@official
def test_names_and_shapes(name, entry):
    with torch.device("meta"):
        published = {key: torch.empty(shape) for key, (shape, _) in entry["keys"].items()}
        config = _config(published)
        model = OneDPieceTokenizer(**config)
        preset = OneDPieceTokenizer(**sizes(name.split("-")[3]))
    assert {key: weight.shape for key, weight in model.state_dict().items()} == {
        key: weight.shape for key, weight in published.items()
    }
    assert sum(weight.numel() for weight in model.parameters()) == entry["n_params"]
    inferred, expected = (
        {key: value for key, value in each.config.items() if not key.startswith("_")} for each in (model, preset)
    )
    assert inferred == expected
