"""`studio edit`: files that come out, kept pixels, and what is refused with exit code 2."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return pixels


def edited(out, tmp_path, number=0):
    return np.asarray(Image.open(tmp_path / json.loads(out)["images"][number]["path"]))


def test_a_box_is_redrawn_and_nothing_else(run, tiny_mar_folder, photo, tmp_path):
    options = ["--box", "5,4,12,10", "--seed", 3, "--num-images", 2, "-o", "new.png", "--json", "--steps", 4]
    code, out, err = run("edit", "photo.png", "a red apple", "--model", tiny_mar_folder, *options)
    assert code == 0, err
    document, inside = json.loads(out), np.zeros((20, 30), dtype=bool)
    inside[4:14, 5:17] = True
    assert [image["seed"] for image in document["images"]] == [3, 4] and document["size"] == [30, 20]
    for number in range(2):
        result = edited(out, tmp_path, number)
        assert np.array_equal(result[~inside], photo[~inside]) and not np.array_equal(result[inside], photo[inside])
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])["call"]
    assert (record["image"], record["mask_image"], record["approximate"]) == ("photo.png", "5,4,12,10", False)


def test_masks_sides_and_variations(run, tiny_folder, tiny_row_folder, photo, tmp_path):
    mask = np.zeros((10, 15), dtype=np.uint8)
    mask[:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, out, err = run("edit", "photo.png", "a red apple", "--mask", "mask.png", "--model", tiny_folder, "--json")
    assert code == 0 and "The mask has 15 x 10 pixels" in err and "samples in raster order" in err
    assert np.array_equal(edited(out, tmp_path)[10:], photo[10:]) and json.loads(out)["approximate"]
    code, out, err = run(
        "edit", "photo.png", "blue sky", "--expand", "left=10,bottom=4", "--model", tiny_folder, "--json"
    )
    assert code == 0 and np.array_equal(edited(out, tmp_path)[:20, 10:], photo), err
    code, out, err = run("edit", "photo.png", "sky", "--strength", 0.5, "--model", tiny_row_folder, "--json")
    assert code == 0 and edited(out, tmp_path).shape == (20, 30, 3), err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["photo.png"], "Say what to sample"),
        (["nowhere.png", "a red apple", "--box", "0,0,9,9"], "There is no image nowhere.png"),
        (["photo.png", "a red apple"], "white everywhere"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--mask", "photo.png"], "--mask or --box, not both"),
        (["photo.png", "a red apple", "--box", "0,0,9"], "--box is X,Y,WIDTH,HEIGHT"),
        (["photo.png", "a red apple", "--box", "25,0,9,9"], "goes beyond the image, which has 30 x 20"),
        (["photo.png", "a red apple", "--box", "1,1,0,9"], "width of --box"),
        (["photo.png", "a red apple", "--expand", "left"], "--expand is sides with pixels"),
        (["photo.png", "a red apple", "--expand", "up=3"], "expand names sides"),
        (["photo.png", "a red apple", "--expand", "left=3", "--strength", "0.5"], "leave it out where you expand"),
        (["photo.png", "a red apple", "--strength", "0"], "strength must be"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--decoding", "auto"], "Name the decoding"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--decoding", "lantern"], "not Lantern"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--class-label", "3"], "a prompt or a class"),
        (["black.png", "a red apple", "--mask", "black.png"], "no white"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--model", "emoji-vq"], "cannot edit"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "--padding", "-1"], "--padding"),
        (["photo.png", "a", "--box", "0,0,9,9", "--seed", str(2**63 - 1), "--num-images", "2"], "give at most"),
        (["photo.png", "a red apple", "--strength", "0.5", "--soft-edge", "4"], "--soft-edge belong to a mask"),
        (["photo.png", "a red apple", "--strength", "0.5", "--padding", "4"], "--soft-edge belong to a mask"),
        (["photo.png", "a red apple", "--box", "0,0,9,9", "-o", "photo.png"], "over the file that is read"),
        (["photo.png", "a red apple", "--mask", "black.png", "-o", "black.png"], "over the file that is read"),
    ],
)  # fmt: skip
def test_mistakes(run, tiny_mar_folder, photo, tmp_path, options, word):
    Image.new("L", (30, 20)).save(tmp_path / "black.png")
    model = [] if "--model" in options else ["--model", tiny_mar_folder]
    code, _, err = run("edit", *options, *model)
    assert code == 2 and word in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()
