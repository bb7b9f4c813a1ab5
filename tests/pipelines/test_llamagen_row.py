"""LlamaGen over rows of tokens, coarse to fine: any length, every decoding, and what fits a grid only."""

import pytest
import torch

import studio
from studio import (
    Autoregressive,
    Distilled,
    DistilledStudent,
    Lantern,
    LlamaGen,
    LlamaGenPipeline,
    Speculative,
    StudioError,
)
from studio.decoding.eagle import AutoDrafts
from studio.models.drafter import Drafter
from studio.reference.autoregressive import textbook
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.render.preview import Sketch, partial_images
from studio.ui.render.token_grid import token_grid
from tests.pipelines.test_llamagen_speculative import drafted

PROMPTS = ["a red apple", "blue sky"]
DRAFTED = drafted(20)
STUDENT = [Distilled(), Distilled(steps=2), Distilled(snap="nearest"), Distilled(teacher_steps=(1, 3))]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def student(tiny_row_pipeline):
    torch.manual_seed(1)
    codebook = tiny_row_pipeline.image_tokenizer.codebook
    return DistilledStudent.from_teacher(tiny_row_pipeline.transformer, codebook, split=2).eval()


@pytest.fixture
def pipe(tiny_row_pipeline, student):
    pipe = LlamaGenPipeline(**{**tiny_row_pipeline.components, "student": student}, default_guidance_scale=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_tokens_are_those_of_the_textbook(pipe):
    plain = pipe(PROMPTS, generator=streams(0, 1), output_type="pt")
    expected = textbook(pipe.transformer, pipe.condition(PROMPTS), generators=streams(0, 1), guidance_scale=3.0)
    assert torch.equal(plain.tokens, expected) and plain.tokens.shape == (2, 6)
    torch.testing.assert_close(plain.images, (pipe.image_tokenizer.decode(expected) / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_fewer_tokens_are_the_first_ones_of_more(pipe, length):
    whole = pipe(PROMPTS, generator=streams(0, 1), output_type="pt")
    out = pipe(PROMPTS, generator=streams(0, 1), num_tokens=length, output_type="pt")
    assert torch.equal(out.tokens, whole.tokens[:, :length])
    assert (out.stats.target_calls, out.stats.tokens) == (length, 2 * length)
    torch.testing.assert_close(out.images, pipe.decode_tokens(whole.tokens[:, :length], "pt"))
    of_tokenizer = (pipe.image_tokenizer.decode(whole.tokens, length) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(out.images, of_tokenizer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoding", [Autoregressive(weights="plain"), *DRAFTED], ids=str)
@pytest.mark.parametrize("length", [1, 4, None])
def test_greedy_images_are_the_same_however_tokens_are_sampled(pipe, decoding, length):
    call = {"temperature": 0.0, "num_tokens": length, "output_type": "pt"}
    plain, sampled = pipe(PROMPTS, **call), pipe(PROMPTS, decoding=decoding, **call)
    if not isinstance(decoding, Lantern):
        assert torch.equal(sampled.tokens, plain.tokens)
        torch.testing.assert_close(sampled.images, plain.images)
    assert sampled.tokens.shape == plain.tokens.shape and sampled.stats.target_calls <= plain.stats.target_calls
    assert sampled.stats.mean_accepted_length >= 1


@pytest.mark.parametrize("decoding", [*DRAFTED, *STUDENT], ids=str)
@pytest.mark.parametrize("length", [3, None])
def test_a_batch_equals_its_single_calls(pipe, decoding, length):
    call = {"decoding": decoding, "num_tokens": length, "output_type": "pt"}
    together = pipe(PROMPTS, generator=streams(1, 2), **call)
    alone = [pipe(prompt, generator=streams(seed), **call) for prompt, seed in zip(PROMPTS, (1, 2))]
    assert together.tokens.shape == (2, length or 6)
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in alone]))
    torch.testing.assert_close(together.images, torch.cat([one.images for one in alone]), atol=1e-5, rtol=1e-5)


def test_codes_of_a_row_stand_in_for_those_that_look_like_them(pipe):
    """Neighbours come from the row's own codebook: with all of them and no bound, drafts pass more often."""
    loose, strict = Lantern(31, delta=1.0), Speculative()
    calls = [
        sum(pipe(PROMPTS, generator=streams(seed, -seed), decoding=how).stats.target_calls for seed in range(8))
        for how in (loose, strict)
    ]
    assert calls[0] < calls[1]
    with pytest.raises(StudioError, match="32 codes"):
        pipe(PROMPTS, decoding=Lantern(1000, 0.1))


def test_a_drafter_of_the_row_drafts(pipe):
    torch.manual_seed(2)
    pipe.register_modules(drafter=Drafter.for_target(pipe.transformer).eval())
    call = {"temperature": 0.0, "output_type": "tokens"}
    plain, sampled = pipe(PROMPTS, **call), pipe(PROMPTS, decoding=Speculative(), **call)
    assert torch.equal(sampled.tokens, plain.tokens) and pipe.drafter.config.row_length == 6


def test_the_first_tokens_are_shown_as_a_whole_image(pipe):
    sampled = pipe(PROMPTS, generator=streams(0, 1), num_tokens=3)
    shown = partial_images(pipe, Sketch(sampled.tokens))
    assert [original.convert("RGB").tobytes() for original in shown] == [image.tobytes() for image in sampled.images]
    assert all(original.getchannel("A").getextrema() == (255, 255) for original in shown)
    assert 'viewBox="0 0 3 3"' in token_grid(DraftTrace(total=6, sampled=3, accepted=frozenset(), rejected={}), "Row")


@pytest.mark.parametrize("decoding", STUDENT[:3], ids=str)
def test_a_student_samples_the_first_tokens_alike(pipe, decoding):
    """What stands behind does not change them where the calls know as many tokens."""
    whole = pipe("a red apple", generator=streams(0), decoding=decoding)
    out = pipe("a red apple", generator=streams(0), decoding=decoding, num_tokens=4)
    assert (out.tokens.shape, out.stats.target_calls) == ((1, 4), decoding.steps)
    if decoding.steps == 1:
        assert torch.equal(out.tokens, whole.tokens[:, :4])


@pytest.mark.parametrize("decoding", [Distilled(teacher_steps=(1, 6)), Distilled(steps=4), Distilled(times=(0, 5))])
def test_more_steps_than_tokens_are_refused(pipe, decoding):
    assert pipe("a red apple", decoding=decoding).tokens.shape == (1, 6)
    with pytest.raises(StudioError, match="samples 3 steps"):
        pipe("a red apple", decoding=decoding, num_tokens=3)


@pytest.mark.parametrize("decoding", [None, Speculative(), Distilled(teacher_steps=(1, 6))], ids=str)
def test_an_interrupted_sampling_is_an_image_of_what_is_there(pipe, decoding):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 2
        return {}

    out = pipe("a red apple", generator=streams(0), decoding=decoding, callback_on_step_end=stop, output_type="pt")
    assert out.tokens.shape == (1, 3)
    torch.testing.assert_close(out.images, pipe.decode_tokens(out.tokens, "pt"))


def test_a_saved_pipeline_samples_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    calls = ({"num_tokens": 4}, {"decoding": Distilled()})
    for loaded in (LlamaGenPipeline.from_pretrained(tmp_path), studio.load(tmp_path, device="cpu")):
        loaded.set_progress_bar_config(disable=True)
        for call in calls:
            sampled, again = (each("a red apple", generator=streams(3), **call) for each in (pipe, loaded))
            assert torch.equal(again.tokens, sampled.tokens)
            assert again.images[0].tobytes() == sampled.images[0].tobytes()


@pytest.mark.parametrize("wrong", [0, 7, -1, 2.0, True, "3"], ids=str)
def test_lengths_that_are_none_are_refused(pipe, wrong):
    with pytest.raises(StudioError, match="num_tokens must be a whole number from 1 to 6"):
        pipe("a red apple", num_tokens=wrong)


def test_a_grid_has_no_first_tokens_that_are_an_image(tiny_pipeline):
    with pytest.raises(StudioError, match="num_tokens is for rows"):
        tiny_pipeline("a red apple", num_tokens=4)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"grid_size": 4}, "a row of 6, those of the transformer a grid"),
        ({"grid_size": None, "row_length": 8}, "a row of 6, those of the transformer a row of 8"),
        ({"grid_size": None, "row_length": 6, "vocab_size": 64}, "32 codes .* samples from 64"),
    ],
)
def test_a_transformer_of_another_layout_is_refused(tiny_one_d, tmp_path, layout, words):
    sizes = {"vocab_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2, "num_classes": 3}
    pipe = LlamaGenPipeline(tiny_one_d, LlamaGen(**{**sizes, **layout}).eval())
    with pytest.raises(StudioError, match=words):
        pipe(class_labels=1)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(StudioError, match=f"does not fit together: .*{words}"):
        studio.load(tmp_path, device="cpu")


def test_a_grid_tokenizer_samples_no_rows(tiny_vq, tiny_row_pipeline):
    sizes = {"vocab_size": 64, "dim": 16, "num_layers": 1, "num_heads": 2, "num_classes": 3}
    pipe = LlamaGenPipeline(tiny_vq, LlamaGen(grid_size=None, row_length=16, **sizes).eval())
    with pytest.raises(StudioError, match="a grid, those of the transformer a row of 16"):
        pipe(class_labels=1)


def test_a_student_of_a_grid_is_refused(pipe, student):
    config = DistilledStudent.extract_init_dict(dict(student.config))[0]
    pipe.register_modules(student=DistilledStudent(**{**config, "grid_size": 4, "row_length": None}))
    with pytest.raises(StudioError, match="grid_size 4"):
        pipe("a red apple", decoding=Distilled())


def test_a_drafter_of_a_grid_is_refused(pipe):
    config = pipe.transformer.config
    sizes = {name: config[name] for name in ("vocab_size", "dim", "num_heads")}
    pipe.register_modules(drafter=Drafter(grid_size=4, prefix_length=8, **sizes))
    with pytest.raises(StudioError, match="grid_size 4, the model None"):
        pipe("a red apple", decoding=Speculative(drafts=AutoDrafts()))
