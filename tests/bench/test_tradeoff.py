"""Quality over speed: the rows of a short run, and where their quality comes from."""

import json

import pytest

import studio
from studio import StudioError
from studio.bench import tradeoff as bench
from studio.bench.tradeoff import tradeoff_chart, tradeoff_table
from studio.checkpoints.measured import fingerprint

FIELD = [bench.Contender("ar"), bench.Contender("lantern", {"delta": 0.2, "k": 100})]


@pytest.fixture(scope="module")
def length():
    """The tokens of an image of emoji-ar."""
    return studio.load("emoji-ar", device="cpu").transformer.num_tokens


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Writes the record of a full run whose quality tells its settings apart."""
    monkeypatch.setattr(bench, "contenders", lambda pipe: FIELD)
    monkeypatch.setattr(bench, "COMMITTED", tmp_path)
    (tmp_path / "of-others.json").write_text(json.dumps({"fingerprint": "1" * 64, "rows": []}))

    def write(mark, field=FIELD):
        rows = [
            {"decoding": each.decoding, "settings": each.settings, "dtype": "float32", "judge_top1": 0.5 + number / 10}
            | {"frechet": 3.0 + number, "quality_samples": 500}
            for number, each in enumerate(field)
        ]
        (tmp_path / "of-these.json").write_text(json.dumps({"fingerprint": mark, "rows": rows}))

    return write


def test_quick_rows(recorded, length):
    recorded(fingerprint("emoji-ar"))
    result = bench.bench_tradeoff("emoji-ar", quick=True, batch_sizes=(1, 2), device="cpu", repeats=1, images=2)
    rows = result["rows"]
    assert [(row["decoding"], row["batch"]) for row in rows] == [("ar", 1), ("lantern", 1), ("ar", 2), ("lantern", 2)]
    assert [row["judge_top1"] for row in rows] == [0.5, 0.6, 0.5, 0.6]
    for base, row in (rows[:2], rows[2:]):
        assert base["speedup"] == 1 and base["target_calls"] == length and "nodes" not in base
        assert row["speedup"] == pytest.approx(base["seconds_per_image"] / row["seconds_per_image"])
        assert row["target_calls"] < length < row["target_calls"] * row["mean_accepted_length"] * 1.2
        assert row["break_even_length"] == pytest.approx(row["verify_ratio"] + row["draft_ratio"])
        assert 0 < row["memory_bound_seconds"] < row["seconds_per_image"]
    assert result["left_out"] == {}
    assert tradeoff_table(rows).count("\n") == 5
    assert "δ 0.2" in tradeoff_chart(rows)


def test_what_a_pipeline_lacks_is_left_out(recorded, tiny_folder, monkeypatch):
    monkeypatch.setattr(bench, "contenders", lambda pipe: FIELD[:1])
    recorded(fingerprint(tiny_folder))
    result = bench.bench_tradeoff(str(tiny_folder), quick=True, batch_sizes=(1,), device="cpu", repeats=1, images=1)
    assert result["left_out"] == {"distilled": "the pipeline has no student"} and len(result["rows"]) == 1


def test_some_decodings_are_timed_beside_plain_decoding(tiny_folder):
    options = {"batch_sizes": (1,), "device": "cpu", "repeats": 1, "images": 1, "quality_samples": 65}
    result = bench.bench_tradeoff(str(tiny_folder), only=("lantern++",), **options)
    assert [row["decoding"] for row in result["rows"]] == ["ar", "lantern++", "lantern++"]
    assert result["left_out"] == {}
    with pytest.raises(StudioError, match="no decoding 'distilled'.*ar, jacobi, speculative, lantern"):
        bench.bench_tradeoff(str(tiny_folder), only=("distilled",), **options)


def test_jacobi_decoding_has_the_quality_of_plain_decoding_in_float32(recorded, length, monkeypatch):
    field = [
        bench.Contender("ar"),
        bench.Contender("jacobi", {"window": 4}),
        bench.Contender("lantern", {"delta": 0.2, "k": 100, "drafts": "jacobi"}),
    ]
    recorded(fingerprint("emoji-ar"), [field[0], field[2]])
    monkeypatch.setattr(bench, "contenders", lambda pipe: field)
    call = {"quick": True, "batch_sizes": (1,), "device": "cpu", "repeats": 1, "images": 2}
    plain, ours, relaxed = bench.bench_tradeoff("emoji-ar", **call)["rows"]
    assert plain["judge_top1"] == ours["judge_top1"] == 0.5 and relaxed["judge_top1"] == 0.6
    assert ours["nodes"] == 4 and relaxed["nodes"] == 3 and "nodes" not in plain
    assert ours["target_calls"] < 0.8 * length and relaxed["target_calls"] < 0.8 * length
    recorded(fingerprint("emoji-ar"), [field[0]])
    monkeypatch.setattr(bench, "contenders", lambda pipe: [field[0], bench.Contender("jacobi", {"coupling": "none"})])
    with pytest.raises(StudioError, match="No quality is recorded for jacobi"):
        bench.bench_tradeoff("emoji-ar", **call)


def test_quality_of_other_weights_or_settings_is_an_error(recorded):
    with pytest.raises(StudioError, match="other weights"):
        bench.bench_tradeoff("emoji-ar", quick=True, device="cpu")
    recorded("0" * 64)
    with pytest.raises(StudioError, match="other weights"):
        bench.bench_tradeoff("emoji-ar", quick=True, device="cpu")
    recorded(fingerprint("emoji-ar"), FIELD[:1])
    with pytest.raises(StudioError, match="No quality is recorded for lantern"):
        bench.bench_tradeoff("emoji-ar", quick=True, device="cpu")


def test_only_pipelines_that_draw_tokens_from_words():
    with pytest.raises(StudioError, match="emoji-vq is not text-conditional"):
        bench.bench_tradeoff("emoji-vq", device="cpu")


def test_rows_name_where_their_drafts_come_from():
    row = {"settings": {"delta": 0.1, "k": 1000, "drafts": "jacobi"}}
    assert bench._setting(row) == "δ 0.1 over jacobi" and bench._setting({"settings": {"delta": 0.1}}) == "δ 0.1"
    assert bench._setting({"settings": {"drafts": "own"}}) == "over the drafter"
