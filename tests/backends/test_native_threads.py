"""Threads of a compiled call share it without a change of a bit, and never wait long for one that does not run."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from studio.backends import cpu_c, native_library
from studio.backends.cpu_c import NativeLlamaGen
from studio.models.llamagen import LlamaGen

SIZES = {"vocab_size": 1000, "dim": 144, "num_heads": 3, "num_layers": 4, "ffn_dim": 392, "grid_size": 8}
FORKED = """
import os, signal, sys, torch
from studio.backends.cpu_c import NativeProduct
torch.set_num_threads(2)
product, x = NativeProduct(torch.randn(2048, 1024)), torch.randn(2, 1024)
expected = product(x)
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if torch.equal(product(x), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ONE_CORE = """
import os, time, torch
from studio.backends.cpu_c import NativeProduct
product, x = NativeProduct(torch.randn(2048, 2048)), torch.randn(2, 2048)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def seconds(threads):
    torch.set_num_threads(threads)
    began = time.perf_counter()
    for _ in range(50):
        product(x)
    return time.perf_counter() - began
seconds(2)
one, two = (min(seconds(threads) for _ in range(5)) for threads in (1, 2))
print(two / one)
"""


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaGen(**SIZES, num_classes=10).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.bfloat16().float()


@torch.no_grad()
def logits_of(network, rows, nodes):
    """Logits of chains of tokens behind a prefix of 20 positions."""
    generator = torch.Generator().manual_seed(rows * 100 + nodes)
    cache = network.new_tree_cache(rows, nodes)
    network.prefill_states(torch.randn(rows, 20, SIZES["dim"], generator=generator), None, cache)
    cache.keep_all()
    tokens = torch.randint(SIZES["vocab_size"], (rows, nodes), generator=generator)
    visible = torch.ones(rows, nodes, nodes).tril().bool()
    return network.logits(network.extend_tree(tokens, cache, torch.arange(20, 20 + nodes).expand(rows, nodes), visible))


CALLS = [(1, 1), (2, 1), (3, 1), (2, 2), (1, 5), (2, 3), (1, 7), (2, 4), (3, 3), (2, 5), (1, 11), (2, 6), (3, 9)]


def test_threads_change_no_bit(model, threads):
    network = NativeLlamaGen(model)
    for rows, nodes in CALLS:
        threads(1)
        alone = logits_of(network, rows, nodes)
        for count in (2, 3, 7):
            threads(count)
            assert torch.equal(logits_of(network, rows, nodes), alone)


def test_the_width_of_vectors_changes_no_bit(model, monkeypatch, tmp_path):
    """The library for this processor beside one without its widest vectors, in both ways to store weights."""
    made = tmp_path / "narrow.so"
    flags = [*native_library.FLAGS, *(["-mno-avx512f"] if platform.machine() == "x86_64" else [])]
    source = str(native_library.SOURCES[0])
    subprocess.run(["cc", *flags, source, "-o", str(made), "-lm"], check=True, capture_output=True)
    narrow = native_library._declared(made)
    assert narrow.studio_lanes() == 8
    odd = LlamaGen(**SIZES, num_classes=10).eval()
    for network in (model, odd):
        torch.nn.init.normal_(network.output.weight, std=0.1)
        wide = NativeLlamaGen(network)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_c, "library", lambda: narrow)
            other = NativeLlamaGen(network)
        for rows, nodes in CALLS:
            assert torch.equal(logits_of(wide, rows, nodes), logits_of(other, rows, nodes))


def test_calls_from_several_sides_at_once(model, threads):
    network = NativeLlamaGen(model)
    threads(2)
    expected = [logits_of(network, *call) for call in CALLS]

    def ask(index):
        threads(2)
        return torch.equal(logits_of(network, *CALLS[index]), expected[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, [*range(len(CALLS))] * 20))


def test_a_forked_process_goes_on_without_the_threads(repository):
    assert subprocess.run([sys.executable, "-c", FORKED], cwd=repository, timeout=120).returncode == 0


@pytest.mark.alone
def test_two_threads_on_one_core_cost_no_more_than_twice_one(repository):
    """A thread that spun for the other one would hold the core for whole time slices."""
    done = subprocess.run([sys.executable, "-c", ONE_CORE], cwd=repository, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2
