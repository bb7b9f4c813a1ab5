"""Costs of calls and of a busy machine, measured on tiny models, and what the benchmarks refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch

from studio import StudioError
from studio.bench import contention as bench_contention
from studio.bench import cost as bench_cost
from studio.bench import models
from studio.decoding.windows import TOKENS_A_CALL
from studio.models import llamagen

TINY = {"dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "grid_size": 4}


def measured(*args, **options):
    return bench_cost.bench_cost(*args, positions=(2, 16), seconds=0, device="cpu", **options)


def test_a_row_for_every_number_of_threads_and_positions(tiny_folder):
    threads = torch.get_num_threads()
    result = measured(str(tiny_folder))
    rows = result["rows"]
    assert [(row["threads"], row["positions"]) for row in rows] == [(n, k) for n in (1, 2) for k in (1, 2, 16)]
    assert all(row["seconds"] > 0 for row in rows) and torch.get_num_threads() == threads
    for step, *calls in (rows[:3], rows[3:]):
        assert step["break_even_tokens"] == 1
        assert all(call["break_even_tokens"] == call["seconds"] / step["seconds"] for call in calls)
    assert (result["device"], result["dtype"], result["sequences"]) == ("cpu", "float32", 2)


def test_the_share_of_the_peak_counts_all_products(monkeypatch):
    monkeypatch.setitem(llamagen.PRESETS, "B", TINY)
    monkeypatch.setattr(
        bench_cost, "least_call_seconds", lambda network, rows, sizes, seconds: dict.fromkeys(sizes, 2.0)
    )
    monkeypatch.setattr(bench_cost, "peak_flops", lambda device, dtype: 1000.0)
    hidden = llamagen.default_ffn_dim(32)
    a_position = 2 * (2 * (4 * 32 * 32 + 3 * 32 * hidden) + 32 * 64)
    shares = [row["peak_share"] for row in measured(preset="llamagen-b", threads=(1,))["rows"]]
    assert shares == [2 * positions * a_position / 2.0 / 1000 for positions in (1, 2, 16)]


def test_a_row_says_what_jacobi_decoding_would_give(monkeypatch):
    monkeypatch.setitem(llamagen.PRESETS, "B", TINY)
    seconds = {1: 1.0, 2: 1.0, 16: 3.0}
    monkeypatch.setattr(bench_cost, "least_call_seconds", lambda *_: seconds)
    step, two, sixteen = measured(preset="llamagen-b", threads=(1,))["rows"]
    assert "jacobi_speedup" not in step
    assert (two["jacobi_tokens"], two["jacobi_speedup"]) == (TOKENS_A_CALL[2], TOKENS_A_CALL[2])
    assert (sixteen["jacobi_tokens"], sixteen["jacobi_speedup"]) == (TOKENS_A_CALL[16], TOKENS_A_CALL[16] / 3)


@pytest.mark.parametrize("name", bench_cost.PRESETS)
def test_random_weights_of_a_published_size(name, monkeypatch):
    monkeypatch.setitem(llamagen.PRESETS, bench_cost.PRESETS[name], TINY)
    result = measured(preset=name, threads=(1,))
    assert result["model"] == name and [row["positions"] for row in result["rows"]] == [1, 2, 16]


def test_a_size_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 2**30)
    with pytest.raises(StudioError, match="llamagen-3b needs 2[0-9].[0-9] GB where 1.0 GB"):
        measured(preset="llamagen-3b")


def test_the_command_refuses_what_it_cannot_time(run):
    for options, words in (
        (("--preset", "llamagen-9b"), "llamagen-xl"),
        (("--preset", "llamagen-b", "--model", "emoji-ar"), "exclude"),
        (("--model", "emoji-mar"), "no LlamaGen"),
    ):
        code, out, err = run("bench", "cost", *options, "--json")
        assert code == 2 and words in json.loads(out)["error"]


def test_contention_is_busy_over_idle(tiny_folder):
    result = bench_contention.bench_contention(str(tiny_folder), rounds=1, images=2)
    assert set(result) == {"idle_seconds", "busy_seconds", "ratio"} and min(result.values()) > 0
    assert result["ratio"] == result["busy_seconds"] / result["idle_seconds"]
    with pytest.raises(StudioError, match="at least one round"):
        bench_contention.bench_contention(str(tiny_folder), rounds=0)


@pytest.mark.alone
def test_a_busy_loop_on_each_core_costs_at_most_three_times(repository):
    """In a process of its own: how long threads spin is decided when torch is first imported."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "studio", "bench", "contention", "--json"]
    done = subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["ratio"] <= 3, (done.stdout, done.stderr)
