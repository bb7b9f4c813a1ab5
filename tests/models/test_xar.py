"""xAR: one masked pass equals cached passes, cells are causal, and the sampler has the moments of a known flow."""

import copy

import pytest
import torch

from studio import XAR, StudioError, XARDecoding, XARPipeline
from studio.checkpoints.loading import load
from studio.decoding.xar import flow_to_data, xar_decoding
from studio.models import xar

SIZES = {"grid_size": 4, "token_dim": 3, "cell_size": 2, "dim": 16, "depth": 4, "num_heads": 2, "dropout": 0.0}


def tiny(captions=False, **sizes):
    text = (
        {"num_classes": None, "caption_dim": 16, "caption_length": 8, "plan_size": 2}
        if captions
        else {"num_classes": 5}
    )
    torch.manual_seed(0)
    model = XAR(**{**SIZES, **text, **sizes}).eval()
    for weight in model.parameters():  # AdaLN starts at zero, where no block does anything
        torch.nn.init.normal_(weight, std=0.3)
    return model


def condition(captions, rows=2):
    if not captions:
        return {"class_labels": torch.arange(rows)}
    states = torch.randn(rows, 8, 16, generator=torch.Generator().manual_seed(1))
    return {"captions": states, "caption_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]).bool()[:rows]}


def tokens(rows=2, seed=0):
    return torch.randn(rows, 16, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
def test_cached_cells_are_one_masked_pass(captions):
    """Earlier cells clean, the last one at time .6; and the same for rows without a condition."""
    model, x = tiny(captions), tokens()
    drop = torch.tensor([False, True])
    embedded = model.embed_condition(**condition(captions), drop=drop)
    cache = model.prefill(embedded)
    for cell in range(4):
        times = torch.zeros(2, 4)
        times[:, cell] = 0.6
        inside = slice(4 * cell, 4 * cell + 4)
        expected = model.velocity(x, times, embedded)[:, inside]
        found = model.cell_velocity(x[:, inside], 0.6, cell, embedded, cache)
        assert torch.allclose(found, expected, atol=1e-5), cell
        assert not torch.allclose(model.velocity(x, torch.zeros(2, 4), embedded)[:, inside], expected, atol=1e-3)
        model.keep_cell(x[:, inside], cell, embedded, cache)


@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
def test_later_cells_never_move_earlier_ones(captions):
    """Control: an earlier cell moves all later ones."""
    model, x, times = tiny(captions), tokens(), torch.full((2, 4), 0.5)
    embedded = model.embed_condition(**condition(captions))
    plain = model.velocity(x, times, embedded)
    changed = x.clone()
    changed[:, 8:12] += 1
    moved = (model.velocity(changed, times, embedded) - plain).abs().amax(dim=2).view(2, 4, 4).amax(dim=2)
    assert (moved[:, :2] == 0).all() and (moved[:, 2:] > 1e-4).all()


def test_padding_is_not_read():
    model, x, times = tiny(True), tokens(), torch.full((2, 4), 0.5)
    given = condition(True)
    other = copy.deepcopy(given)
    other["captions"][1, 5:] += 1
    found = [model.velocity(x, times, model.embed_condition(**each)) for each in (given, other)]
    assert torch.equal(*found)
    other["captions"][1, 4] += 1
    assert not torch.allclose(model.velocity(x, times, model.embed_condition(**other))[1], found[0][1], atol=1e-4)


def test_cells_hold_neighbours():
    model = tiny()
    latents = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4) / model.config.latent_scale
    found = model.patchify(latents)
    assert found[0, :, 0].tolist() == pytest.approx([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])
    assert torch.allclose(model.unpatchify(found), latents)


def test_one_cell_is_a_plain_flow():
    """With one cell there is no earlier one: the loss is that of rectified flow, and guidance is at its scale."""
    model, x = tiny(cell_size=4), tokens()
    torch.manual_seed(3)
    loss = model(x, class_labels=torch.tensor([0, 1]))
    torch.manual_seed(3)
    t = torch.randn(2, 1).sigmoid()[:, :, None]
    noise = torch.randn_like(x)
    embedded = model.embed_condition(class_labels=torch.tensor([0, 1]))
    found = model.velocity((1 - t) * x + t * noise, t[:, :, 0], embedded)
    assert torch.allclose(loss, (found - (noise - x)).square().mean(), atol=1e-6)
    assert XARDecoding().filled().scale_at(0, 1, 3.0) == 3.0
    rising = [XARDecoding().filled().scale_at(cell, 4, 4.0) for cell in range(4)]
    assert rising == [1, 2, 3, 4]


@pytest.mark.parametrize("variance, expected", [(2.0, 0.49), (1.0, 0.36)], ids=["sampler", "control"])
def test_the_sampler_has_the_moments_of_a_gaussian(variance, expected):
    """Data N(0, .5^2), its exact velocity, 50 steps, 200,000 numbers (seed 0): the standard deviation within .01.
    Control: t in place of 2t as the variance of the noise."""
    rng = torch.Generator().manual_seed(0)

    def velocity(x, t):
        return (t - 0.25 * (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2) * x

    def noise(_):
        return (variance / 2) ** 0.5 * torch.randn(200_000, generator=rng)

    found = flow_to_data(velocity, torch.randn(200_000, generator=rng), XARDecoding(steps=50).times(), noise)
    assert float(found.std()) == pytest.approx(expected, abs=0.01) and abs(float(found.mean())) < 0.01


def test_without_noisy_context_one_cell_learns():
    model, x = tiny(), tokens()
    with torch.no_grad():
        losses = [float(model(x, class_labels=torch.tensor([0, 1]), noisy_context=kind)) for kind in (True, False)]
    assert all(loss > 0 for loss in losses) and losses[0] != losses[1]


def test_a_batch_equals_its_single_calls():
    """Up to rounding, which large weights amplify from cell to cell. Control: another seed gives other tokens."""
    model, settings = tiny(), XARDecoding(steps=3)
    for weight in model.parameters():
        weight.data *= 0.3
    call = {"guidance_scale": 2.0, "settings": settings}
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = xar_decoding(model, {"class_labels": torch.tensor([0, 1])}, generators=seeds, **call)
    for row in range(2):
        alone = xar_decoding(
            model, {"class_labels": torch.tensor([row])}, generators=[torch.Generator().manual_seed(row + 1)], **call
        )
        assert torch.allclose(alone.tokens[0], both.tokens[row], atol=1e-4)
        assert not torch.allclose(alone.tokens[0], both.tokens[1 - row], atol=0.1)
    assert both.target_calls == 4 * 3 and both.row_calls == 2 * 2 * 12


@pytest.mark.parametrize("wrong", [{"cell_size": 3}, {"depth": 3}, {"num_heads": 8}, {"num_classes": None}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(StudioError):
        XAR(**{**SIZES, "num_classes": 5, **wrong})


@pytest.fixture(scope="module")
def pipe(tiny_mar_pipeline):
    torch.manual_seed(0)
    kl = tiny_mar_pipeline.image_tokenizer
    model = XAR(
        grid_size=4, token_dim=kl.latent_channels, cell_size=2, dim=16, depth=2, num_heads=2, num_classes=None,
        caption_dim=16, caption_length=8,
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    parts = (kl, model.eval(), tiny_mar_pipeline.text_encoder, tiny_mar_pipeline.tokenizer)
    pipe = XARPipeline(*parts, default_num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(pipe, **call):
    return pipe("a red apple", generator=torch.Generator().manual_seed(0), **call)


def test_words_seeds_and_settings_decide(pipe):
    plain = seeded(pipe, guidance_scale=2.0)
    assert plain.images[0].size == (16, 16) and plain.tokens.shape == (1, 16, pipe.transformer.config.token_dim)
    assert (plain.stats.target_calls, plain.stats.tokens) == (12, 16)
    assert torch.equal(seeded(pipe, guidance_scale=2.0).tokens, plain.tokens)
    for change in ({"guidance_scale": 5.0}, {"temperature": 0.0}, {"decoding": XARDecoding(steps=2)}):
        assert not torch.equal(seeded(pipe, **{"guidance_scale": 2.0, **change}).tokens, plain.tokens)


def test_a_callback_sees_every_cell_and_stops(pipe):
    seen = []

    def stop(pipe, cell, _, tensors):
        seen.append((cell, int((tensors["tokens"] != 0).any(dim=2).sum())))
        pipe._interrupt = cell == 1
        return {}

    half = seeded(pipe, guidance_scale=2.0, callback_on_step_end=stop)
    assert seen == [(0, 4), (1, 8)] and half.stats.tokens == 8


def test_a_saved_pipeline_samples_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "xar")
    loaded = load(tmp_path / "xar", device="cpu")
    assert isinstance(loaded, XARPipeline)
    assert torch.equal(seeded(loaded, guidance_scale=2.0).tokens, seeded(pipe, guidance_scale=2.0).tokens)


def test_other_decodings_are_refused(pipe):
    from studio import MaskedAutoregressive

    with pytest.raises(StudioError, match="XARDecoding"):
        seeded(pipe, decoding=MaskedAutoregressive())


def test_the_rotary_table_is_made_once_and_serves_training_behind_inference(monkeypatch):
    made, build = [], xar.rope_table
    monkeypatch.setattr(xar, "rope_table", lambda *given: (made.append(given), build(*given))[1])
    model = tiny()
    with torch.inference_mode():
        xar_decoding(model, condition(False), generators=[torch.Generator().manual_seed(i) for i in range(2)])
    model.train()(tokens(), **condition(False)).backward()
    assert len(made) == 1 and model.blocks[0].qkv.weight.grad.any()
