"""Filters in both orders, and one random stream per row."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from studio import StudioError
from studio.decoding.sampling import Sampling, exponential_noise, filter_logits, sample_rows


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def logits(rows=3, vocab=40):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 10, 0.9), (1.0, 3, 0.5), (1.5, 100, 0.2), (1.0, 5, 1.0)]
)
def test_lantern_order_is_that_of_transformers(temperature, top_k, top_p):
    expected = logits()
    for warper in (TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), TopKLogitsWarper(top_k)):
        expected = warper(None, expected)
    ours = filter_logits(logits(), temperature=temperature, top_k=top_k, top_p=top_p, order="lantern")
    torch.testing.assert_close(ours, expected)


def test_ties_at_the_last_place_stay():
    kept = filter_logits(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert kept.isfinite().tolist() == [[True, True, True, False]]


def test_rows_draw_from_their_own_stream():
    probabilities = logits().softmax(-1)
    together = sample_rows(probabilities, streams(5, 6, 7))
    alone = [sample_rows(probabilities[row : row + 1], streams(5 + row))[0] for row in range(3)]
    assert together.tolist() == [int(token) for token in alone]


def test_samples_have_the_distribution():
    probabilities = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).repeat(4000, 1)
    noise = torch.empty(4000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    counts = sample_rows(probabilities, noise=noise).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, probabilities[0], atol=0.03, rtol=0)
    assert counts[3] == 0


def test_one_generator_per_row():
    with pytest.raises(StudioError, match="one each"):
        exponential_noise(3, 4, streams(1), "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"order": "none"},
    ],
    ids=str,
)
def test_ranges(wrong):
    with pytest.raises(StudioError):
        Sampling(**wrong)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("order", ["llamagen", "lantern"])
def test_rows_are_filtered_together_as_by_a_sort_of_each(order, ties):
    """Bit by bit, beside a sort of each row with its places."""
    logits = 3 * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    logits = logits.round() if ties else logits
    settings = {"top_k": 60, "top_p": 0.8, "order": order}
    together = filter_logits(logits, **settings)
    for row, filtered in zip(logits, together, strict=True):
        assert torch.equal(filter_logits(row[None], **settings)[0], filtered)
        top_k = row.masked_fill(row < row.sort(descending=True).values[59], float("-inf"))
        row, descending = (top_k, True) if order == "llamagen" else (row, False)
        ordered, places = row.sort(descending=descending)
        cumulative = ordered.softmax(dim=0).cumsum(dim=0)
        if descending:
            expected = row.index_fill(0, places[1:][cumulative[:-1] > 0.8], float("-inf"))
        else:
            expected = row.index_fill(0, places[:-1][cumulative[:-1] <= 1 - 0.8], float("-inf"))
            expected = expected.masked_fill(expected < expected.sort(descending=True).values[59], float("-inf"))
        assert torch.equal(filtered, expected)
