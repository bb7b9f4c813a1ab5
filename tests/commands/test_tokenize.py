"""`studio tokenize` and `studio detokenize`: what they write, what they print, and how they refuse."""

import json

import numpy as np
import pytest
from PIL import Image

from studio import OdpFile


@pytest.fixture(autouse=True)
def image(tmp_path):
    """An image in the folder that commands run in."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 24), Image.Resampling.BICUBIC).save(tmp_path / "image.jpg")


@pytest.fixture(scope="module")
def folder(tiny_one_d, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_one_d.save_pretrained(folder)
    return folder


def refused(result, *words):
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2 and out == "" and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("tile", [[], ["--tile"]])
def test_there_and_back(run, folder, tmp_path, tile):
    code, out, err = run("tokenize", "image.jpg", "-o", "new/p.odp", "--tokenizer", folder, *tile, "--json")
    assert code == 0, err
    document = json.loads(out)
    data = (tmp_path / "new/p.odp").read_bytes()
    assert document["bytes"] == len(data) and document["length"] == (36 if tile else 6)
    assert document["payload_bytes"] == OdpFile.from_bytes(data).payload_bytes
    assert (document["width"], document["height"], document["tiled"]) == (40, 24, bool(tile))
    code, out, err = run("detokenize", "new/p.odp", "-o", "back.png", "--tokenizer", folder, "--json")
    assert code == 0, err
    restored = Image.open(tmp_path / "back.png")
    assert restored.size == (40, 24) and json.loads(out)["length"] == document["length"]
    assert json.loads(restored.text["studio"])["call"]["tokenizer"] == str(folder)


def test_targets_decide_the_length(run, folder):
    def length(*options):
        code, out, err = run("tokenize", "image.jpg", "-o", "p.odp", "--tokenizer", folder, "--json", *options)
        assert code == 0, err
        return json.loads(out)

    assert length("--length", 2)["length"] == 2
    limited = length("--bytes", 20)
    assert limited["bytes"] <= 20 and limited["length"] == 4
    assert length("--psnr", 1)["length"] == 1


def test_refusals_leave_no_file(run, folder, tmp_path):
    (tmp_path / "text.odp").write_text("no image")
    run("tokenize", "image.jpg", "-o", "p.odp", "--tokenizer", folder)
    data = (tmp_path / "p.odp").read_bytes()
    (tmp_path / "damaged.odp").write_bytes(data[:-6] + b"x" + data[-5:])
    before = sorted(tmp_path.iterdir())
    options = ("--tokenizer", folder)
    refused(run("tokenize", "image.jpg", "-o", "q.odp", *options, "--length", 7), "from 1 to 6")
    refused(run("tokenize", "image.jpg", "-o", "q.odp", *options, "--psnr", 90), "ask for less")
    refused(run("tokenize", "image.jpg", "-o", "q.odp", *options, "--bytes", 5), "at least")
    refused(run("tokenize", "image.jpg", "-o", "q.odp", *options, "--bytes", 50, "--length", 2), "one of")
    refused(run("tokenize", "text.odp", "-o", "q.odp", *options), "not an image")
    refused(run("tokenize", "image.jpg", "-o", "q.odp", "--tokenizer", "emoji-vq"), "no One-D-Piece")
    refused(run("detokenize", "text.odp", "-o", "q.png", *options), "text.odp is not an .odp file")
    refused(run("detokenize", "damaged.odp", "-o", "q.png", *options), "damaged.odp is damaged")
    refused(run("detokenize", "none.odp", "-o", "q.png", *options), "no file")
    refused(run("detokenize", "p.odp", "-o", "q.jpg", *options), ".png")
    refused(run("detokenize", "p.odp", "-o", "q.png"), "--tokenizer")
    refused(run("tokenize", "image.jpg", "-o", "image.jpg", *options), "image.jpg does not end in .odp")
    refused(run("tokenize", "image.jpg", "-o", "q.png", *options), "q.png does not end in .odp")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_read_is_not_written_over(run, folder, tmp_path):
    options = ("--tokenizer", folder)
    run("tokenize", "image.jpg", "-o", "p.odp", *options)
    (tmp_path / "image.jpg").rename(tmp_path / "image.odp")
    (tmp_path / "p.odp").rename(tmp_path / "p.png")
    (tmp_path / "link.odp").symlink_to("image.odp")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused(run("tokenize", "image.odp", "-o", "image.odp", *options), "over the file that is read")
    refused(run("tokenize", "image.odp", "-o", "link.odp", *options), "over the file that is read")
    refused(run("detokenize", "p.png", "-o", "p.png", *options), "over the file that is read")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
