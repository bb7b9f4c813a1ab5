"""Charts: every point stands where its numbers say, and what a person reads is there."""

import xml.etree.ElementTree as tree

import pytest

from studio.bench.chart import Series, chart

SVG = "{http://www.w3.org/2000/svg}"


def sampled(*, log_x):
    series = [Series("one <way>", ((1, 10), (10, 20), (100, 30)), ("a", "b", "c")), Series("other", ((10, 15),))]
    return tree.fromstring(chart("Title & more", "speed", "quality", series, log_x=log_x))


def places(root):
    return [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")]


@pytest.mark.parametrize("log_x", [False, True])
def test_points_are_ordered_and_spaced_as_their_numbers(log_x):
    first, second, third, _, other, _ = places(sampled(log_x=log_x))
    assert first[0] < second[0] < third[0] and first[1] > second[1] > third[1]
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.11)
    assert other[0] == second[0] and first[1] > other[1] > second[1]
    ratio = (third[0] - second[0]) / (second[0] - first[0])
    assert ratio == pytest.approx(1 if log_x else 10, rel=0.02)


def test_words():
    words = {text.text for text in sampled(log_x=True).iter(f"{SVG}text")}
    assert {"Title & more", "speed", "quality", "one <way>", "other", "a", "b", "c", "10", "100"} <= words


def test_one_point_has_room():
    root = tree.fromstring(chart("t", "x", "y", [Series("s", ((2.0, 3.0),))]))
    (x, y), _ = places(root)
    assert 70 < x < 570 and 44 < y < 386


def ticks(points, **settings):
    root = tree.fromstring(chart("t", "x", "y", [Series("s", points)], **settings))
    words = [text for text in root.iter(f"{SVG}text") if text.text.replace(".", "").isdigit()]
    across = [float(text.text) for text in words if text.get("text-anchor") == "middle"]
    return across, [float(text.text) for text in words if text.get("text-anchor") == "end"]


def test_a_short_logarithmic_axis_has_ticks_too():
    assert ticks(((2.2, 1), (4.8, 2)), log_x=True)[0] == [3, 4, 5]
    assert ticks(((2.2, 1), (2.6, 2)), log_x=True)[0] == [2.2, 2.3, 2.4, 2.5, 2.6]


def test_small_differences_look_small():
    heights = []
    for least in (0, 10):
        root = tree.fromstring(chart("t", "x", "y", [Series("s", ((1, 93.0), (2, 93.5)))], least_height=least))
        first, second, _ = places(root)
        heights.append(first[1] - second[1])
    assert heights[0] > 250 and 0 < heights[1] < 20
