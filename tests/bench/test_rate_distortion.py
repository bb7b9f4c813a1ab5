"""Rate and distortion: files of at most as many bytes, counted whole and without fixed parts; the chart and command."""

import io
import json

import pytest
from PIL import Image

from studio import StudioError, cli
from studio.bench import rate_distortion as bench
from studio.bench.rate_distortion import rate_distortion_chart

SAMPLES = 70


@pytest.fixture(scope="module")
def result(tiny_one_d):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUALITIES", (1, 50, 95))
        return bench.bench_rate_distortion(tiny_one_d, name="tiny", samples=SAMPLES, refine=5, device="cpu")


def test_no_file_is_larger_than_its_limit(result):
    assert {row["codec"] for row in result["rows"]} >= {"one-d-piece", "webp"}
    for row in result["rows"]:
        assert row["bytes"] <= row["limit"]
        assert row["frechet"] > 0 and 0 < row["psnr"] < 100


def test_our_rows_are_the_files_that_would_be_written(result, tiny_one_d):
    from studio import encode_image

    images = bench.held_out_images(16, SAMPLES, 0)
    for counted in bench.COUNTED:
        rows = [row for row in result["rows"] if (row["codec"], row["counted"]) == ("one-d-piece", counted)]
        assert len(rows) == len(tiny_one_d.lengths)
        for row, length in zip(rows, tiny_one_d.lengths):
            written = [encode_image(image, tiny_one_d, length=length, name="tiny") for image in images[:5]]
            for one in written:
                assert row["bytes"] == (len(one.data) if counted == "file" else one.file.payload_bytes)
    whole = [encode_image(image, tiny_one_d, length=6).psnr for image in images]
    assert rows[-1]["psnr"] == pytest.approx(sum(whole) / SAMPLES, abs=0.05)


def test_searched_tokens_have_rows_of_their_own(result):
    of_codec = {
        codec: [row for row in result["rows"] if row["codec"] == codec and row["counted"] == "file"]
        for codec in ("one-d-piece", "one-d-piece refined 5")
    }
    for plain, refined in zip(*of_codec.values(), strict=True):
        assert refined["bytes"] == plain["bytes"] and refined["psnr"] >= plain["psnr"] - 0.01
    assert refined["psnr"] > plain["psnr"]


def test_more_bytes_never_restore_worse(result):
    for codec in ("jpeg", "webp"):
        for counted in bench.COUNTED:
            rows = [row for row in result["rows"] if (row["codec"], row["counted"]) == (codec, counted)]
            assert [row["psnr"] for row in rows] == sorted(row["psnr"] for row in rows)


@pytest.mark.parametrize("side", [8, 64])
def test_fixed_parts_of_a_jpeg_file(side):
    """Tables are fixed and the scan is not: the same tables around more of the same image leave the difference."""
    files = []
    for height in (side, 4 * side):
        file = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").resize((side, height)).save(file, "JPEG", quality=50)
        files.append(file.getvalue())
    fixed = [bench.jpeg_fixed(data) for data in files]
    assert fixed[0] == fixed[1]
    place = fixed[0] - 2
    assert b"\xff\xda" in files[0][:place] and b"\xff\xda" not in files[0][place:]
    assert files[0].endswith(b"\xff\xd9") and len(files[1]) > len(files[0]) > fixed[0]


def test_the_best_file_that_fits():
    image = bench.held_out_images(64, 1, 0)[0]
    encoded = bench.ways(image, "webp")
    assert len(encoded) == len(bench.SCALES) * len(bench.QUALITIES)
    for limit in (60, 200, 10_000):
        fitting = [way.psnr for way in encoded if way.size <= limit]
        assert bench.best(encoded, limit, "file").psnr == max(fitting)
    assert bench.best(encoded, 5, "file") is None


def test_the_chart_has_a_line_for_each_curve(result):
    for measure in ("psnr", "frechet"):
        text = rate_distortion_chart(result["rows"], measure)
        curves = {(row["codec"], row["counted"]) for row in result["rows"]}
        assert text.startswith("<svg") and all(codec.split(" ")[0] in text for codec, _ in curves)
        assert ">refined 5<" in text and ">refined 5 payload<" in text
        assert text.count("<circle") == len(result["rows"]) + len(curves)


def test_refusals(tiny_vq, tiny_one_d):
    with pytest.raises(StudioError, match="One-D-Piece"):
        bench.bench_rate_distortion(tiny_vq)
    with pytest.raises(StudioError, match="held-out"):
        bench.bench_rate_distortion(tiny_one_d, samples=1000)


def test_the_command(tiny_one_d, tmp_path, monkeypatch, capfd):
    tiny_one_d.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(bench, "QUALITIES", (50,))
    figure = tmp_path / "figure.svg"
    call = ["bench", "rate-distortion", "--tokenizer", str(tmp_path / "tokenizer"), "--samples", "65", "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*call, "--figure", str(figure), "--measure", "frechet"])
    assert stopped.value.code == 0
    assert json.loads(capfd.readouterr().out)["samples"] == 65 and figure.read_text().startswith("<svg")
    for wrong in (["--figure", str(tmp_path / "figure.png")], ["--measure", "frechet"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*call, *wrong])
        assert stopped.value.code == 2
