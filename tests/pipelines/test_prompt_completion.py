"""What a prompt leaves unspecified is sampled by the image's own stream and is in the prompts of the output."""

import pytest
import torch

from studio import StudioError
from studio.data.captions import full_caption, prompt_completion, random_caption
from studio.pipelines.prompt_completion import fill_unspecified


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_style_and_background_go_to_their_places():
    choices = [
        {**choice, "one_of": choice["one_of"][:1]} for choice in prompt_completion()
    ]  # 3d style, on a white background
    for prompt, expected in {
        "a red apple": "a red apple, 3d style, on a white background",
        "fox, flat style": "fox, flat style, on a white background",
        "a cat, on a yellow background": "a cat, 3d style, on a yellow background",
        "a cat on blue": "a cat, 3d style, on blue",
        "a cat, orange background": "a cat, 3d style, orange background",
        "A Flat fox on an orange background": "A Flat fox on an orange background",
        "a flat shoe": "a flat shoe, 3d style, on a white background",
        "a moon on a hill, ": "a moon on a hill, 3d style, on a white background",
    }.items():
        assert fill_unspecified(prompt, choices, stream()) == expected


def test_complete_captions_stay_and_use_no_randomness():
    for row in ((0, 0, 0), (7, 1, 3), (100, 1, 9)):
        generator = stream()
        assert fill_unspecified(full_caption(*row), prompt_completion(), generator) == full_caption(*row)
        assert torch.equal(generator.get_state(), stream().get_state())


def test_all_values_are_as_likely():
    """2,000 streams: each of 20 pairs within 5 standard deviations of its share; a named style is never changed."""
    sampled = [fill_unspecified("a fox", prompt_completion(), stream(seed)) for seed in range(2000)]
    counts = [sampled.count(caption) for caption in set(sampled)]
    assert len(counts) == 20 and all(abs(count - 100) < 5 * (2000 * 0.05 * 0.95) ** 0.5 for count in counts)
    named = {fill_unspecified("a fox, flat style", prompt_completion(), stream(seed)) for seed in range(50)}
    assert len(named) > 5 and not any("3d" in caption for caption in named)


def test_every_way_to_name_them_is_seen():
    """Captions as in training: the number of phrases that are added is the number that was left out."""
    import numpy as np

    rng = np.random.default_rng(0)
    for index in range(200):
        caption = random_caption(index, 1, 5, rng)
        named = any(way in caption for way in ("yellow background", "on yellow"))
        missing = ("flat style" not in caption) + (not named)
        assert (
            len(fill_unspecified(caption, prompt_completion(), stream()).split(", "))
            == len(caption.split(", ")) + missing
        )


@pytest.fixture(
    params=[
        "tiny_pipeline", "tiny_mar_pipeline", "tiny_resgen_pipeline", "tiny_rq_pipeline", "tiny_bridge_pipeline",
    ]
)  # fmt: skip
def plain(request):
    """A pipeline of every kind of tokens, without prompt completion."""
    return request.getfixturevalue(request.param)


def with_choices(pipe, choices):
    defaults = {name: value for name, value in pipe.config.items() if name.startswith("default_")}
    return type(pipe)(**pipe.components, **defaults, prompt_completion=choices)


def test_a_pipeline_samples_the_completed_prompt(plain, tmp_path):
    """Each image with its own stream; equal to the image of the completed prompt with the stream after completion."""
    choices = [{"named": "red|green", "one_of": ["red", "green"]}]
    pipe = with_choices(plain, choices)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("apple", num_images_per_prompt=6, generator=[stream(seed) for seed in range(6)])
    assert set(out.prompts) == {"apple, red", "apple, green"}
    for seed in range(6):
        single = pipe("apple", generator=stream(seed))
        chosen = stream(seed)
        torch.randint(2, (), generator=chosen)
        in_full = plain(out.prompts[seed], generator=chosen)
        assert single.prompts == in_full.prompts == [out.prompts[seed]]
        for each in (single, in_full):
            assert torch.allclose(each.tokens[0].float(), out.tokens[seed].float(), atol=1e-4)
    pipe.save_pretrained(tmp_path)
    assert type(pipe).from_pretrained(tmp_path).config.prompt_completion == choices
    assert plain("apple", generator=stream()).prompts == ["apple"]


def test_classes_have_no_words(tiny_mar_class_pipeline):
    assert tiny_mar_class_pipeline(class_labels=1).prompts is None


@pytest.mark.parametrize(
    "wrong", [[{"named": "("}], [{"named": "a", "one_of": []}], ["a"], [{"named": "(", "one_of": ["b"]}], 3]
)
def test_choices_that_cannot_be_made_are_refused(plain, wrong):
    with pytest.raises(StudioError, match="prompt_completion"):
        with_choices(plain, wrong)
