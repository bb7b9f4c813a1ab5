"""Distilled through the pipeline: few calls, images from latents, batches, callbacks, saving, refusals."""

import pytest
import torch

import studio
from studio import Distilled, DistilledStudent, LlamaGenPipeline, StudioError


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def student(tiny_pipeline):
    torch.manual_seed(1)
    return DistilledStudent.from_teacher(tiny_pipeline.transformer, tiny_pipeline.image_tokenizer.codebook, split=9)


@pytest.fixture
def pipe(tiny_pipeline, student):
    pipe = LlamaGenPipeline(**{**tiny_pipeline.components, "student": student.eval()}, default_guidance_scale=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("settings", "calls"), [({}, 1), ({"steps": 3}, 3), ({"teacher_steps": (1, 5)}, 5), ({"teacher_steps": (4, 9)}, 7)]
)
def test_images_come_in_few_calls(pipe, settings, calls):
    out = pipe(["a red apple", "blue sky"], generator=streams(0, 1), decoding=Distilled(**settings))
    assert [image.size for image in out.images] == [(16, 16)] * 2 and out.tokens.shape == (2, 16)
    assert (out.stats.target_calls, out.stats.tokens) == (calls, 32)
    assert set(out.stats.seconds) == {"text", "prefill", "decode", "pixels", "total"}
    alone = pipe("blue sky", generator=streams(1), decoding=Distilled(**settings))
    assert torch.equal(alone.tokens[0], out.tokens[1])


def test_images_are_decoded_from_the_latents(pipe):
    call = {"prompt": "a red apple", "output_type": "pt"}
    as_published = pipe(**call, generator=streams(0), decoding=Distilled())
    snapped = pipe(**call, generator=streams(0), decoding=Distilled(snap="nearest"))
    of_tokens = pipe.decode_tokens(snapped.tokens, "pt")
    assert torch.equal(as_published.tokens, snapped.tokens)
    torch.testing.assert_close(snapped.images, of_tokens)
    assert (as_published.images - of_tokens).abs().max() > 0.01, "regressed vectors are no codes"


def test_guidance_goes_to_the_teacher(pipe):
    settings = Distilled(teacher_steps=(1, 17))
    plain = pipe("a red apple", generator=streams(0), temperature=0.0)
    sampled = pipe("a red apple", generator=streams(0), temperature=0.0, decoding=settings)
    other = pipe("a red apple", generator=streams(0), temperature=0.0, guidance_scale=9.0, decoding=settings)
    assert torch.equal(sampled.tokens, plain.tokens) and not torch.equal(sampled.tokens, other.tokens)


def test_the_callback_sees_every_call_and_changes_tokens(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        seen.append((step, kwargs["tokens"].shape[1]))
        return {"tokens": torch.full_like(kwargs["tokens"], 7)}

    call = {"generator": streams(0), "callback_on_step_end": callback, "output_type": "pt"}
    out = pipe("a red apple", decoding=Distilled(steps=2), **call)
    assert seen == [(15, 16)] * 2 and out.tokens.tolist() == [[7] * 16]
    torch.testing.assert_close(out.images, pipe.decode_tokens(out.tokens, "pt"))


def test_the_callback_interrupts(pipe):
    def callback(pipeline, step, timestep, kwargs):
        pipeline._interrupt = True
        return {}

    call = {"generator": streams(0), "callback_on_step_end": callback}
    assert pipe("a red apple", decoding=Distilled(steps=3), **call).stats.target_calls == 1
    out = pipe("a red apple", decoding=Distilled(teacher_steps=(1, 9)), **call)
    assert out.tokens.shape == (1, 1) and out.images[0].size == (16, 16)


@pytest.mark.parametrize("settings", [Distilled(steps=3), Distilled(teacher_steps=(4, 9))], ids=str)
def test_progress_ends_with_the_last_call(pipe, settings, monkeypatch):
    bars = []
    monkeypatch.setattr(pipe, "progress_bar", lambda total: bars.append(Bar(total)) or bars[-1])
    pipe("a red apple", generator=streams(0), decoding=settings)
    assert bars[0].done == bars[0].total > 1


class Bar:
    """A progress bar that counts."""

    def __init__(self, total):
        self.total, self.done = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        self.done += 1


def test_a_saved_pipeline_samples_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = pipe("a red apple", generator=streams(0), decoding=Distilled()).tokens
    for loaded in (LlamaGenPipeline.from_pretrained(tmp_path), studio.load(tmp_path, device="cpu")):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded("a red apple", generator=streams(0), decoding=Distilled()).tokens, expected)


def test_a_pipeline_without_a_student_is_refused(tiny_pipeline):
    with pytest.raises(StudioError, match="needs a student"):
        tiny_pipeline("a red apple", decoding=Distilled())


@pytest.mark.parametrize("given", [{"guidance_scale": 3.0}, {"cfg_interval": 4}, {"temperature": 1.0}, {"top_k": 5},
                                   {"top_p": 0.9}], ids=str)  # fmt: skip
def test_what_only_the_teacher_knows_is_refused(pipe, given):
    with pytest.raises(StudioError, match=next(iter(given))):
        pipe("a red apple", decoding=Distilled(), **given)


@pytest.mark.parametrize(("config", "message"), [({"vocab_size": 32}, "vocab_size"), ({"code_dim": 3}, "3 numbers"),
                                                 ({"grid_size": 3, "split": None}, "grid_size")])  # fmt: skip
def test_a_student_of_another_teacher_is_refused(pipe, student, config, message):
    pipe.register_modules(
        student=DistilledStudent(**{**DistilledStudent.extract_init_dict(dict(student.config))[0], **config})
    )
    with pytest.raises(StudioError, match=message):
        pipe("a red apple", decoding=Distilled())


def test_steps_that_the_student_cannot_serve_are_refused(pipe):
    for settings in (Distilled(steps=40), Distilled(teacher_steps=(3, 18)), Distilled(split=17)):
        with pytest.raises(StudioError):
            pipe("a red apple", decoding=settings)
