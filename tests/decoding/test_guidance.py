"""Rising guidance: the formula, every loop against the textbook, and pipelines' defaults."""

import pytest
import torch

from studio import (
    Autoregressive,
    Distilled,
    FastestExact,
    Jacobi,
    MaskedAutoregressive,
    ResGenDecoding,
    RQDecoding,
    Speculative,
    StudioError,
)
from studio.bench.guidance import mean_share, scale_of_mean
from studio.decoding.autoregressive import Guidance, autoregressive, scheduled_scale
from studio.decoding.fastest_exact import fastest_exact
from studio.decoding.jacobi import jacobi
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import speculative
from studio.reference.autoregressive import textbook
from tests.decoding.test_autoregressive import conditions, streams, tiny

CALL = {"guidance_scale": 4.0, "sampling": Sampling(temperature=0)}


def test_the_scale_rises_from_one_to_its_greatest():
    """One token alone has the constant scale; of 64 (the control) the first has not."""
    assert scheduled_scale("linear", 5.0, 1 / 1) == scheduled_scale("constant", 5.0, 1 / 1) == 5.0
    assert scheduled_scale("linear", 5.0, 1 / 64) == 1 + 4 / 64 != scheduled_scale("constant", 5.0, 1 / 64)


@pytest.mark.parametrize("interval", [-1, 4])
@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.8, top_k=9)], ids=["greedy", "random"])
def test_plain_and_jacobi_decoding_are_the_textbook(captions, sampling, interval):
    model, condition = tiny(captions), conditions(captions)
    call = {"guidance_scale": 4.0, "sampling": sampling, "cfg_interval": interval}
    expected = textbook(model, condition, generators=streams(1, 2, 3), rises=True, **call)
    settings = Autoregressive(guidance_schedule="linear")
    found = autoregressive(model, condition, generators=streams(1, 2, 3), settings=settings, **call)
    assert torch.equal(found.tokens, expected)
    for window in (2, 5):
        settings = Jacobi(window, guidance_schedule="linear")
        found = jacobi(model, condition, generators=streams(1, 2, 3), settings=settings, **call)
        assert torch.equal(found.tokens, expected), window
    constant = textbook(model, condition, generators=streams(1, 2, 3), **call)
    assert not torch.equal(constant, expected), "control: constant guidance gives other tokens"


def test_drafts_are_tested_with_the_scale_of_their_places(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    model, condition = tiny(), conditions(False)
    expected = textbook(model, condition, generators=streams(1, 2, 3), rises=True, **CALL)
    drafted = Speculative(guidance_schedule="linear"), Speculative(drafts=Jacobi(4), guidance_schedule="linear")
    for settings in drafted:
        found = speculative(model, condition, generators=streams(1, 2, 3), settings=settings, **CALL)
        assert torch.equal(found.tokens, expected)
    for _ in range(2):  # plain decoding, then Jacobi decoding
        settings = FastestExact(guidance_schedule="linear")
        found = fastest_exact(model, condition, generators=streams(1, 2, 3), settings=settings, **CALL)
        assert torch.equal(found.tokens, expected)
    with pytest.raises(StudioError, match="Give filter_order, weights, guidance_schedule to Speculative"):
        Speculative(drafts=Jacobi(4, guidance_schedule="linear"))


def test_the_first_tokens_do_not_depend_on_how_many_are_asked_for():
    model, condition, settings = tiny(), conditions(False), Autoregressive(guidance_schedule="linear")
    whole, part = (
        autoregressive(
            model, condition, generators=streams(1, 2, 3), settings=settings, num_tokens=number, **CALL
        ).tokens
        for number in (None, 5)
    )
    assert torch.equal(whole[:, :5], part)


def test_scales_past_the_end_are_the_last():
    guidance = Guidance.of(3.0, -1, "linear", tiny())
    scales = guidance.scale_at(torch.tensor([[0, 15, 20]])).flatten().tolist()
    assert scales == pytest.approx([1 + 2 / 16, 3, 3]) and scales[1] == float(guidance.scale_at(15))


SETTINGS = {
    "tiny_pipeline": Autoregressive,
    "tiny_mar_pipeline": MaskedAutoregressive,
    "tiny_resgen_pipeline": ResGenDecoding,
    "tiny_rq_pipeline": RQDecoding,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pipelines_default_is_taken_where_a_call_says_nothing(name, request):
    pipe, kind = request.getfixturevalue(name), SETTINGS[name]
    own = pipe.config.default_guidance_schedule
    assert own == ("linear" if name in ("tiny_mar_pipeline", "tiny_resgen_pipeline") else "constant")

    def tokens(**how):
        generator = torch.Generator().manual_seed(1)
        decoding = kind(**how) if how else None
        return pipe("a red apple", guidance_scale=6.0, generator=generator, decoding=decoding).tokens

    linear, constant = (tokens(guidance_schedule=schedule) for schedule in ("linear", "constant"))
    assert not torch.equal(linear, constant)
    assert torch.equal(tokens(), linear if own == "linear" else constant)
    pipe.register_to_config(default_guidance_schedule="constant" if own == "linear" else "linear")
    try:
        assert torch.equal(tokens(), constant if own == "linear" else linear)
    finally:
        pipe.register_to_config(default_guidance_schedule=own)
    with pytest.raises(StudioError, match="guidance scale is 1, which is no guidance"):
        pipe("a red apple", guidance_scale=1.0, decoding=kind(guidance_schedule="linear"))
    with pytest.raises(StudioError, match="constant, linear"):
        kind(guidance_schedule="cosine")


def test_a_student_has_no_schedule():
    with pytest.raises(StudioError, match="guidance_schedule is of the teacher's steps"):
        Distilled(guidance_schedule="linear")
    assert Distilled(teacher_steps=(1, 3), guidance_schedule="linear").guidance_schedule == "linear"


@pytest.mark.parametrize("name", SETTINGS)
def test_scales_of_one_mean(name, request, monkeypatch):
    """The scale that every token meets in a real call, averaged over tokens, is what was asked for."""
    pipe, kind = request.getfixturevalue(name), SETTINGS[name]
    decoding = kind(guidance_schedule="linear")
    assert scale_of_mean(pipe, kind(guidance_schedule="constant"), 3.0) == 3.0
    scale = scale_of_mean(pipe, decoding, 3.0)
    assert scale > 3 and 0 < mean_share(pipe, decoding) < 1
    if name == "tiny_mar_pipeline":
        settings = decoding.filled(steps=pipe.config.default_num_inference_steps)
        plan = settings.plan(pipe.transformer.num_tokens)
        met = [settings.scale_at(step, scale) for step in plan for _ in range(step.last - step.first)]
    elif name == "tiny_resgen_pipeline":
        settings = decoding.filled(steps=pipe.config.default_num_inference_steps)
        total = pipe.transformer.num_tokens * pipe.transformer.config.depth
        left, met = total, []
        for step, after in enumerate(settings.plan(total)):
            met += [scheduled_scale("linear", scale, step / (settings.steps - 1))] * (left - after)
            left = after
    else:
        total = pipe.transformer.num_tokens
        met = [scheduled_scale("linear", scale, (index + 1) / total) for index in range(total)]
    assert sum(met) / len(met) == pytest.approx(3.0)
