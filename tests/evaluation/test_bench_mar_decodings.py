"""`studio bench decoding --model` of a MAR: a row for plain drawing and one for each mode with its drafter."""

from studio.evaluation import bench_tradeoff as bench
from studio.evaluation.tradeoff_figure import tradeoff_table


def test_rows(tiny_mar_folder, monkeypatch):
    judged = {"judge_top1": 0.1, "frechet": 1.0, "quality_samples": 0}
    monkeypatch.setattr(bench, "_quality", lambda *_: judged)
    result = bench.bench_tradeoff(str(tiny_mar_folder), batch_sizes=(1,), device="cpu", repeats=1, pictures=2)
    rows = result["rows"]
    named = [(row["decoding"], row["settings"].get("mode")) for row in rows]
    assert named == [("mar", None), ("cspd", "exact"), ("cspd", "relaxed")] and result["left_out"] == {}
    assert rows[0]["speedup"] == 1 and rows[0]["target_calls"] == 4 and rows[2]["target_calls"] < 4
    assert [row.get("approximate", False) for row in rows] == [False, False, True]
    assert tradeoff_table(rows).count("approximate") == 1


def test_without_a_drafter(tiny_mar_pipeline):
    from studio import MARPipeline

    alone = MARPipeline(**{**tiny_mar_pipeline.components, "drafter": None})
    assert [each.decoding for each in bench.contenders(alone)] == ["mar"]
