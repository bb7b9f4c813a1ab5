"""Sampling stacks of codes with a tiny RQTransformer."""

import pytest
import torch

from studio import StudioError
from studio.decoding.rq_transformer import RQDecoding, rq_decoding
from studio.decoding.sampling import Sampling
from studio.models.rq_transformer import RQTransformer


def tiny(**condition):
    torch.manual_seed(0)
    sizes = {"dim": 16, "spatial_layers": 1, "depth_layers": 1, "spatial_heads": 2, "depth_heads": 2}
    model = RQTransformer(grid=(2, 2), depth=2, vocab_size=(6, 3), code_dim=4, **sizes, **condition)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny(num_classes=3)


@pytest.fixture(scope="module")
def captioned():
    return tiny(caption_dim=5, caption_length=4)


CODEBOOKS = [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (6, 3)]


def generators(count):
    return [torch.Generator().manual_seed(row) for row in range(count)]


def test_a_batch_equals_its_single_images(model):
    labels = torch.tensor([[0], [2], [1]])
    together = rq_decoding(model, labels, CODEBOOKS, generators=generators(3))
    assert together.shape == (3, 2, 2, 2) and together[..., 1].max() < 3
    for row, generator in enumerate(generators(3)):
        alone = rq_decoding(model, labels[row : row + 1], CODEBOOKS, generators=[generator])
        assert torch.equal(alone[0], together[row])


def test_the_likeliest_codes_are_those_of_the_whole(model):
    labels = torch.tensor([[1]])
    sampled = rq_decoding(model, labels, CODEBOOKS, generators=generators(1), sampling=Sampling(temperature=0))
    with torch.no_grad():
        assert torch.equal(model(sampled, labels, CODEBOOKS)[0].argmax(dim=-1), sampled)
    by_level = [Sampling(temperature=0), Sampling(top_k=1)]
    assert torch.equal(rq_decoding(model, labels, CODEBOOKS, generators=generators(1), sampling=by_level), sampled)


def test_stops_when_told(model):
    sampled = rq_decoding(
        model, torch.tensor([[0]]), CODEBOOKS, generators=generators(1), on_step=lambda index, codes: index == 1
    )
    assert (sampled[0, 0] >= 0).all() and (sampled[0, 1] == -1).all()


@torch.no_grad()
def test_guidance_is_that_of_the_whole_logits(captioned):
    """Greedy codes of three images: each the likeliest by null + 3 (conditional - null), both without a cache."""
    captions, valid = torch.randn(3, 4, 5), torch.arange(4) >= torch.tensor([[0], [1], [3]])
    call = {"valid": valid, "generators": generators(3), "sampling": Sampling(temperature=0)}
    sampled = rq_decoding(captioned, captions, CODEBOOKS, guidance_scale=3.0, **call)
    rows = torch.ones(3, dtype=torch.bool)
    said, null = (captioned(sampled, captions, CODEBOOKS, valid=valid, drop=drop)[0] for drop in (~rows, rows))
    for level, size in enumerate((6, 3)):
        logits = null[..., level, :size] + 3 * (said - null)[..., level, :size]
        assert torch.equal(logits.argmax(dim=-1), sampled[..., level])
    assert not torch.equal(rq_decoding(captioned, captions, CODEBOOKS, **call), sampled)


def test_a_guided_batch_equals_its_single_images(captioned):
    captions, valid = torch.randn(2, 4, 5), torch.arange(4) >= torch.tensor([[0], [2]])
    together = rq_decoding(captioned, captions, CODEBOOKS, valid=valid, generators=generators(2), guidance_scale=2.0)
    for row, generator in enumerate(generators(2)):
        of_row = {"valid": valid[row : row + 1], "generators": [generator]}
        alone = rq_decoding(captioned, captions[row : row + 1], CODEBOOKS, guidance_scale=2.0, **of_row)
        assert torch.equal(alone[0], together[row])


def test_refuses_what_it_cannot_draw_with(model):
    call = {"generators": generators(1)}
    with pytest.raises(StudioError, match="2 levels"):
        rq_decoding(model, torch.tensor([[0]]), CODEBOOKS, sampling=[Sampling()], **call)
    with pytest.raises(StudioError, match="no null condition"):
        rq_decoding(model, torch.tensor([[0]]), CODEBOOKS, guidance_scale=2.0, **call)
    with pytest.raises(StudioError, match="one Sampling for each level"):
        RQDecoding((1.0, 0.5))
