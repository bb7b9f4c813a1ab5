"""The table of tokenizers, with tiny real ones."""

import json

import pytest
import torch

from studio import OneDPieceTokenizer, StudioError, TokenBridgeTokenizer, cli
from studio.bench.tokenizers import bench_tokenizers, variants
from studio.checkpoints.bundled import bundled_names
from studio.evaluation.robustness import Perturbation
from studio.tokenizers.kl import KLTokenizer
from tests.evaluation import test_robustness as wrong_tokens

GRID = (Perturbation(0.0, 1), Perturbation(1.0, 8))


def saved(folder, name):
    wrong_tokens.made(name).save_pretrained(folder / name)
    return str(folder / name)


def test_rows_of_a_tokenizer_with_levels(tmp_path):
    table = bench_tokenizers([saved(tmp_path, "rvq")], samples=70, grid=GRID, device="cpu")
    assert [row["variant"] for row in table["rows"]] == ["depth 1", "depth 2", "depth 3"]
    assert [row["tokens"] for row in table["rows"]] == [64, 128, 192]
    assert [row["bits"] for row in table["rows"]] == [256.0, 512.0, 768.0]
    assert table["samples"] == 70 and table["perturbations"] == [{"alpha": 0.0, "delta": 1}, {"alpha": 1.0, "delta": 8}]
    for row in table["rows"]:
        clean, wrong = row["robustness_by_setting"]
        assert clean["frechet"] == pytest.approx(row["frechet"], rel=1e-3) and wrong["frechet"] != clean["frechet"]
        assert row["robustness"] == pytest.approx((clean["frechet"] + wrong["frechet"]) / 2)
        assert row["resolution"] == 16 and row["encode_per_second"] > 0 and row["decode_per_second"] > 0
        assert 0 < row["psnr"] < 30 and -1 <= row["ssim"] <= 1


def test_a_continuous_tokenizer_has_rows_of_token_bridge(tmp_path, capfd):
    torch.manual_seed(0)
    network = {"autoencoder": wrong_tokens.AUTOENCODER, "scaling_factor": 1.0, "sample_size": 16}
    KLTokenizer(**network).network.save_pretrained(tmp_path / "kl")
    command = ["bench", "tokenizers", "--model", str(tmp_path / "kl"), "--samples", "70", "--perturbation", "0.5:8"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--device", "cpu", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    continuous, *bridges = json.loads(out)["rows"]
    assert continuous["variant"] == "continuous" and continuous["bits"] is None and continuous["robustness"] is None
    assert [row["variant"] for row in bridges] == ["8 levels", "16 levels", "32 levels", "64 levels"]
    assert [row["bits"] / row["tokens"] for row in bridges] == [3, 4, 5, 6]
    assert {row["tokens"] for row in bridges} == {continuous["tokens"]}
    gaps = [abs(row["psnr"] - continuous["psnr"]) for row in bridges]
    assert gaps[-1] < 0.1 and max(gaps) == gaps[0]


def test_what_is_measured_of_each_kind(tiny_vq, tiny_one_d):
    assert variants(tiny_vq) == [(tiny_vq, [("", {})])]
    assert isinstance(tiny_one_d, OneDPieceTokenizer)
    [(_, settings)] = variants(tiny_one_d)
    assert [how["length"] for _, how in settings] == [1, 3, 6]
    bridge = TokenBridgeTokenizer({"autoencoder": wrong_tokens.AUTOENCODER}, levels=10, sample_size=16)
    assert [name for _, [(name, _)] in variants(bridge)] == [f"{n} levels" for n in (8, 10, 16, 32, 64)]
    assert "emoji-vq" in bundled_names("tokenizer") and "emoji-ar" not in bundled_names("tokenizer")


def test_refused(tiny_folder):
    with pytest.raises(StudioError, match="no tokenizer"):
        bench_tokenizers([str(tiny_folder)], device="cpu")
    with pytest.raises(StudioError, match="held-out images"):
        bench_tokenizers(["emoji-vq"], samples=10**6)
    with pytest.raises(StudioError, match="at least once"):
        bench_tokenizers(["emoji-vq"], grid=())


def test_a_perturbation_that_is_none_is_one_sentence(capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "tokenizers", "--perturbation", "much"])
    assert stopped.value.code == 2 and "ALPHA:DELTA" in capfd.readouterr().err
