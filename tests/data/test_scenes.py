"""Scenes: decided by the seed, of the size that was asked for, and every answer true and short."""

import numpy as np
import pytest

from studio.data.backgrounds import BACKGROUNDS, NAMES
from studio.data.scenes import CELL, KINDS, SINGLE_KINDS, TILE, WORDS, draw_scene, draw_single, subjects
from studio.data.splits import combination_is_held_out
from studio.errors import StudioError


def test_the_seed_decides_everything():
    first, again, other = (draw_scene(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image) and first.questions == again.questions
    assert first.questions != other.questions


@pytest.mark.parametrize("tiles", [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_size_and_number(tiles):
    scene = draw_scene(np.random.default_rng(0), tiles, questions=7)
    assert scene.image.shape == (tiles[0] * TILE, tiles[1] * TILE, 3) and scene.image.dtype == np.uint8
    assert len(scene.questions) == 7


def test_what_cells_show_can_be_given():
    for seed in range(5):
        scene = draw_scene(np.random.default_rng(seed), (1, 1), emoji=1, words=3)
        assert sum(thing in WORDS for thing, _ in scene.cells) == 3
        assert not any(thing == "nothing" for thing, _ in scene.cells)


def test_answers_are_of_the_right_sort():
    names = {subject.label for subject in subjects()}
    answers = {
        "place": names | {"nothing"}, "count": set(map(str, range(1, 17))), "background": set(NAMES),
        "word": set(WORDS), "presence": {"yes", "no"},
    }  # fmt: skip
    seen = {kind: set() for kind in KINDS}
    for seed in range(200):
        for question in draw_scene(np.random.default_rng(seed)).questions:
            assert question.answer in answers[question.kind] and question.text.endswith("?")
            seen[question.kind].add(question.answer)
    assert {"yes", "no"} == seen["presence"] and seen["background"] == set(NAMES) and len(seen["place"]) > 100


def test_the_colour_behind_is_the_one_painted():
    """Corners of a cell show its background: an emoji is never wider than 40 of 48 px and keeps 2 px of margin."""
    checked = 0
    for seed in range(300):
        scene = draw_scene(np.random.default_rng(seed), (1, 1), questions=12)
        places = {q.answer: q.text for q in scene.questions if q.kind == "place"}
        for question in scene.questions:
            name = question.text.removeprefix("What colour is behind the ").removesuffix("?")
            if question.kind != "background" or name not in places:
                continue
            row, column = (int(part.strip("?,")) - 1 for part in places[name].split() if part.strip("?,").isdigit())
            corner = scene.image[row * CELL, column * CELL]
            assert tuple(corner) == BACKGROUNDS[question.answer]
            checked += 1
    assert checked > 20


def test_cells_say_what_the_answers_say():
    kinds = set()
    for seed in range(100):
        scene = draw_scene(np.random.default_rng(seed), (1, 2), questions=12)
        assert len(scene.cells) == 8
        for question in scene.questions:
            numbers = [int(part.strip("?,")) - 1 for part in question.text.split() if part.strip("?,").isdigit()]
            if numbers:
                row, column = numbers
                assert scene.cells[4 * row + column][0] == question.answer
                assert question.cells == (4 * row + column,)
            elif question.kind == "background":
                name = question.text.removeprefix("What colour is behind the ").removesuffix("?")
                assert scene.cells[question.cells[0]] == (name, question.answer)
            else:
                name = question.text.removesuffix("?").split()[-1].lower()
                assert question.cells == tuple(n for n, (thing, _) in enumerate(scene.cells) if thing == name)
                assert question.answer in ("yes" if question.cells else "no", str(len(question.cells)))
            kinds.add(question.kind)
    assert kinds == {"place", "count", "background", "word", "presence"}


@pytest.mark.parametrize(("side", "held_out"), [(64, False), (128, True)])
def test_a_single_emoji_is_one_of_its_side_of_the_split_and_its_answers_are_true(side, held_out):
    for seed in range(20):
        single = draw_single(np.random.default_rng(seed), side, held_out)
        assert single.image.shape == (side, side, 3) and single.image.dtype == np.uint8
        answers = {question.kind: question.answer for question in single.questions}
        assert tuple(answers) == SINGLE_KINDS
        assert single.cells == ((answers["name"], answers["background"]),)
        assert combination_is_held_out(answers["name"], answers["style"], answers["background"]) == held_out
        corners = single.image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == BACKGROUNDS[answers["background"]]).all(axis=1).any()
    with pytest.raises(StudioError, match="side of the image"):
        draw_single(np.random.default_rng(0), 129)
