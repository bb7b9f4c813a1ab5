"""How much faster selection is than the textbook, on one thread: ratios, best of several."""

import pytest
import torch

from studio.bench.pruning import bench_pruning
from studio.errors import StudioError
from studio.pruning.registry import METHODS

pytestmark = pytest.mark.alone


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "loop"), [((576, 58), 10), ((2880, 288), 25)])
def test_the_loop_of_divprune(one_thread, size, loop):
    row = bench_pruning(methods=["divprune"], sizes=[size], width=64, repeats=5)["rows"][0]
    assert row["identical"] and row["loop_speedup"] >= loop


def test_divprune_end_to_end(one_thread):
    row = bench_pruning(methods=["divprune"], sizes=[(2880, 288)], repeats=3)["rows"][0]
    assert row["identical"] and row["speedup"] >= 1.4


def test_every_method_has_a_row():
    rows = bench_pruning(sizes=[(576, 58), (1728, 100), (2880, 288)], width=16, repeats=1)["rows"]
    assert [row["method"] for row in rows] == [*METHODS] * 3
    assert all(row["seconds"] > 0 for row in rows)
    assert all(row["identical"] in (True, None) for row in rows)


def test_refusals():
    with pytest.raises(StudioError, match="divprune"):
        bench_pruning(methods=["other"])
    for size in ((500, 5), (576, 576), (576, 0)):
        with pytest.raises(StudioError, match="multiple"):
            bench_pruning(sizes=[size])
    with pytest.raises(StudioError, match="quantum"):
        bench_pruning(device="quantum")
