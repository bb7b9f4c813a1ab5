"""What pruning buys a reader: rows that agree with the pipeline and the evaluation, and the words of the table."""

import xml.etree.ElementTree as tree

import pytest

from studio.bench.reading import PHASES, bench_reading, reading_chart, reading_table
from studio.errors import StudioError
from studio.evaluation.scenes import evaluate_reader, interval
from studio.pruning.quecc import FOLDER, Compressor


@pytest.fixture(scope="module")
def measured(tiny_reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    for part in tiny_reader:
        part.save_pretrained(folder)
    return bench_reading(
        str(folder), methods=("random", "divprune"), keeps=(0.5, 0.1), scenes=2, images=2, repeats=1,
        tiles=(1, 1),
    )  # fmt: skip


def test_rows(measured, tiny_reader):
    rows = {(row["method"], row["keep"]): row for row in measured["rows"]}
    assert list(rows)[0] == ("none", 1.0) and len(rows) == 5
    whole, tenth = rows["none", 1.0], rows["divprune", 0.1]
    assert whole["kept_tokens"] == whole["visual_tokens"] and whole["speedup"] == 1 and not whole["faster"]
    for method in ("random", "divprune"):
        assert rows[method, 0.1]["kept_tokens"] == pytest.approx(0.1 * whole["visual_tokens"], abs=1)
    assert tenth["cache_bytes"] < 0.2 * whole["cache_bytes"]
    assert all(row[phase] >= 0 for row in measured["rows"] for phase in PHASES)
    accuracy = evaluate_reader(*tiny_reader, scenes=2, methods=("random", "divprune"), keeps=(0.5, 0.1), tiles=(1, 1))
    assert all(row["accuracy"] == accuracy["accuracy"][method][str(keep)] for (method, keep), row in rows.items())
    assert rows["random", 0.5]["better_than_random"] is None
    assert tenth["better_than_random"] is (tenth["accuracy"] > rows["random", 0.1]["accuracy"])


def test_rows_behind_a_layer(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    given = dict(keeps=(1.0, 0.1), scenes=1, images=1, repeats=1, tiles=(1, 1))
    result = bench_reading(str(tmp_path), methods=("fastv", "vscan", "random"), after_layer=1, **given)
    rows = {(row["method"], row["keep"]): row for row in result["rows"]}
    whole, tenth = rows["none", 1.0], rows["fastv", 0.1]
    assert len(rows) == 7 and all(rows[method, 1.0]["accuracy"] == whole["accuracy"] for method in ("fastv", "vscan"))
    assert tenth["kept_tokens"] == rows["vscan", 0.1]["kept_tokens"] == round(0.1 * whole["visual_tokens"])
    assert 0.4 * whole["cache_bytes"] < tenth["cache_bytes"] < whole["cache_bytes"]


def test_rows_of_a_merging_tower(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    result = bench_reading(
        str(tmp_path), methods=("divprune",), keeps=(0.5,), merges=(1, (2,), "2", "diffrate:2+1"), scenes=1, images=1,
        repeats=1, tiles=(1, 1),
    )  # fmt: skip
    rows = {(row["method"], row["keep"]): row for row in result["rows"]}
    assert list(rows) == [("none", 1.0), ("tome 1", 1.0), ("tome 2", 1.0), ("diffrate 2+1", 1.0), ("divprune", 0.5)]
    for name in ("tome 1", "tome 2", "diffrate 2+1"):
        assert rows[name, 1.0]["kept_tokens"] == rows["none", 1.0]["visual_tokens"]
        assert rows[name, 1.0]["better_than_random"] is None


def test_rows_of_a_compressor(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    Compressor.for_reader(tiny_reader[0], tokens=(1, 16)).save_pretrained(tmp_path / FOLDER)
    result = bench_reading(str(tmp_path), methods=("random",), keeps=(0.5,), merges=(1,), scenes=1, images=1, repeats=1)
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["none", "tome 1", "quecc", "quecc", "random"]
    assert [row["kept_tokens"] for row in rows[2:4]] == [1, 16] and rows[2]["visual_tokens"] == 744
    assert rows[2]["cache_bytes"] < rows[3]["cache_bytes"] < 0.1 * rows[0]["cache_bytes"]
    assert "| quecc | 0.0215 | 16 of 744 |" in reading_table(rows)


def test_rows_of_every_place(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    given = dict(keeps=(1.0, 0.1), scenes=1, images=1, repeats=1, tiles=(1, 1))
    result = bench_reading(str(tmp_path), methods=("mmtok", "scope", "kv-h2o"), **given)
    rows = {(row["method"], row["keep"]): row for row in result["rows"]}
    whole = rows["none", 1.0]
    assert len(rows) == 7 and all(rows[m, 1.0]["accuracy"] == whole["accuracy"] for m in ("mmtok", "scope", "kv-h2o"))
    for row in rows.values():
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["kept_tokens"] == (
            whole["visual_tokens"] if row["keep"] == 1 else round(0.1 * whole["visual_tokens"])
        )
        spent = row["prefill"] + row["decode"] if row["method"] == "kv-h2o" else row["total"]
        assert row["further"] == pytest.approx(spent)
    assert rows["kv-h2o", 0.1]["cache_bytes"] < 0.2 * rows["kv-h2o", 1.0]["cache_bytes"]
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 20)[0] == pytest.approx(0, abs=1e-12)


def test_the_table_says_what_does_not_pay(measured):
    rows = [dict(row, faster=True, better_than_random=True) for row in measured["rows"]]
    assert "not" not in reading_table(rows)
    rows[-1] |= {"faster": False, "better_than_random": False}
    assert reading_table(rows).splitlines()[-1].endswith("| not faster, not better than random |")
    root = tree.fromstring(reading_chart(rows))
    assert {"all tokens", "random", "divprune"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}


def test_refusals(tiny_folder):
    with pytest.raises(StudioError, match="emoji-vlm"):
        bench_reading(str(tiny_folder))
    with pytest.raises(StudioError, match="divprune"):
        bench_reading(methods=("other",))
    with pytest.raises(StudioError, match="diffrate:36"):
        bench_reading("no folder", merges=("half",))
    with pytest.raises(StudioError, match="kv-coverage"):
        bench_reading(methods=("kv-divprune",))
