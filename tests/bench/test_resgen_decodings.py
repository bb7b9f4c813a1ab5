"""`studio bench decoding --model` of a ResGen: its own settings, and both orders at several calls."""

from studio.bench import tradeoff as bench
from studio.bench.tradeoff import tradeoff_table
from studio.checkpoints.measured import fastest


def test_rows(tiny_resgen_folder, monkeypatch):
    top1 = {None: 0.5, 4: 0.3, 8: 0.49, 32: 0.5}
    monkeypatch.setattr(
        bench,
        "_quality",
        lambda pipe, each, samples, _: {
            "judge_top1": top1[each.settings.get("steps")], "frechet": 1.0, "quality_samples": samples
        },
    )  # fmt: skip
    result = bench.bench_tradeoff(str(tiny_resgen_folder), batch_sizes=(1,), device="cpu", repeats=1, images=2)
    rows = result["rows"]
    assert [(row["decoding"], row["settings"].get("steps")) for row in rows] == [
        ("resgen", None), *((name, steps) for name in ("resgen", "first-hitting") for steps in (4, 8, 32))
    ]  # fmt: skip
    assert rows[0]["speedup"] == 1 and [row["target_calls"] for row in rows] == [4, 4, 8, 32, 4, 8, 32]
    assert result["left_out"] == {} and tradeoff_table(rows).count("steps 8") == 2
    slowed = [{**row, "seconds_per_image": seconds} for row, seconds in zip(rows, (3, 1, 2, 9, 1, 2.5, 9))]
    assert fastest(slowed, 1, "float32", 0.03)["settings"] == {"steps": 8}
