"""Whole answers timed: rows of every place, batch and backend, and models of random weights."""

import json

import pytest

from studio.bench import models, pruning_speed
from studio.bench.pruning_speed import Preset, bench_pruning_speed
from studio.errors import StudioError

TEXT = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 56,
}


@pytest.fixture
def folder(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    return str(tmp_path)


def test_every_place_batch_and_backend(folder):
    given = dict(batches=(1, 3), attentions=("sdpa", "eager"), keeps=(0.1,), new_tokens=4, repeats=1)
    result = bench_pruning_speed(folder, methods=("uniform", "kv-h2o", "kv-ems"), **given)
    rows = {(row["attention"], row["batch"], row["method"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * 4 and not result["left_out"]
    for (attention, batch, method), row in rows.items():
        whole, alone = rows[attention, batch, "none"], rows[attention, 1, method]
        assert row["kept_tokens"] == round((1.0 if method == "none" else 0.1) * whole["image_tokens"])
        assert row["cache_bytes"] == sum(row["layer_bytes"]) == batch * alone["cache_bytes"]
        assert row["layer_bytes"] == [batch * each for each in alone["layer_bytes"]]
        assert row["total"] > row["prefill"] > 0 and row["per_token"] > 0 and row["peak_bytes"] is None
        assert row["speedup"] == pytest.approx(whole["total"] / row["total"])
    behind = bench_pruning_speed(folder, methods=("fastv", "uniform"), after_layer=1, **{**given, "batches": (1,)})
    none, uniform = (rows["sdpa", 1, method]["layer_bytes"] for method in ("none", "uniform"))
    fastv = behind["rows"][1]["layer_bytes"]
    assert behind["rows"][2]["layer_bytes"] == fastv
    assert max(uniform) < 0.3 * none[0] and rows["sdpa", 1, "kv-h2o"]["layer_bytes"] == uniform
    assert fastv[0] == none[0] and fastv[-1] == uniform[-1]


def test_random_weights_of_a_size(monkeypatch):
    shape = {"vision_config": TOWER, "text_config": TEXT}
    pixels = pruning_speed.PRESETS["llava-1.5-7b"].pixels
    monkeypatch.setitem(pruning_speed.PRESETS, "tiny", Preset("Llava", shape, 36, pixels))
    result = bench_pruning_speed(random="tiny", methods=("divprune", "kv-h2o"), new_tokens=3, repeats=1, device="cpu")
    assert [row["kept_tokens"] for row in result["rows"]] == [36, 7, 7] and result["dtype"] == "float32"
    monkeypatch.setattr(models, "free_bytes", lambda device: 1000)
    with pytest.raises(StudioError, match="tiny needs .* GB where"):
        bench_pruning_speed(random="tiny", device="cpu")


def test_what_cannot_run_is_said(folder, monkeypatch):
    result = bench_pruning_speed(folder, methods=("hired", "cdpruner"), new_tokens=2, repeats=1)
    assert not result["left_out"] and len(result["rows"]) == 3
    result = bench_pruning_speed(folder, methods=("fastv", "uniform"), new_tokens=2, repeats=1)
    assert [row["method"] for row in result["rows"]] == ["none", "uniform"]
    assert "after_layer is a layer from 1 to 1" in result["left_out"]["fastv, sdpa"]
    with pytest.raises(StudioError, match="flash attention cannot be used here"):
        bench_pruning_speed(folder, attentions=("flash",))
    for wrong, words in (
        ({"random": "gpt"}, "choose one of smolvlm-256m"),
        ({"methods": ("kv-divprune",)}, "kv-coverage"),
        ({"methods": ("vscan",)}, "inside the language model"),
        ({"batches": (0,)}, "batch"),
        ({"new_tokens": 1}, "new_tokens"),
        ({"attentions": ("paged",)}, "sdpa, eager"),
    ):
        with pytest.raises(StudioError, match=words):
            bench_pruning_speed(folder, **wrong)


def test_the_command(run, folder):
    call = "--batch 2 --method uniform --keep 0.1 --new-tokens 2 --repeats 1".split()
    code, out, err = run("bench", "pruning", "--model", folder, *call, "--json")
    assert code == 0 and [row["batch"] for row in json.loads(out)["rows"]] == [2, 2], err
    code, out, err = run("bench", "pruning", "--model", folder, *call)
    assert code == 0 and "per_token" in out, err
    for wrong, words in (
        (["--batch", 1, "--scenes", 3], "--scenes"),
        (["--random", "smolvlm-256m", "--model", folder], "exclude"),
        (["--repeats", 3], "--batch"),
    ):
        code, out, err = run("bench", "pruning", *wrong)
        assert code == 2 and words in err
