"""Where packed tokens come from."""

import torch

from studio.pruning.layout import Layout


def test_published_lengths():
    assert len(Layout.anyres(24, (2, 2), (672, 672))) == 2928
    assert len(Layout.anyres(24, (2, 2), (640, 600))) == 2832


def test_ids_come_back():
    layout = Layout.anyres(4, (2, 2), (30, 40))
    again = Layout.from_ids(layout.ids, layout.size, layout.grid)
    for name in ("partition", "row", "column"):
        assert torch.equal(getattr(again, name), getattr(layout, name))
    assert torch.equal(layout.ids[:16], torch.arange(16))


def test_places_are_those_of_the_canvas():
    layout = Layout.anyres(4, (2, 2), (30, 40))
    crops = layout.partition > 0
    assert layout.row[crops].min() == 1 and layout.row[crops].max() == 6
    expected = 1 + layout.row[crops] // 4 * 2 + layout.column[crops] // 4
    assert torch.equal(layout.partition[crops], expected)


def test_newlines_end_the_rows_of_crops_only():
    layout = Layout.anyres(4, (1, 2), (40, 80))
    assert layout.newlines.tolist() == [16 + 9 * row + 8 for row in range(4)]
    assert (layout.newline_of[:16] == -1).all()
    assert (layout.newline_of[16:24] == 24).all()
    assert torch.equal(layout.row[layout.newlines], torch.arange(4))


def test_a_single_newline_belongs_to_the_whole_image():
    layout = Layout.from_ids(torch.tensor([0, 1, 2, 3, -1]), (2, 2))
    assert layout.newline_of.tolist() == [4, 4, 4, 4, -1]
