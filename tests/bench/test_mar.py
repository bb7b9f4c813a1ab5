"""The benchmark of masked autoregressive sampling at a tiny size."""

import json

import pytest

from studio import StudioError, cli
from studio.bench.mar import _MOST, bench_mar
from studio.bench.models import parse_sizes

TINY = "dim=16,depth=1,heads=2,head_width=16,head_depth=1,tokens=4,steps=2,diffusion_steps=3"


def test_command_prints_both_times(capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "mar", "--random", TINY, "--guidance", "3", "--batch", "2", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    result = json.loads(out)
    assert set(result) == {"seconds", "reference_seconds", "head_share"}
    assert result["seconds"] > 0 and result["reference_seconds"] > 0 and 0 < result["head_share"] < 1


def test_sizes():
    assert parse_sizes("dim=32, tokens=16", _MOST) == {"dim": 32, "tokens": 16}
    for wrong in ("width=3", "dim", "dim=0", "dim=x", "dim=²", "dim=٣", f"dim={'9' * 5000}", "depth=1000000000"):
        with pytest.raises(StudioError, match="whole number"):
            parse_sizes(wrong, _MOST)
    with pytest.raises(StudioError, match="square"):
        bench_mar(random="tokens=15")
    with pytest.raises(StudioError, match="tokens"):
        bench_mar(random=TINY.replace("steps=2", "steps=5", 1))
    with pytest.raises(StudioError, match="batch"):
        bench_mar(random=TINY, batch=0)
    with pytest.raises(StudioError, match="guidance"):
        bench_mar(random=TINY, guidance_scale=1e300)
    with pytest.raises(StudioError, match="GB of memory are free"):
        bench_mar(random="dim=16384,depth=256")
    with pytest.raises(StudioError, match="quantum"):
        bench_mar(random=TINY, device="quantum")
