"""ResGen's pipeline with tiny real parts: calls, saving, callbacks, what is refused."""

import pytest
import torch

import studio
from studio import Autoregressive, FirstHitting, ResGen, ResGenDecoding, ResGenPipeline, StudioError


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("decoding", [None, ResGenDecoding(steps=6, confidence="level"), FirstHitting(steps=5)])
def test_a_batch_is_its_single_images(tiny_resgen_class_pipeline, decoding):
    pipe = tiny_resgen_class_pipeline
    call = {"guidance_scale": 2.0, "decoding": decoding, "top_p": 0.9}
    out = pipe(class_labels=[0, 2], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **call)
    assert [image.size for image in out.images] == [(16, 16)] * 4
    assert out.tokens.shape == (4, 16, 3) and out.tokens.min() >= 0 and out.tokens.max() < 16
    steps = decoding.steps if decoding else 4
    assert out.stats.target_calls == steps and out.stats.tokens == 4 * 48
    assert out.stats.mean_accepted_length == 48 / steps
    for row, label in enumerate((0, 0, 2, 2)):
        single = pipe(class_labels=label, generator=seeded(row), output_type="tokens", **call)
        assert torch.equal(single.images[0], out.tokens[row])


def test_settings_that_are_left_out(tiny_resgen_class_pipeline):
    scale, sampling, settings = tiny_resgen_class_pipeline.check_call(class_labels=2, guidance_scale=0)
    assert (scale, sampling.temperature, sampling.top_p, settings.steps) == (1.0, 1.0, 1.0, 4)
    assert tiny_resgen_class_pipeline.check_call(class_labels=2)[0] == 3.0


@pytest.mark.parametrize("option", [{"temperature": 0.2}, {"top_k": 1}, {"top_p": 0.1}, {"guidance_scale": 9.0}])
def test_every_setting_counts(tiny_resgen_class_pipeline, option):
    plain, other = (
        tiny_resgen_class_pipeline(class_labels=1, generator=seeded(0), output_type="tokens", **options).tokens
        for options in ({}, option)
    )
    assert not torch.equal(plain, other)


def test_forms_of_the_output(tiny_resgen_class_pipeline):
    pipe = tiny_resgen_class_pipeline
    call = {"class_labels": [1, 3], "decoding": FirstHitting(steps=2)}
    array, tensor = (pipe(generator=seeded(0, 1), output_type=kind, **call).images for kind in ("np", "pt"))
    assert array.shape == (2, 16, 16, 3) and tensor.shape == (2, 3, 16, 16)
    assert 0 <= array.min() and array.max() <= 1
    images, tokens, stats = pipe(generator=seeded(0, 1), return_dict=False, **call)
    assert len(images) == 2 and tokens.shape == (2, 16, 3) and stats.target_calls == 2
    first = pipe.decode_tokens(tokens, "pt", depth=1)
    assert first.shape == tensor.shape and not torch.equal(first, tensor)
    torch.testing.assert_close(first, pipe.decode_tokens(torch.where(torch.arange(3) < 1, tokens, -1), "pt"))


@pytest.mark.parametrize("fixture", ["tiny_resgen_class_pipeline", "tiny_resgen_pipeline"])
def test_saved_and_loaded(fixture, request, tmp_path):
    pipe = request.getfixturevalue(fixture)
    pipe.save_pretrained(tmp_path / "model")
    loaded = studio.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, ResGenPipeline) and loaded.config.default_num_inference_steps == 4
    what = {"prompt": "a red apple"} if pipe.takes_text else {"class_labels": 1}
    sampled = [each(**what, generator=seeded(5), output_type="tokens").tokens for each in (pipe, loaded)]
    assert torch.equal(*sampled)


def test_a_callback_sees_steps_changes_codes_and_stops(tiny_resgen_class_pipeline):
    pipe, seen = tiny_resgen_class_pipeline, []

    def stop(pipe, index, number, given):
        seen.append(int((given["tokens"] >= 0).sum()))
        pipe._interrupt = index == 1
        return {"tokens": torch.where(given["tokens"] >= 0, 7, -1)}

    out = pipe(class_labels=0, callback_on_step_end=stop)
    assert len(seen) == 2 and 0 < seen[0] < seen[1] < 48
    assert out.stats.tokens == seen[1] == int((out.tokens == 7).sum()) and int((out.tokens < 0).sum()) == 48 - seen[1]
    assert out.images[0].size == (16, 16)


def test_words_become_images(tiny_resgen_pipeline):
    pipe = tiny_resgen_pipeline
    sampled = pipe("a red apple", num_images_per_prompt=2, generator=seeded(0, 1))
    assert sampled.tokens.shape == (2, 16, 3) and sampled.images[1].size == (16, 16)
    other = pipe("blue sky", generator=seeded(0), output_type="tokens")
    assert not torch.equal(other.tokens[0], sampled.tokens[0])
    with pytest.raises(StudioError, match="no class_labels"):
        pipe("a red apple", class_labels=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_labels": 5}, "0 to 4"),
        ({"prompt": "a pear"}, "is class-conditional"),
        ({"class_labels": 0, "decoding": Autoregressive()}, "FirstHitting"),
        ({"class_labels": 0, "decoding": ResGenDecoding(steps=49)}, "48 codes"),
        ({"class_labels": 0, "temperature": -1.0}, "temperature"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
    ],
    ids=str,
)
def test_refused(tiny_resgen_class_pipeline, options, words):
    for call in (tiny_resgen_class_pipeline, tiny_resgen_class_pipeline.check_call):
        with pytest.raises(StudioError, match=words):
            call(**options)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"depth": 2}, "levels 3, the transformer 2"),
        ({"code_dim": 5}, "length 4, the transformer 5"),
        ({"num_positions": 9}, "cells 16, the transformer 9"),
        ({"prediction": "levels", "vocab_size": 9}, "codes a level 16, the transformer 9"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(tiny_rvq, tmp_path, other, words):
    sizes = {"num_positions": 16, "depth": 3, "vocab_size": 16, "code_dim": 4, "num_classes": 2}
    model = ResGen(**{**sizes, "dim": 8, "num_layers": 1, "num_heads": 1, "components": 2, "rank": 1, **other})
    pipe = ResGenPipeline(tiny_rvq, model)
    with pytest.raises(StudioError, match=words):
        pipe(class_labels=0)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(StudioError, match=f"does not fit together: .*{words}"):
        studio.load(tmp_path, device="cpu")
