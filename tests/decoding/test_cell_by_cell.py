"""Drawing stacks of codes with a tiny RQTransformer."""

import pytest
import torch

from studio import StudioError
from studio.decoding.cell_by_cell import cell_by_cell
from studio.decoding.sampling import Sampling
from studio.models.rq_transformer import RQTransformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RQTransformer(
        grid=(2, 2),
        depth=2,
        vocab_size=(6, 3),
        code_dim=4,
        dim=16,
        spatial_layers=1,
        depth_layers=1,
        spatial_heads=2,
        depth_heads=2,
        num_classes=3,
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


CODEBOOKS = [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (6, 3)]


def generators(count):
    return [torch.Generator().manual_seed(row) for row in range(count)]


def test_a_batch_equals_its_single_pictures(model):
    labels = torch.tensor([[0], [2], [1]])
    together = cell_by_cell(model, labels, CODEBOOKS, generators=generators(3))
    assert together.shape == (3, 2, 2, 2) and together[..., 1].max() < 3
    for row, generator in enumerate(generators(3)):
        alone = cell_by_cell(model, labels[row : row + 1], CODEBOOKS, generators=[generator])
        assert torch.equal(alone[0], together[row])


def test_the_likeliest_codes_are_those_of_the_whole(model):
    labels = torch.tensor([[1]])
    drawn = cell_by_cell(model, labels, CODEBOOKS, generators=generators(1), sampling=Sampling(temperature=0))
    with torch.no_grad():
        assert torch.equal(model(drawn, labels, CODEBOOKS)[0].argmax(dim=-1), drawn)
    by_level = [Sampling(temperature=0), Sampling(top_k=1)]
    assert torch.equal(cell_by_cell(model, labels, CODEBOOKS, generators=generators(1), sampling=by_level), drawn)


def test_stops_when_told(model):
    drawn = cell_by_cell(
        model, torch.tensor([[0]]), CODEBOOKS, generators=generators(1), on_cell=lambda index, codes: index == 1
    )
    assert (drawn[0, 0] >= 0).all() and (drawn[0, 1] == -1).all()


def test_refuses_another_number_of_samplings(model):
    with pytest.raises(StudioError, match="2 levels"):
        cell_by_cell(model, torch.tensor([[0]]), CODEBOOKS, generators=generators(1), sampling=[Sampling()])
