"""What all pruners promise: exact budgets, order, newlines, and refusals."""

import pytest
import torch

from studio.errors import StudioError
from studio.pruning.attention import Attention
from studio.pruning.budget import apportion, count
from studio.pruning.layout import Layout
from studio.pruning.registry import METHODS, READS_TEXT, WITH_REFERENCE, method_named

LAYOUTS = {
    "plain": Layout.plain(6, 6),
    "one row": Layout.plain(1, 40),
    "square": Layout.anyres(6, (2, 2), (60, 60)),
    "padded": Layout.anyres(6, (2, 2), (60, 40)),
    "wide": Layout.anyres(6, (1, 3), (20, 60)),
    "one partition and newline": Layout.from_ids(torch.tensor([*range(36), -1]), (6, 6)),
}


def given(layout, seed=0, width=5):
    """Features and arguments that fit a layout."""
    sample = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, layout.partitions, layout.size[0] * layout.size[1], generator=sample)
    attention = Attention(first=scores[0].softmax(-1), last=scores[1].softmax(-1), logits=scores[2])
    features = torch.randn(len(layout), width, generator=sample)
    features[layout.newlines] = 1.0
    return features, {"attention": attention, "layout": layout, "generator": sample}


def select(method, features, budget, newline="row", **arguments):
    if method in READS_TEXT:
        arguments["text"] = torch.randn(3, features.shape[1], generator=torch.Generator().manual_seed(7))
    return METHODS[method](features, budget, newline=newline, **arguments)


@pytest.mark.parametrize("newline", ["row", "keep", "drop"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_budget_is_exact_and_newlines_are_as_configured(method, layout, newline):
    for budget in (1, 2, 3, 7, len(layout) // 3, len(layout) - 2, len(layout) - 1):
        features, arguments = given(layout)
        if newline == "keep" and budget <= len(layout.newlines) and len(layout.newlines):
            with pytest.raises(StudioError, match="no room"):
                select(method, features, budget, newline, **arguments)
            continue
        kept = select(method, features, budget, newline, **arguments)
        assert torch.equal(kept, kept.unique()), "sorted and no duplicates"
        ends = layout.newline_of[kept]
        rows, newlines = ends[ends >= 0].unique(), kept[layout.partition[kept] < 0]
        if newline == "drop":
            assert len(kept) == min(budget, len(layout.content)) and len(newlines) == 0
        elif newline == "keep":
            assert len(kept) == budget and torch.equal(newlines, layout.newlines)
        elif budget > 3:
            assert len(kept) == budget and torch.equal(newlines, rows)
        else:
            assert budget - 1 <= len(kept) <= budget and len(kept) > 0
            assert torch.isin(newlines, rows).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_ratio_one_touches_nothing(method, layout):
    features, _ = given(layout)
    for budget in (1.0, len(features), len(features) + 5):
        assert torch.equal(select(method, features, budget, layout=layout), torch.arange(len(features)))


@pytest.mark.parametrize("method", METHODS)
def test_a_fraction_counts_newlines(method):
    layout = LAYOUTS["padded"]
    features, arguments = given(layout)
    assert len(select(method, features, 0.25, **arguments)) == round(0.25 * len(layout))


@pytest.mark.parametrize("method", ["divprune", "random"])
def test_newlines_may_compete(method):
    layout = LAYOUTS["square"]
    features, arguments = given(layout)
    kept = METHODS[method](features, 30, newline="compete", **arguments)
    assert len(kept) == 30 and torch.equal(kept, kept.unique())


def test_one_token_without_room_for_its_newline():
    layout = Layout.from_ids(torch.tensor([0, 1, -1, 2, 3, -1]), (2, 2))
    features, arguments = given(layout)
    for method in METHODS:
        kept = select(method, features, 1, **arguments)
        assert len(kept) == 1 and layout.partition[kept[0]] == 0


def test_random_is_decided_by_its_generator():
    layout = LAYOUTS["square"]
    features, _ = given(layout)
    first, again, other = (
        METHODS["random"](features, 30, layout=layout, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(StudioError, match="generator"):
        METHODS["random"](features, 30, layout=layout)


def test_uniform_is_a_grid():
    layout = Layout.plain(6, 6)
    kept = METHODS["uniform"](torch.zeros(36, 1), 9, layout=layout)
    assert kept.tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    square = LAYOUTS["square"]
    kept = METHODS["uniform"](torch.zeros(len(square), 1), 45, layout=square, newline="drop")
    assert (square.partition[kept] == 0).sum() == 9
    assert torch.bincount(square.partition[kept], minlength=5)[1:].tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, -0.2, float("nan"), True, "0.5", None])
def test_refused_budgets(budget):
    for method in METHODS.values():
        features, arguments = given(LAYOUTS["plain"])
        with pytest.raises(StudioError):
            method(features, budget, **arguments)


def test_refusals_say_what_to_do():
    layout = LAYOUTS["square"]
    features, arguments = given(layout)
    with pytest.raises(StudioError, match="divprune, hired"):
        method_named("other")
    with pytest.raises(StudioError, match="newline is one of"):
        METHODS["divprune"](features, 5, newline="all", **arguments)
    with pytest.raises(StudioError, match="layout has"):
        METHODS["divprune"](features[1:], 5, **arguments)
    with pytest.raises(StudioError, match="tokens, width"):
        METHODS["divprune"](features[None], 5)
    for method in ("hired", "globalcom2"):
        with pytest.raises(StudioError, match="compete"):
            METHODS[method](features, 5, newline="compete", **arguments)
        with pytest.raises(StudioError, match="attention"):
            METHODS[method](features, 5, layout=layout)
        with pytest.raises(StudioError, match="shape"):
            METHODS[method](features, 5, layout=layout, attention=given(LAYOUTS["plain"])[1]["attention"])
        with pytest.raises(StudioError, match="fraction"):
            METHODS[method](features, 5, reference=True, **arguments)
    shrunk = Layout(layout.partition.clamp(max=1), layout.row, layout.column, layout.size)
    with pytest.raises(StudioError, match="shrank"):
        METHODS["hired"](features, 5, layout=shrunk, attention=arguments["attention"])
    with pytest.raises(StudioError, match="alpha"):
        METHODS["hired"](features, 5, alpha=2, **arguments)
    with pytest.raises(StudioError, match="cells"):
        METHODS["hired"](features, 5, cells="diagonal", **arguments)
    with pytest.raises(StudioError, match="tau"):
        METHODS["globalcom2"](features, 5, tau=0, **arguments)
    with pytest.raises(StudioError, match="pool"):
        METHODS["globalcom2"](features, 5, pool="max", **arguments)
    with pytest.raises(StudioError, match="same length"):
        Layout(layout.partition, layout.row[1:], layout.column, layout.size)
    with pytest.raises(StudioError, match="ids of a layout"):
        Layout.from_ids(torch.tensor([36]), (6, 6))


def test_reference_is_for_methods_with_authors():
    assert set(WITH_REFERENCE) < set(METHODS)


@pytest.mark.parametrize(
    ("total", "weights", "caps", "expected"),
    [
        (10, [1, 1], [10, 10], [5, 5]),
        (10, [3, 1], [5, 10], [5, 5]),
        (10, [1, 0], [4, 10], [4, 6]),
        (3, [1, 1, 1, 1], [9, 9, 9, 9], [1, 1, 1, 0]),
        (5, [0, 0], [8, 2], [4, 1]),
        (99, [1, 2], [3, 4], [3, 4]),
        (0, [1, 2], [3, 4], [0, 0]),
    ],
)
def test_apportion(total, weights, caps, expected):
    assert apportion(total, weights, caps) == expected


def test_apportion_loses_nothing():
    sample = torch.Generator().manual_seed(0)
    for _ in range(300):
        caps = torch.randint(0, 20, (5,), generator=sample).tolist()
        weights = (torch.rand(5, generator=sample) * torch.randint(0, 2, (5,), generator=sample)).tolist()
        total = int(torch.randint(0, 60, (1,), generator=sample))
        parts = apportion(total, weights, caps)
        assert sum(parts) == min(total, sum(caps))
        assert all(0 <= part <= cap for part, cap in zip(parts, caps))


def test_count_rounds_as_python_does():
    assert [count(0.1, 25), count(0.098, 576), count(1e-6, 10), count(7, 5), count(1, 5)] == [2, 56, 1, 5, 1]
