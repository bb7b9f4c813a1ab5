"""HiRED and GlobalCom2 against the textbook and their own properties; attention received by tokens without CLS."""

import math

import pytest
import torch

from studio.errors import StudioError
from studio.pruning.attention import Attention, cls_logits, cls_probabilities, mean_query_logits, received_attention
from studio.pruning.globalcom2 import crop_ratios, crop_scores, globalcom2
from studio.pruning.hired import cell_of, crop_hits, hired, reference_budgets
from studio.pruning.layout import Layout
from studio.pruning.vscan import merged, vscan
from studio.reference import pruning as textbook

LAYOUTS = [
    Layout.plain(6, 6),
    Layout.anyres(6, (2, 2), (60, 60)),
    Layout.anyres(6, (2, 2), (60, 40)),
    Layout.anyres(6, (2, 2), (40, 60)),
    Layout.anyres(5, (3, 1), (60, 20)),
]


def attention_for(layout, seed=0):
    sample = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, layout.partitions, layout.size[0] * layout.size[1], generator=sample)
    return Attention(first=scores[0].softmax(-1), last=scores[1].softmax(-1), logits=scores[2])


def prune(method, layout, budget, attention, **options):
    return method(torch.zeros(len(layout), 1), budget, attention=attention, layout=layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_same_tokens_as_the_textbook(layout):
    for seed, budget in ((0, 1), (1, 7), (2, 20), (3, len(layout.content) - 1)):
        attention = attention_for(layout, seed)
        for fast, slow in ((hired, textbook.hired), (globalcom2, textbook.globalcom2)):
            assert torch.equal(prune(fast, layout, budget, attention, newline="drop"), slow(attention, layout, budget))


def test_true_cells():
    assert cell_of((4, 4), (2, 2)).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert cell_of((4, 4), (1, 3)).view(4, 4)[0].tolist() == [0, 1, 2, 2]
    assert cell_of((2, 2), (3, 1)).tolist() == [0, 0, 1, 1]


def test_hired_all_mass_in_one_cell():
    layout = LAYOUTS[1]
    attention = attention_for(layout)
    first = attention.first.clone()
    first[0] = (cell_of((6, 6), (2, 2)) == 2).float() + torch.rand(36) * 1e-3
    attention = Attention(first=first, last=attention.last)
    hits = crop_hits(first[0], (6, 6), (2, 2), alpha=0.75)
    assert hits.tolist() == [0, 0, 9, 0]
    kept = prune(hired, layout, 40, attention, alpha=0.75, newline="drop")
    assert torch.bincount(layout.partition[kept], minlength=5).tolist() == [30, 0, 0, 10, 0]
    assert reference_budgets(hits, 36, 0.5, 0.1)[3] == min(36, 81)


def test_hired_treats_crops_alike_when_the_thumbnail_looks_everywhere():
    layout = Layout.anyres(4, (2, 2), (60, 60))
    attention = attention_for(layout)
    checkered = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).float().flatten()
    assert crop_hits(checkered, (4, 4), (2, 2)).tolist() == [2, 2, 2, 2]
    attention = Attention(first=checkered.expand(5, 16), last=attention.last)
    kept = prune(hired, layout, 24, attention, newline="drop")
    assert torch.bincount(layout.partition[kept], minlength=5).tolist() == [12, 3, 3, 3, 3]


def test_hired_budgets_stay_within_the_total():
    for seed in range(20):
        hits = torch.randint(1, 50, (4,), generator=torch.Generator().manual_seed(seed))
        for ratio in (0.05, 0.3, 0.9):
            budgets = reference_budgets(hits, 144, ratio)
            assert budgets.sum() <= int(5 * 144 * ratio) and budgets.max() <= 144


def test_hired_gives_a_crop_that_is_all_padding_nothing():
    layout = Layout.anyres(4, (3, 1), (10, 10))
    assert not len(layout.region(1)) or len(layout.region(1)) < 16
    kept = prune(hired, layout, 20, attention_for(layout))
    assert len(kept) == 20


def test_globalcom2_ratios():
    equal = crop_ratios(torch.ones(36), (6, 6), (2, 2), 0.3)
    torch.testing.assert_close(equal, torch.full((4,), 0.3, dtype=torch.float64))
    scores = torch.randn(36, generator=torch.Generator().manual_seed(0))
    rho = crop_ratios(scores, (6, 6), (2, 2), 0.3)
    assert math.isclose(float(rho.mean()), 0.3, abs_tol=1e-7)
    torch.testing.assert_close(crop_ratios(scores + 5, (6, 6), (2, 2), 0.3), rho, atol=1e-6, rtol=0)
    assert crop_ratios(scores * 100, (6, 6), (2, 2), 0.9).max() == 1
    spread = crop_ratios(scores, (6, 6), (2, 2), 0.3, pool="mean")
    assert spread.std() < rho.std()


def test_globalcom2_scores_do_not_depend_on_scale():
    layout = LAYOUTS[2]
    logits = attention_for(layout).logits
    for ours, scaled in zip(crop_scores(logits, layout), crop_scores(logits * 7, layout)):
        torch.testing.assert_close(ours, scaled)


def test_received_attention_is_the_column_mean():
    sample = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 300, 8, generator=sample)
    split = [part.view(3, 300, 2, 4).transpose(1, 2) for part in (queries, keys)]
    whole = (split[0] @ split[1].transpose(-1, -2) / 2).softmax(-1)
    received = received_attention(queries, keys, heads=2)
    torch.testing.assert_close(received, whole.mean(dim=(1, 2)))
    torch.testing.assert_close(received.sum(-1), torch.ones(3))
    surrogate = mean_query_logits(queries, keys, heads=2)
    torch.testing.assert_close(
        surrogate, (split[0] @ split[1].transpose(-1, -2) / 2).mean(dim=(1, 2)), atol=1e-5, rtol=0
    )


def test_projections_that_do_not_fit_are_refused():
    x = torch.zeros(2, 5, 6)
    for function in (cls_logits, cls_probabilities, received_attention, mean_query_logits):
        with pytest.raises(StudioError):
            function(x, x, heads=4)
    with pytest.raises(StudioError):
        cls_logits(x, x[:1], heads=2)


def test_vscan_scans_windows_and_the_image():
    layout = Layout.plain(12, 12)
    sample = torch.Generator().manual_seed(0)
    early, late = torch.rand(2, 1, 144, generator=sample)
    features = torch.randn(144, 8, generator=sample)
    kept = vscan(features, 24, attention=Attention(shallow=early, last=late), layout=layout).tolist()
    local = []
    for top, left in ((0, 0), (0, 6), (6, 0), (6, 6)):
        window = [(top + row) * 12 + left + column for row in range(6) for column in range(6)]
        local += sorted(window, key=lambda place: -float(early[0, place]))[:3]
    rest = sorted(set(range(144)) - set(local), key=lambda place: -float(late[0, place]))
    assert kept == sorted([*local, *rest[:12]])
    mixed = merged(features, torch.tensor(kept), layout)
    groups = {place: [place] for place in kept}
    for place in set(range(144)) - set(kept):
        alike = [float(torch.cosine_similarity(features[place], features[other], 0)) for other in kept]
        groups[kept[alike.index(max(alike))]].append(place)
    for place, members in groups.items():
        torch.testing.assert_close(mixed[place], features[members].mean(0))


def test_vscan_leaves_newlines_as_they_are():
    layout = Layout.anyres(6, (2, 2), (60, 40))
    features, arguments = torch.randn(len(layout), 5), {"layout": layout}
    scores = torch.rand(2, layout.partitions, 36)
    kept = vscan(features, 40, attention=Attention(shallow=scores[0], last=scores[1]), **arguments)
    assert len(kept) == 40 and (layout.partition[kept] == 0).sum() >= 5
    assert torch.equal(merged(features, kept, layout)[layout.newlines], features[layout.newlines])
