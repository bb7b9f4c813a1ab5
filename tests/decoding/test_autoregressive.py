"""The fast loop samples what the textbook samples, and stops paying for the null rows when guidance ends."""

import pytest
import torch

from studio import LlamaGen, StudioError
from studio.decoding.autoregressive import Autoregressive, autoregressive, is_guided
from studio.decoding.sampling import Sampling
from studio.reference.autoregressive import textbook

SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.8, top_k=9, top_p=0.9),
    Sampling(order="lantern", top_p=0.8),
]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny(captions=False, **sizes):
    torch.manual_seed(0)
    condition = {"caption_dim": 16, "caption_length": 5, "plan_size": 2} if captions else {"num_classes": 10}
    model = LlamaGen(
        **{"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4, **condition, **sizes}
    )
    torch.nn.init.normal_(model.output.weight, std=0.3)
    if captions:
        torch.nn.init.normal_(model.plan_embeddings.weight, std=0.3)
    return model.eval()


def conditions(captions):
    if not captions:
        return {"class_labels": torch.tensor([1, 7, 3])}
    vectors = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    return {
        "captions": vectors,
        "caption_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool(),
    }


@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
@pytest.mark.parametrize("prefix_rope", ["zero", "identity"])
@pytest.mark.parametrize("weights", ["plain", "native", "float32"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "plain", "filtered", "lantern"])
def test_equals_the_textbook(captions, prefix_rope, weights, sampling):
    model, condition = tiny(captions, prefix_rope=prefix_rope), conditions(captions)
    for scale, interval in ((1.0, -1), (3.0, -1), (3.0, 4)):
        call = {"sampling": sampling, "guidance_scale": scale, "cfg_interval": interval}
        expected = textbook(model, condition, generators=streams(1, 2, 3), **call)
        settings = Autoregressive(weights=weights)
        sampled = autoregressive(model, condition, generators=streams(1, 2, 3), settings=settings, **call)
        assert torch.equal(sampled.tokens, expected)


def test_grouped_heads_run_unpacked():
    model = tiny(num_kv_heads=1)
    call = {"sampling": Sampling(), "guidance_scale": 2.0}
    expected = textbook(model, conditions(False), generators=streams(1, 2, 3), **call)
    assert torch.equal(autoregressive(model, conditions(False), generators=streams(1, 2, 3), **call).tokens, expected)
    with pytest.raises(StudioError, match="key/value heads"):
        autoregressive(
            model, conditions(False), generators=streams(1, 2, 3), settings=Autoregressive(weights="float32")
        )


@pytest.mark.parametrize("weights", ["plain", "auto"])
def test_null_rows_leave_after_the_interval(weights):
    model, settings = tiny(), Autoregressive(weights=weights)
    call = {"generators": streams(1, 2, 3), "guidance_scale": 3.0, "settings": settings}
    assert autoregressive(model, conditions(False), **call).row_calls == 6 * 16
    sampled = autoregressive(model, conditions(False), cfg_interval=4, **call)
    assert sampled.row_calls == 6 * 6 + 3 * 10
    assert sampled.target_calls == 16
    assert autoregressive(model, conditions(False), **{**call, "guidance_scale": 1.0}).row_calls == 3 * 16


def test_guided_tokens():
    assert [is_guided(index, 2.0, 1) for index in range(5)] == [True, True, True, False, False]
    assert [is_guided(index, 2.0, 0) for index in range(3)] == [True, True, False]
    assert all(is_guided(index, 2.0, -1) for index in range(5))
    assert not is_guided(0, 1.0, -1) and not is_guided(0, 0.0, -1)


@pytest.mark.parametrize("change", ["in place", "through data", "replaced"])
def test_packed_weights_follow_the_model(change):
    model = tiny()
    call = {"sampling": Sampling(temperature=0), "guidance_scale": 2.0}
    before = autoregressive(model, conditions(False), generators=streams(1, 2, 3), **call).tokens
    weight = model.layers[0].feed_forward.w2.weight
    new = torch.randn_like(weight)
    if change == "in place":
        with torch.no_grad():
            weight.copy_(new)
    elif change == "through data":
        weight.data.copy_(new)
    else:
        model.layers[0].feed_forward.w2.weight = torch.nn.Parameter(new)
    after = autoregressive(model, conditions(False), generators=streams(1, 2, 3), **call).tokens
    assert not torch.equal(before, after)
    assert torch.equal(after, textbook(model, conditions(False), generators=streams(1, 2, 3), **call))


def test_on_step_sees_and_stops():
    seen = []

    def stop_after_five(index, tokens):
        seen.append(tokens.clone())
        return index == 4

    sampled = autoregressive(tiny(), conditions(False), generators=streams(1, 2, 3), on_step=stop_after_five)
    assert sampled.target_calls == 5
    assert sampled.tokens.shape == (3, 5)
    assert torch.equal(seen[-1], sampled.tokens)


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_smaller_weights_draw_whole_images(weights):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        with pytest.raises(StudioError, match="float32"):
            autoregressive(
                tiny(), conditions(False), generators=streams(1, 2, 3), settings=Autoregressive(weights=weights)
            )
        return
    settings = Autoregressive(weights=weights)
    sampled = autoregressive(tiny(), conditions(False), generators=streams(1, 2, 3), settings=settings)
    assert sampled.tokens.shape == (3, 16)
    assert sampled.tokens.max() < 48


def test_settings_are_checked():
    with pytest.raises(StudioError, match="weights"):
        Autoregressive(weights="int2")
    with pytest.raises(StudioError, match="filter order"):
        Autoregressive(filter_order="other")
