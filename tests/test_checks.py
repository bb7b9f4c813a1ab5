"""The checker of numbers, choices and text, and that calls go through it."""

import math

import numpy as np
import pytest
import torch

from studio import (
    Autoregressive,
    ContinuousSpeculative,
    Distilled,
    Lantern,
    LanternPlusPlus,
    MaskedAutoregressive,
    ResGenDecoding,
    decoding_named,
)
from studio.checks import as_integer, check_integer, check_number, check_options, check_text, json_text, shown
from studio.decoding.drafts import NGram, TokenRecycling
from studio.decoding.sampling import Sampling
from studio.decoding.trees import DynamicTree, StaticTree
from studio.errors import StudioError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_python_and_numpy_are_taken(value):
    taken = check_integer("steps", value, 1, 5)
    assert taken == 3 and type(taken) is int


@pytest.mark.parametrize("value", [2, 0.5, np.float32(0.5), np.float16(2), np.int8(2)])
def test_numbers_of_python_and_numpy_are_taken(value):
    taken = check_number("scale", value, 0, 2)
    assert taken == value and type(taken) in (int, float)


@pytest.mark.parametrize("value", [None, True, np.bool_(True), "3", 3.0, 0, 6, 10**400, float("nan"), [3], 3j])
def test_what_is_no_integer_in_the_range_is_refused(value):
    with pytest.raises(StudioError, match="^steps must be a whole number from 1 to 5, not "):
        check_integer("steps", value, 1, 5)


@pytest.mark.parametrize("value", [None, True, "0.1", -0.1, 1.1, math.nan, math.inf, -math.inf, 10**400, [0.1]])
def test_what_is_no_number_in_the_range_is_refused(value):
    with pytest.raises(StudioError, match="^scale must be a finite number of at least 0 and at most 1, not "):
        check_number("scale", value, 0, 1)


def test_messages_show_any_value_in_short():
    class Rude:
        def __repr__(self):
            raise RuntimeError

    for value in ("a" * 10**6, 10**10_000, [10**10_000], "\ud800", Rude(), {1: [2] * 10**5}):
        assert len(shown(value)) < 300
        shown(value).encode()


@pytest.mark.parametrize("text", [None, "", " \n", 3, ["a"], "\ud83c", "a" * 11])
def test_texts_without_words_without_end_or_no_unicode_are_refused(text):
    with pytest.raises(StudioError):
        check_text("The prompt", text, 10, "The prompt is empty.")


def test_json_is_readable_where_it_can_be_and_valid_where_not():
    assert json_text({"a": "ä"}) == '{"a": "ä"}'
    assert json_text({"a": "\udcff"}) == '{"a": "\\udcff"}'


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lantern(delta="0.1"),
        lambda: Lantern(ratio=math.nan),
        lambda: LanternPlusPlus(k="10"),
        lambda: Distilled(teacher_steps=5),
        lambda: Distilled(teacher_steps=(1, "2")),
        lambda: Distilled(times=7),
        lambda: Distilled(snap=["none"]),
        lambda: MaskedAutoregressive(diffusion_steps=10**9),
        lambda: ContinuousSpeculative(prefill="0"),
        lambda: ContinuousSpeculative(mode="relaxed", max_rounds=10**9),
        lambda: ResGenDecoding(confidence_temperature=1e300),
        lambda: Sampling(temperature=1e300),
        lambda: Autoregressive(weights=["auto"]),
        lambda: NGram(branches=10**9),
        lambda: NGram(branches=4000, levels=4000),
        lambda: TokenRecycling(candidates=10**9),
        lambda: DynamicTree(nodes=10**9),
        lambda: StaticTree(5),
        lambda: StaticTree(((0,), (10**12,))),
        lambda: decoding_named(["ar"]),
        lambda: decoding_named("distilled").settings(teacher_steps="5"),
    ],
)
def test_settings_are_refused_before_anything_is_sized_by_them(make):
    with pytest.raises(StudioError):
        make()


def test_settings_keep_pythons_own_numbers():
    for settings in (Distilled(steps=np.int64(2)), Lantern(k=np.int64(2), delta=np.float32(0.5))):
        for value in vars(settings).values():
            assert not isinstance(value, np.generic)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"generator": [torch.Generator(), None], "num_images_per_prompt": 2}, "torch.Generator"),
        ({"guidance_scale": 1e300}, "guidance_scale"),
        ({"negative_prompt": "a pear"}, "negative_prompt: there is no negative prompt, so say in the prompt"),
        ({"num_steps": 5, "width": 64}, "num_steps, no width"),
        ({"num_images_per_prompt": 10**11}, "from 1 to 10000"),
        ({"prompt": ["a red apple"] * 10_001}, "at most 10000 images"),
        ({"prompt": "a \ud83c apple"}, "not valid Unicode"),
        ({"prompt": ()}, "prompt is empty"),
        ({"output_type": ["pil"]}, "output_type"),
        ({"callback_on_step_end": 3}, "function"),
        ({"callback_on_step_end_tensor_inputs": 3}, "Callbacks"),
    ],
)
@pytest.mark.parametrize("kind", ["tiny_pipeline", "tiny_mar_pipeline", "tiny_resgen_pipeline", "tiny_bridge_pipeline"])
def test_calls_that_no_pipeline_takes(request, kind, call, word):
    with pytest.raises(StudioError, match=word):
        request.getfixturevalue(kind)(**{"prompt": "a red apple", **call})


def test_numpy_numbers_and_tuples_draw_the_same(tiny_pipeline):
    def streams():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    call = {"num_images_per_prompt": 2, "guidance_scale": 2, "top_k": 5}
    plain = tiny_pipeline(["a red apple", "a pear"], generator=streams(), **call)
    same = tiny_pipeline(
        ("a red apple", "a pear"),
        num_images_per_prompt=np.int64(2),
        guidance_scale=np.float32(2),
        top_k=np.int32(5),
        generator=tuple(streams()),
    )
    assert torch.equal(plain.tokens, same.tokens)


def test_classes_are_numpy_numbers_or_tuples_too(tiny_class_pipeline):
    sampled = tiny_class_pipeline(class_labels=(np.int64(1), 0), output_type="tokens")
    assert len(sampled.tokens) == 2


def test_more_calls_of_a_student_than_steps_build_no_list():
    """A list of a thousand million numbers would be 8 GB and a minute: this returns at once."""

    class Student:
        bounds, horizon = tuple(range(7)), 1.0

    with pytest.raises(StudioError, match="too few for 1000000000 calls"):
        Distilled(steps=10**9).times_for(Student())
    with pytest.raises(StudioError, match="must end at 7"):
        Distilled(teacher_steps=(1, 10**11)).reports_for(Student())


@pytest.mark.parametrize(
    ("value", "expected"), [(3.0, 3), (-0.0, 0), (2.5, 2.5), ("3", "3"), (True, True), (None, None)]
)
def test_integers_that_json_made_floats_of_are_integers_again(value, expected):
    taken = as_integer(value)
    assert taken == expected and type(taken) is type(expected)


def test_text_may_be_blank_where_no_sentence_refuses_it():
    assert check_text("The prompt", " ", 10) == " "
    for value in (None, 3, ["a"]):
        with pytest.raises(StudioError, match="^The prompt must be text, not "):
            check_text("The prompt", value, 10)


KINDS = {"delta": float, "window": int, "mode": str}


def test_options_come_back_as_pythons_own():
    checked = check_options({"delta": np.float32(0.5), "window": 3.0, "mode": "x", "other": None}, KINDS)
    assert checked == {"delta": 0.5, "window": 3, "mode": "x", "other": None}
    assert [type(checked[name]) for name in KINDS] == [float, int, str]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["delta"], "by name"),
        ({3: 1}, "An option name must be text"),
        ({"\ud83c": 1}, "An option name is not valid Unicode"),
        ({"delta": "0.1"}, "The option delta must be a finite number"),
        ({"delta": math.nan}, "The option delta must be a finite number"),
        ({"window": 2.5}, "The option window must be a whole number, not 2.5"),
        ({"window": True}, "The option window must be a whole number, not True"),
        ({"mode": 1}, "The option mode must be text"),
        ({"mode": "x" * 101}, "101 characters"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(StudioError, match=message):
        check_options(options, KINDS)
