"""The start of a One-D-Piece tokenizer: untrained it already restores images, each token from where it stands."""

import pytest
import torch
import torch.nn.functional as F

from studio import LlamaGen
from studio.tokenizers.latent_transformer import Block
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.training import pyramid_init
from studio.training.llamagen import read_initial_regions
from studio.training.pyramid_init import init_as_pyramid, pyramid
from studio.training.row_map_init import add_map_of_marked

SIZES = {
    "sample_size": 16,
    "patch_size": 4,
    "num_tokens": 20,
    "encoder_width": 64,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_width": 64,
    "decoder_layers": 2,
    "decoder_heads": 2,
    "code_dim": 12,
    "codebook_size": 1024,
    "legacy_reshape": False,
    "pixel_stage": "patches",
    "pixel_base_channels": 8,
}


def smooth_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=16, mode="bicubic", align_corners=True).clamp(-1, 1)


def started_with(**sizes):
    torch.manual_seed(0)
    tokenizer = OneDPieceTokenizer(**{**SIZES, **sizes})
    init_as_pyramid(tokenizer, smooth_images(256, seed=1))
    return tokenizer.eval()


@pytest.fixture(scope="module")
def started():
    return started_with()


def left(tokenizer, images, length):
    """Mean squared error from the first tokens, before quantisation, over the images' variance."""
    vectors = F.normalize(tokenizer.encode_features(images), dim=-1)
    return float((tokenizer.decode_vectors(vectors, length) - images).square().mean() / images.var())


def test_a_pyramid_goes_from_quarters_to_cells_and_over_the_cells_again():
    shares = pyramid(4, 23)
    assert torch.allclose(shares.sum(dim=1), torch.ones(23))
    assert sorted(map(tuple, (shares[:4] > 0).nonzero().tolist())) == [
        (quarter, 8 * (quarter // 2) + 2 * (quarter % 2) + 4 * row + column)
        for quarter in range(4)
        for row in range(2)
        for column in range(2)
    ]
    cells = shares[4:20].argmax(dim=1)
    assert set(cells[:4].tolist()) == {5, 6, 9, 10} and set(cells.tolist()) == set(range(16))
    assert torch.equal(shares[20:], shares[4:7])
    assert pyramid(8, 128).shape == (128, 64) and pyramid(5, 3).shape == (3, 25)


@torch.no_grad()
def test_untrained_it_restores_images_and_better_from_more_tokens(started):
    """Random weights, the control, restore nothing."""
    images = smooth_images(64, seed=2)
    errors = [left(started, images, length) for length in (4, 12, 20)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1
    torch.manual_seed(0)
    assert left(OneDPieceTokenizer(**SIZES).eval(), images, 20) > 0.9


@torch.no_grad()
def test_tokens_that_stand_for_a_cell_once_more_tell_more(monkeypatch):
    """Of six numbers a token, so that one does not say it all; where they turn to nothing new, the control, they add
    little.
    """
    images = smooth_images(64, seed=2)
    gains = []
    for turn in (pyramid_init._turn_to_the_next, lambda *args: None):
        monkeypatch.setattr(pyramid_init, "_turn_to_the_next", turn)
        tokenizer = started_with(num_tokens=36, code_dim=6)
        gains.append(left(tokenizer, images, 20) / left(tokenizer, images, 36))
    assert gains[0] > 1.5 and gains[1] < 1.05


@torch.no_grad()
def test_a_block_maps_marked_rows_and_leaves_others_alone():
    torch.manual_seed(0)
    block = Block(32, 2)
    block.mlp.c_proj.weight.zero_()
    rows = torch.randn(500, 6, 32)
    rows[..., -1] = 0
    rows[:, 4:, -1] = 5
    change = torch.zeros(32, 32)
    change[:3, :8] = torch.randn(3, 8)
    before = block(rows)
    add_map_of_marked(block, change, -1, torch.tensor([4, 5]), lambda: block(rows))
    added = block(rows) - before
    attended = rows + block.attn(block.ln_1(rows))
    expected = attended @ change.T
    assert (added[:, 4:] - expected[:, 4:]).std() < 0.15 * expected.std()
    assert added[:, :4].std() < 0.05 * expected.std()


@torch.no_grad()
def test_a_token_says_what_is_where_it_stands(started):
    images = smooth_images(8, seed=3)
    changed = images.clone()
    changed[:, :, :4, :4] = -changed[:, :, :4, :4]
    vectors, others = (F.normalize(started.encode_features(each), dim=-1) for each in (images, changed))
    moved = (vectors - others).norm(dim=2).mean(dim=0)
    own = pyramid(4, 20)[:, 0] > 0
    assert own.sum() == 2 and moved[own].min() > 2 * moved[~own].max()


def test_a_generator_over_rows_starts_with_reading_the_regions_that_its_tokens_stood_for():
    text = {"caption_dim": 8, "caption_length": 5, "plan_size": 2}
    transformer = LlamaGen(vocab_size=16, dim=16, num_layers=1, num_heads=2, grid_size=None, row_length=20, **text)
    read_initial_regions(transformer, side=4)
    shares = transformer.plan_embeddings.shares.softmax(dim=1)
    assert torch.allclose(shares[:4], torch.eye(4), atol=0.05)
    cells = pyramid(4, 20)[4:].argmax(dim=1)
    assert torch.equal(shares[4:].argmax(dim=1), 2 * (cells // 8) + cells % 4 // 2)
