"""Where tokens lie in the image."""

import pytest
import torch

from studio.pruning.layout import NEWLINE, Layout
from studio.pruning.patch_views import patch_views


def test_a_plain_grid_covers_the_image():
    (view,) = patch_views(Layout.plain(2, 3), torch.tensor([0, 5]), (300, 200), centred=False, crops=True)
    assert view.name == "whole" and view.box == (0, 0, 1, 1) and view.read.all()
    assert view.kept.tolist() == [[True, False, False], [False, False, True]]


def test_a_tower_that_cuts_the_margins_sees_the_middle():
    (view,) = patch_views(Layout.plain(2, 2), torch.arange(4), (400, 200), centred=True, crops=True)
    assert view.box == (0.25, 0, 0.75, 1)


def test_a_canvas_reaches_beyond_the_image_where_it_is_padded():
    layout = Layout.anyres(4, (2, 2), (100, 200))
    kept = torch.tensor([3, 16])
    whole, crops = patch_views(layout, kept, (200, 100), centred=False, crops=True)
    assert crops.read.shape == (8, 8) and crops.box == (0, -0.5, 1, 1.5)
    assert crops.read[2:6].all() and crops.read.sum() == 32
    assert whole.kept.nonzero().tolist() == [[0, 3]] and crops.kept.nonzero().tolist() == [[2, 0]]


def test_patches_of_one_token_of_the_tower_are_one_group():
    layout = Layout.anyres(2, (1, 2), (50, 100))
    merged = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 1], [0, 1, 2, 1]])
    whole, crops = patch_views(layout, torch.arange(len(layout)), (100, 50), centred=False, crops=True, merged=merged)
    assert whole.merged.tolist() == [[0, 0], [1, 2]]
    assert crops.merged.tolist() == [[4, 5, 8, 9], [5, 5, 10, 9]]
    padded = patch_views(
        Layout.anyres(4, (2, 2), (100, 200)),
        torch.tensor([3]),
        (200, 100),
        centred=False,
        crops=True,
        merged=torch.zeros(5, 16, dtype=torch.long),
    )[1]
    assert torch.equal(padded.merged >= 0, padded.read) and len(padded.merged.unique()) == 5


def test_crops_in_an_unknown_order_are_not_sampled():
    layout = Layout.from_ids(torch.arange(12).roll(-4), (2, 2), (2, 1))
    views = patch_views(layout, torch.arange(12), (64, 64), centred=False, crops=False)
    assert [view.name for view in views] == ["whole"]


def test_a_shrunk_canvas_covers_the_image():
    partition = torch.tensor([0, 0, 0, 0, 1, 1, 1, NEWLINE, 1, 1, 1, NEWLINE])
    row = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    column = torch.tensor([0, 1, 0, 1, 0, 1, 2, -1, 0, 1, 2, -1])
    layout = Layout(partition, row, column, (2, 2))
    crops = patch_views(layout, torch.tensor([6, 7]), (300, 200), centred=False, crops=True)[1]
    merged = torch.zeros(2, 4, dtype=torch.long)
    views = patch_views(layout, torch.tensor([6, 7]), (300, 200), centred=False, crops=True, merged=merged)
    assert not views[0].merged.any() and views[1].merged is None
    assert crops.box == (0, 0, 1, 1) and crops.kept.tolist() == [[False, False, True], [False, False, False]]


@pytest.mark.parametrize(("size", "views"), [((64, 64), 0), ((640, 64), 1)])
def test_a_row_of_tokens_is_sampled_on_a_strip_only(size, views):
    found = patch_views(Layout.plain(1, 12), torch.arange(3), size, centred=False, crops=True)
    assert len(found) == views
