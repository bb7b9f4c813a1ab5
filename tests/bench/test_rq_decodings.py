"""`studio bench decoding --model` of an RQ-Transformer, which is sampled in one way only."""

from studio.bench import tradeoff as bench
from studio.bench.tradeoff import tradeoff_chart, tradeoff_table


def test_rows(tiny_rq_folder, monkeypatch):
    judged = {"judge_top1": 0.5, "frechet": 1.0, "quality_samples": 65}
    monkeypatch.setattr(bench, "_quality", lambda *_: judged)
    result = bench.bench_tradeoff(str(tiny_rq_folder), batch_sizes=(1,), device="cpu", repeats=1, images=2)
    [row] = result["rows"]
    assert (row["decoding"], row["settings"], row["speedup"], row["target_calls"]) == ("rq", {}, 1, 16)
    assert row["judge_top1"] == 0.5 and result["left_out"] == {}
    assert len(tradeoff_table(result["rows"]).splitlines()) == 3
    assert tradeoff_chart(result["rows"], 1).startswith("<svg")
