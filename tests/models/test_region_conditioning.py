"""Region conditioning reaches the cells of its region, in every model, and is zero before training."""

import pytest
import torch

from studio import MAR, StudioError, TokenBridge
from studio.models.masked_autoencoder import both_halves
from studio.models.region_conditioning import RegionConditioning, RowRegionConditioning, check_region_conditioning
from studio.models.resgen import ResGen

TEXT = {"num_classes": None, "caption_dim": 8, "caption_length": 5, "plan_size": 2}
MASKED = {"grid_size": 4, "token_dim": 4, "buffer_size": 5, **both_halves(16, 1, 2), "head_width": 16, "head_depth": 1}


def of_region(region):
    """Which of 4 x 4 cells belong to a region of 2 x 2, (16,) bool."""
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[region // 2 * 2 :, region % 2 * 2 :][:2, :2] = True
    return cells.flatten()


@torch.no_grad()
def test_every_region_has_its_cells():
    torch.manual_seed(0)
    layer, vectors = RegionConditioning(2, 4, 8, 6), torch.randn(3, 5, 8)
    cells = layer(vectors)
    assert cells.shape == (3, 16, 6)
    for region in range(4):
        other = vectors.clone()
        other[:, 1 + region] += 1
        assert torch.equal((layer(other) != cells).any(dim=2), of_region(region).expand(3, 16))
    assert torch.equal(layer(vectors[:, 1:]), cells)


def outputs_of_masked(model, captions):
    """Conditions of all positions, with blocks that return their input, so that positions do not see each other."""
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
    buffer, _ = model.embed_condition(captions=captions, caption_mask=torch.ones(captions.shape[:2]))
    none = torch.empty(len(captions), 0, dtype=torch.int64)
    return model.decode(model.encode(torch.zeros(len(captions), 16, 4), none, buffer), none)


def outputs_of_resgen(model, captions):
    """The same for ResGen; the mean of the condition, which all positions get, is switched off."""
    torch.nn.init.zeros_(model.modulation.weight)
    return model(torch.zeros(len(captions), 16, 4), torch.zeros(len(captions), 16, dtype=int), captions=captions).scores


MODELS = {
    "mar": (lambda: MAR(**MASKED, **TEXT), outputs_of_masked),
    "bridge": (lambda: TokenBridge(**MASKED, **TEXT, levels=3, head_heads=2), outputs_of_masked),
    "resgen": (
        lambda: ResGen(16, 2, 7, 4, 16, 1, 2, components=3, rank=2, **TEXT),
        lambda model, captions: outputs_of_resgen(model, captions).flatten(2),
    ),
}


@torch.no_grad()
def test_tokens_of_a_row_read_the_regions_of_their_shares():
    layer, vectors = RowRegionConditioning(2, 6, 8), torch.randn(3, 5, 8)
    of_regions = vectors[:, 1:] @ layer.weight.T
    torch.testing.assert_close(layer(vectors), of_regions.mean(dim=1, keepdim=True).expand(3, 6, 8))
    layer.shares[2, 1] = layer.shares[5, 3] = 40.0
    tokens = layer(vectors)
    torch.testing.assert_close(tokens[:, 2], of_regions[:, 1])
    torch.testing.assert_close(tokens[:, 5], of_regions[:, 3])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_models_condition_each_cell_on_its_region(name):
    torch.manual_seed(0)
    build, outputs_of = MODELS[name]
    model, captions = build().eval(), torch.randn(2, 5, 8)
    initial = outputs_of(model, captions)
    torch.testing.assert_close(outputs_of(model, captions + torch.randn(2, 5, 8)), initial)
    torch.nn.init.normal_(model.plan_embeddings.weight)
    trained = outputs_of(model, captions)
    assert ((trained - initial).abs().amax(dim=2) > 1e-3).all()
    for region in range(4):
        other = captions.clone()
        other[:, 1 + region] += torch.randn(8)
        changed = (outputs_of(model, other) - trained).abs().amax(dim=2) > 1e-4
        assert torch.equal(changed, of_region(region).expand(2, 16))


@pytest.mark.parametrize(
    ("size", "grid", "vectors"), [(3, 4, 9), (2, 4, 3), (2, 4, None), (2, None, 4)], ids=["grid", "few", "none", "row"]
)
def test_sizes_that_do_not_fit_are_refused(size, grid, vectors):
    with pytest.raises(StudioError, match=f"of {size} x {size} regions needs"):
        check_region_conditioning(size, grid, vectors)
    check_region_conditioning(0, grid, vectors)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MAR(**MASKED, num_classes=3, plan_size=2),
        lambda: MAR(**{**MASKED, "buffer_size": 3}, **TEXT),
        lambda: ResGen(15, 2, 7, 4, 16, 1, 2, **TEXT),
    ],
    ids=["classes", "buffer", "no square"],
)
def test_models_refuse_sizes_that_do_not_fit(build):
    with pytest.raises(StudioError, match="of 2 x 2 regions needs"):
        build()
