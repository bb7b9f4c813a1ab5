"""The benchmark's rows at a tiny size."""

import pytest

from studio import StudioError
from studio.bench.decoding import _MOST, bench_decoding, bench_random_decoding
from studio.bench.models import parse_sizes

TINY = "dim=32,layers=1,heads=2,vocab=32,tokens=16"


def test_rows():
    rows = bench_decoding(random=TINY, batch_sizes=[1, 2], dtypes=["float32"], device="cpu")["rows"]
    assert [(row["batch"], row["dtype"]) for row in rows] == [(1, "float32"), (2, "float32")]
    for row in rows:
        assert row["identical_tokens"]
        assert min(row[f"{part}tokens_per_second"] for part in ("", "bound_", "reference_")) > 0
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["reference_tokens_per_second"])


def test_bfloat16_row():
    assert bench_decoding(random=TINY, dtypes=["bf16"], device="cpu")["rows"][0]["dtype"] == "bfloat16"


def test_sizes():
    assert parse_sizes("dim=384, layers=8", _MOST) == {"dim": 384, "layers": 8}
    for wrong in ("dim", "dim=x", "width=3"):
        with pytest.raises(StudioError, match="sizes"):
            parse_sizes(wrong, _MOST)
    for wrong in ("dim=0", "layers=257", "vocab=99999999999"):
        with pytest.raises(StudioError, match="must be a whole number from 1 to"):
            parse_sizes(wrong, _MOST)
    with pytest.raises(StudioError, match="GB of memory are free"):
        bench_decoding(random="dim=16384,layers=256,heads=1", device="cpu")
    with pytest.raises(StudioError, match="vocab"):
        bench_random_decoding(vocab=10**400)
    with pytest.raises(StudioError, match="square"):
        bench_decoding(random="dim=32,heads=2,tokens=15", device="cpu")
    with pytest.raises(StudioError, match="guidance"):
        bench_decoding(random=TINY, guidance_scale=-1, device="cpu")
    with pytest.raises(StudioError, match="quantum"):
        bench_decoding(random=TINY, device="quantum")
    with pytest.raises(StudioError, match="dtype"):
        bench_decoding(random=TINY, dtypes=["float8"], device="cpu")
