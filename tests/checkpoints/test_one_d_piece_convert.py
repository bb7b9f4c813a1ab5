"""Published folders of One-D-Piece become folders that `studio.load` takes; others are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import studio
from studio import OneDPieceTokenizer, StudioError
from studio.checkpoints.one_d_piece import convert_one_d_piece


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return OneDPieceTokenizer(
        sample_size=16, patch_size=4, num_tokens=6, encoder_width=64, encoder_layers=1, encoder_heads=1,
        decoder_width=128, decoder_layers=2, decoder_heads=2, codebook_size=16, pixel_codes=8, pixel_code_dim=8,
        pixel_base_channels=32, pixel_channel_multipliers=(1, 1, 2), pixel_res_blocks=1,
    ).eval()  # fmt: skip


@pytest.fixture
def published(tokenizer, tmp_path):
    """The tokenizer as the authors publish theirs."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tokenizer.state_dict(), folder / "model.safetensors")
    write_config(folder, use_l2_norm=True, finetune_decoder=True)
    return folder


def write_config(folder, **settings):
    (folder / "config.json").write_text(json.dumps({"model": {"vq_model": settings}}))


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_a_converted_folder_loads(tokenizer, published, source, tmp_path):
    loaded = studio.load(convert_one_d_piece(published / source, tmp_path / "out"), device="cpu")
    assert isinstance(loaded, OneDPieceTokenizer) and not loaded.training
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens, 3), tokenizer.decode(tokens, 3))


@pytest.mark.parametrize("settings", [{"use_l2_norm": False}, {"finetune_decoder": False}])
def test_other_settings_are_refused(published, settings, tmp_path):
    write_config(published, **settings)
    with pytest.raises(StudioError, match=next(iter(settings))):
        convert_one_d_piece(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_and_files_are_refused(published, tokenizer, tmp_path):
    for content in ("{}", "no json", "[]"):
        (published / "config.json").write_text(content)
        with pytest.raises(StudioError, match="not the configuration"):
            convert_one_d_piece(published, tmp_path / "out")
    with pytest.raises(StudioError, match="not the configuration"):
        convert_one_d_piece(tmp_path, tmp_path / "out")
    first_stage = {name: weight for name, weight in tokenizer.state_dict().items() if not name.startswith("pixel_")}
    save_file(first_stage, tmp_path / "stage1.safetensors")
    with pytest.raises(StudioError, match="no pixel_quantize"):
        convert_one_d_piece(tmp_path / "stage1.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
