"""`auto`: the fastest decoding that loses no more than is allowed."""

import pytest
import torch

from studio import StudioError
from studio.checkpoints.measured import fastest, fingerprint, read_measured, save_measured


def row(decoding, seconds, top1, batch=1, dtype="float32", **settings):
    return {
        "decoding": decoding,
        "settings": settings,
        "batch": batch,
        "dtype": dtype,
        "seconds_per_image": seconds,
        "speedup": 1.0 / seconds,
        "judge_top1": top1,
    }


ROWS = [
    row("ar", 1.0, 0.60),
    row("speculative", 0.8, 0.52),
    row("lantern", 0.6, 0.58, delta=0.1),
    row("lantern", 0.5, 0.55, delta=0.4),
    row("distilled", 0.1, 0.30),
    row("ar", 0.3, 0.60, batch=8),
    row("lantern", 0.4, 0.58, batch=8, delta=0.1),
]


@pytest.mark.parametrize(
    ("pictures", "tolerance", "seconds"),
    [(1, 0.0, 0.8), (1, 0.03, 0.6), (1, 0.05, 0.5), (2, 1.0, 0.1), (8, 0.05, 0.3), (100, 0.05, 0.3)],
)
def test_fastest(pictures, tolerance, seconds):
    assert fastest(ROWS, pictures, "float32", tolerance)["seconds_per_image"] == seconds


def test_what_nobody_judged_is_no_choice_unless_it_is_lossless():
    rows = [row("ar", 1.0, None), row("speculative", 0.9, None), row("lantern", 0.5, None, delta=0.1)]
    assert fastest(rows, 1, "float32", 1.0)["decoding"] == "speculative"
    rows = [row("mar", 1.0, 0.6), row("cspd", 0.7, 0.5, mode="exact"), row("cspd", 0.5, 0.5, mode="relaxed")]
    assert fastest(rows, 1, "float32", 0.01)["seconds_per_image"] == 0.7


def test_refusals():
    with pytest.raises(StudioError, match="tolerance"):
        fastest(ROWS, 1, "float32", 1.5)
    with pytest.raises(StudioError, match="bfloat16"):
        fastest(ROWS, 1, "bfloat16", 0.1)
    with pytest.raises(StudioError, match="no folder with weights"):
        fingerprint("nowhere")


def test_rows_are_kept_for_these_weights_and_this_device(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"one")
    place = torch.device("cpu")
    assert read_measured(str(model), place) is None
    save_measured(str(model), place, ROWS)
    assert read_measured(str(model), place) == ROWS
    assert read_measured(str(model), torch.device("cuda")) is None
    (model / "weights.safetensors").write_bytes(b"two")
    assert read_measured(str(model), place) is None
