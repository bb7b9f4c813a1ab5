"""Decodings by name: what the command line and the app offer."""

import pytest

from studio import DECODINGS, StudioError, decoding_named, decoding_options, decodings_with, default_decoding
from studio.decoding.jacobi import Jacobi


@pytest.mark.parametrize("name", DECODINGS)
def test_every_decoding_can_be_made_and_says_what_it_is(name):
    choice = decoding_named(name)
    assert choice.settings() == choice.settings(**{option.name: option.default for option in choice.options})
    assert choice.title and all(text.endswith(".") for text in (choice.summary, *(o.summary for o in choice.options)))


@pytest.mark.parametrize("name", DECODINGS)
def test_options_are_fields_of_the_settings_and_have_their_defaults(name):
    choice = decoding_named(name)
    settings = choice.settings()
    own = type(settings)()
    for option in choice.options:
        expected = getattr(own, option.name)
        if (name, option.name) == ("jacobi", "coupling"):
            assert expected is None, "seed by itself, maximal as drafts"
            continue
        assert getattr(settings, option.name) == expected, option.name
        assert not option.choices or option.default in (None, *option.choices)
        assert option.name != "drafts" or expected == Jacobi(), "what needs no drafter"
        if option.least is not None and (name, option.name) != ("distilled", "teacher_steps"):
            with pytest.raises(StudioError):
                choice.settings(**{option.name: option.least - 1})


def test_numbers_that_are_shown_as_usual_are_those_that_the_settings_take():
    usual = {option.name: option.usual for name in ("mar", "cspd") for option in decoding_named(name).options}
    mar = decoding_named("mar").settings(steps=4, diffusion_steps=50, annealing="linear", cache="lazy")
    cspd = decoding_named("cspd").settings(mode="relaxed")
    assert {name: number for name, number in usual.items() if number is not None} == {
        "last_diffusion_steps": mar.denoising_plan()[-1],
        "refresh_every": mar.refresh_every,
        "warm_steps": mar.warm_steps,
        "draft_steps": cspd.draft_steps,
        "inner_temperature": cspd.inner_temperature,
    }


def test_the_default_that_is_shown():
    options = {option.name: option for option in decoding_named("mar").options}
    shown = [options[name].shown_default for name in ("steps", "cache", "refresh_every")]
    assert shown == ["its own", "none", "9"]


def test_benchmark_rows_can_be_made():
    rows = [(name, row) for name, choice in DECODINGS.items() for row in choice.benchmarked(64)]
    made = [decoding_named(name).settings(**row) for name, row in rows]
    assert len(made) > 20 and {name for name, _ in rows} == set(DECODINGS) - {"exact"}
    with pytest.raises(StudioError):
        decoding_named("lantern").settings(**{"delta": 2.0, "k": 1000})


def test_an_option_of_several_decodings_is_of_one_kind():
    """A flag of the command line and a field of a prompt file are made from any of them."""
    for name, owners in decoding_options().items():
        assert len({(option.kind, option.least) for option in owners.values()}) == 1, name
        assert list(owners) == decodings_with(name)


def test_options_arrive():
    assert decoding_named("lantern").settings(delta=0.3, k=7).k == 7


def test_unknown_names_and_options_are_refused():
    with pytest.raises(StudioError, match="speculative"):
        decoding_named("fast")
    with pytest.raises(StudioError, match=r"takes drafts, guidance_schedule, not delta; delta belongs to lantern\."):
        decoding_named("speculative").settings(delta=0.1)
    with pytest.raises(StudioError, match="delta, k"):
        decoding_named("lantern").settings(colour=1)


def test_a_pipeline_says_which_decoding_it_took_where_that_was_open(tiny_pipeline, tmp_path, monkeypatch):
    import torch

    from studio import FastestExact, Jacobi

    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    found = {}
    for name, decoding in (("plain", None), ("jacobi", Jacobi(4)), ("first", FastestExact()), ("next", FastestExact())):
        generator = torch.Generator().manual_seed(3)
        found[name] = tiny_pipeline("a red apple", generator=generator, decoding=decoding, guidance_scale=2.5)
        assert torch.equal(found[name].tokens, found["plain"].tokens)
    told = {name: (output.stats.decoding, output.stats.window) for name, output in found.items()}
    window = told["next"][1]
    assert told == {"plain": (None, None), "jacobi": (None, 4), "first": ("ar", None), "next": ("jacobi", window)}
    assert found["plain"].stats.target_calls == 16 and window >= 2


def test_the_usual_decoding_of_a_pipeline():
    assert default_decoding("LlamaGenPipeline") == "exact" and default_decoding("MARPipeline") == "mar"
