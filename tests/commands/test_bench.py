"""`studio bench`: what it prints, and how it refuses."""

import json

import pytest

from tests.command_results import refused


def test_bench_prints_one_row_a_batch_size(run):
    size = "dim=32,layers=1,heads=2,vocab=64,tokens=16"
    code, out, err = run("bench", "decoding", "--random", size, "--guidance", 4, "--batch", 1, "--batch", 2, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    names = {"dtype", "tokens_per_second", "bound_tokens_per_second", "reference_tokens_per_second", "speedup"}
    assert all(names <= set(row) for row in rows)


def test_bench_verify_prints_both_times(run):
    code, out, err = run("bench", "verify", "--vocab", 64, "--nodes", 8, "--k", 5, "--json")
    assert code == 0, err
    assert set(json.loads(out)) == {"ms", "reference_ms"} and min(json.loads(out).values()) > 0


def test_bench_pruning_names_what_it_does_not_know(run):
    refused(run("bench", "pruning", "--method", "nonsense"), "nonsense", "divprune")
    refused(run("bench", "pruning", "--model", "emoji-vq"), "emoji-vlm")
    refused(run("bench", "pruning", "--figure", "f.svg"), "--figure", "--model")
    refused(run("bench", "pruning", "--model", "emoji-vlm", "--figure", "f.png"), ".svg")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--random", "dim=32", "--quick"], "--quick"),
        (["--random", "dim=32", "--model", "emoji-ar"], "--model"),
        (["--random", "dim=32", "--decoding", "lantern"], "--decoding"),
        (["--decoding", "lantern", "--save"], "--save"),
        (["--guidance", 3], "--random"),
        (["--figure", "rows.png"], ".svg"),
        (["--model", "emoji-vq"], "emoji-vq"),
    ],
    ids=str,
)
def test_bench_refuses_what_does_not_belong_together(run, options, word):
    refused(run("bench", "decoding", *options), word)


@pytest.mark.parametrize("size", ["dim=x", "width=3", "", "dim=32,heads=5"])
def test_bench_refuses_wrong_sizes(run, size):
    refused(run("bench", "decoding", "--random", size))
