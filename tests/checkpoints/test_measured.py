"""`auto`: the fastest decoding that loses no more than is allowed."""

import json

import pytest
import torch

from studio import StudioError
from studio.bench.tradeoff import COMMITTED
from studio.checkpoints import measured
from studio.checkpoints.bundled import Bundled
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
    ("images", "tolerance", "seconds"),
    [(1, 0.0, 0.8), (1, 0.03, 0.6), (1, 0.05, 0.5), (2, 1.0, 0.1), (8, 0.05, 0.3), (100, 0.05, 0.3)],
)
def test_fastest(images, tolerance, seconds):
    assert fastest(ROWS, images, "float32", tolerance)["seconds_per_image"] == seconds


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


def test_a_model_is_marked_by_what_it_samples_with_alone(tmp_path, monkeypatch):
    """Of another's folder only the parts that it lacks: not that one's transformer, nor its drafter."""
    folders = {"tiny": ["transformer"], "whole": ["transformer", "text_encoder", "drafter"], "codes": ["."]}
    for name, parts in folders.items():
        for part in parts:
            (tmp_path / name / part).mkdir(parents=True)
            (tmp_path / name / part / "model.safetensors").write_bytes(f"{name} {part}".encode())
    index = {"transformer": [], "text_encoder": [], "image_tokenizer": []}
    (tmp_path / "tiny" / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(measured, "bundled_folder", tmp_path.joinpath)
    monkeypatch.setattr(measured, "BUNDLED", {"tiny": Bundled("pipeline", "", shares=("whole", "codes"))})
    before, changes = fingerprint("tiny"), {}
    for file in sorted(tmp_path.rglob("*.safetensors")):
        kept = file.read_bytes()
        file.write_bytes(b"other")
        changes[str(file.parent.relative_to(tmp_path))] = fingerprint("tiny") != before
        file.write_bytes(kept)
    assert changes == {
        "codes": True, "tiny/transformer": True, "whole/text_encoder": True, "whole/drafter": False,
        "whole/transformer": False,
    }  # fmt: skip


@pytest.mark.parametrize("file", sorted(COMMITTED.glob("*.json")), ids=lambda file: file.stem)
def test_recorded_quality_is_of_the_bundled_weights(file):
    recorded = json.loads(file.read_text())
    assert recorded["fingerprint"] == fingerprint(recorded["model"])
