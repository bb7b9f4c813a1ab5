"""The MAR pipeline, text- and class-conditional, with and without a drafter, at tiny size."""

import numpy
import pytest
import torch

import studio
from studio import Autoregressive, ContinuousSpeculative, MARPipeline, MaskedAutoregressive, Speculative, StudioError
from studio.tokenizers.kl import KLTokenizer

STEPS = {"steps": 4, "diffusion_steps": 5}
RELAXED = ContinuousSpeculative(mode="relaxed", draft_steps=2, prefill=0.0)
DECODINGS = [None, ContinuousSpeculative(prefill=0.2), RELAXED]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipe(tiny_mar_pipeline):
    return tiny_mar_pipeline


@pytest.fixture
def class_pipe(tiny_mar_class_pipeline):
    return tiny_mar_class_pipeline


def test_images_tokens_and_stats(pipe):
    out = pipe("a red apple", num_images_per_prompt=2, generator=streams(0, 1))
    assert [image.size for image in out.images] == [(16, 16)] * 2
    assert out.tokens.shape == (2, 16, 3) and out.tokens.dtype == torch.float32
    assert (out.stats.target_calls, out.stats.tokens, out.stats.mean_accepted_length) == (4, 32, 4.0)
    assert out.stats.acceptance is None and set(out.stats.seconds) >= {"text", "prefill", "decode", "pixels", "total"}
    drafted = pipe("a red apple", generator=streams(0), decoding=DECODINGS[1])
    assert 0 <= drafted.stats.acceptance <= 1 and drafted.stats.target_calls == 4


def test_words_and_seeds_decide(pipe):
    def sample(prompt, seed):
        return pipe(prompt, generator=streams(seed), output_type="tokens").tokens

    assert torch.equal(sample("a red apple", 0), sample("a red apple", 0))
    assert not torch.allclose(sample("a red apple", 0), sample("blue sky", 0), atol=1e-3)
    assert not torch.allclose(sample("a red apple", 0), sample("a red apple", 1), atol=1e-3)


def test_output_types(pipe):
    calls = {
        kind: pipe("a red apple", generator=streams(0), output_type=kind) for kind in ("pil", "np", "pt", "tokens")
    }
    assert calls["np"].images.shape == (1, 16, 16, 3) and calls["pt"].images.shape == (1, 3, 16, 16)
    assert torch.equal(calls["tokens"].images, calls["pil"].tokens)
    difference = numpy.asarray(calls["pil"].images[0]) / 255 - calls["np"].images[0]
    assert abs(difference).max() < 2 / 255
    images, tokens, stats = pipe("a red apple", generator=streams(0), return_dict=False)
    assert torch.equal(tokens, calls["pil"].tokens) and stats.tokens == 16 and len(images) == 1


@pytest.mark.parametrize("decoding", DECODINGS, ids=["mar", "exact", "relaxed"])
def test_a_batch_equals_its_single_calls(pipe, decoding):
    prompts = ["a red apple", "blue sky"]
    settings = {"guidance_scale": 3.0, "decoding": decoding, "output_type": "tokens"}
    together = pipe(prompts, num_images_per_prompt=2, generator=streams(1, 2, 3, 4), **settings).tokens
    alone = [pipe(prompts[row // 2], generator=streams(row + 1), **settings).tokens[0] for row in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_save_and_load(kind, pipe, class_pipe, tmp_path):
    original, call = (pipe, {"prompt": "a red apple"}) if kind == "text" else (class_pipe, {"class_labels": 3})
    original.save_pretrained(tmp_path)
    expected = original(**call, generator=streams(2)).tokens
    for loaded in (MARPipeline.from_pretrained(tmp_path), studio.load(tmp_path, device="cpu")):
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, MARPipeline) and (loaded.drafter is None) == (kind == "class")
        assert torch.equal(loaded(**call, generator=streams(2)).tokens, expected)
        assert dict(loaded.config)["default_num_inference_steps"] == original.config.default_num_inference_steps
    assert studio.load(tmp_path, device="cpu").vocabulary is None


def test_steps_come_from_the_call_the_decoding_or_the_pipeline(pipe):
    def calls(**given):
        return pipe("a red apple", generator=streams(0), output_type="tokens", **given).stats.target_calls

    assert calls() == 4 and calls(num_inference_steps=7) == 7
    assert calls(decoding=MaskedAutoregressive(steps=3)) == 3
    with pytest.raises(StudioError, match="given twice"):
        calls(decoding=MaskedAutoregressive(steps=3), num_inference_steps=7)
    with pytest.raises(StudioError, match="16 tokens"):
        calls(num_inference_steps=17)


@pytest.mark.parametrize("decoding", DECODINGS, ids=["mar", "exact", "relaxed"])
def test_callback_sees_changes_and_interrupts(pipe, decoding):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        sampled = kwargs["tokens"].gather(1, kwargs["positions"][..., None].expand(-1, -1, 3))
        assert sampled.abs().sum(dim=-1).gt(0).all() and step == len(seen)
        seen.append(kwargs["positions"].shape[1])
        pipeline._interrupt = sum(seen) >= 6
        return {"tokens": torch.full_like(kwargs["tokens"], 0.5)}

    out = pipe(
        "a red apple", generator=streams(0), decoding=decoding, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=("tokens", "positions"),
    )  # fmt: skip
    assert out.tokens.eq(0.5).all() and out.stats.tokens == sum(seen) and pipe.interrupt
    assert out.images[0].size == (16, 16)
    assert pipe("a red apple").stats.tokens == 16


def test_a_drafter_that_is_the_target_is_always_accepted(pipe):
    same = MARPipeline(**{**pipe.components, "drafter": pipe.transformer}, **_defaults(pipe))
    same.set_progress_bar_config(disable=True)
    sampled = same("a red apple", generator=streams(5), decoding=ContinuousSpeculative(prefill=0.0))
    assert sampled.stats.acceptance == 1.0
    torch.testing.assert_close(sampled.tokens, pipe("a red apple", generator=streams(5)).tokens, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"class_labels": 1}, "class_labels"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0, "decoding": ContinuousSpeculative()}, "temperature of 0"),
        ({"num_inference_steps": 0}, "steps"),
        ({"num_inference_steps": 1.5}, "steps"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"decoding": "fast"}, "ContinuousSpeculative"),
        ({"decoding": Autoregressive()}, "not Autoregressive"),
        ({"decoding": Speculative()}, "not Speculative"),
        ({"callback_on_step_end_tensor_inputs": ("latents",)}, "latents"),
    ],
    ids=str,
)
def test_errors(pipe, wrong, message):
    with pytest.raises(StudioError, match=message):
        pipe(**{"prompt": "a red apple", **wrong})


def test_what_does_not_fit_is_refused_by_name(pipe, class_pipe, tiny_pipeline):
    with pytest.raises(StudioError, match="cspd.*needs a drafter"):
        class_pipe(class_labels=1, decoding=ContinuousSpeculative())
    with pytest.raises(StudioError, match="is class-conditional"):
        class_pipe("a red apple", class_labels=1)
    with pytest.raises(StudioError, match="not MaskedAutoregressive"):
        tiny_pipeline("a red apple", decoding=MaskedAutoregressive())
    mixed = MARPipeline(**{**class_pipe.components, "drafter": pipe.drafter}, **_defaults(class_pipe))
    with pytest.raises(StudioError, match="num_classes is None and 5"):
        mixed(class_labels=1, decoding=ContinuousSpeculative())


def test_relaxed_settings_that_nobody_validated_warn(pipe, caplog):
    caplog.set_level("WARNING", logger="studio.pipelines.mar")
    pipe("a red apple", generator=streams(0), decoding=ContinuousSpeculative(mode="exact"))
    assert "validated" not in caplog.text
    pipe("a red apple", generator=streams(0), decoding=RELAXED)
    assert "4 steps for 16 tokens" in caplog.text


def test_validation_warnings_name_what_is_outside():
    assert ContinuousSpeculative(mode="relaxed", steps=16).validation_warning(16) is None
    assert ContinuousSpeculative(mode="exact", steps=4).validation_warning(16) is None
    assert "drafts of 8 steps" in ContinuousSpeculative(mode="relaxed", steps=16, draft_steps=8).validation_warning(16)


@torch.no_grad()
def test_captions_stand_at_the_end_of_the_buffer(pipe):
    """The buffer holds the last states of a caption wherever its padding is, and the null vector where it has none."""
    model = pipe.transformer
    size, null = model.config.buffer_size, model.fake_latent[0]
    captions = torch.randn(3, 6, 16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [0, 0, 0, 0, 1, 1]]).bool()
    buffer, valid = model.embed_condition(captions=captions, caption_mask=mask)
    assert valid is None and buffer.shape == (3, size, model.config.encoder_dim)
    torch.testing.assert_close(buffer[0, -2:], model.caption_proj(captions[0, :2]))
    torch.testing.assert_close(buffer[1], model.caption_proj(captions[1, -size:]))
    torch.testing.assert_close(buffer[2, -2:], model.caption_proj(captions[2, 4:]))
    assert torch.equal(buffer[0, :-2], null.expand(size - 2, -1))
    dropped, _ = model.embed_condition(captions=captions, caption_mask=mask, drop=torch.tensor([True, False, True]))
    assert torch.equal(dropped[0], null.expand(size, -1)) and torch.equal(dropped[1], buffer[1])


def _defaults(pipe):
    return {name: value for name, value in pipe.config.items() if name.startswith("default_")}


def test_an_image_tokenizer_of_other_latents_is_refused(tiny_mar_pipeline, monkeypatch):
    monkeypatch.setattr(KLTokenizer, "latent_channels", 5)
    with pytest.raises(StudioError, match="do not fit together: the image tokenizer has latents of length 5"):
        tiny_mar_pipeline("a red apple")
