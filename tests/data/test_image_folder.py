"""A folder of images: every layout of `imagefolder`, every kind of file, and bad data in one sentence."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from studio.data import image_folder
from studio.data.image_folder import ImageFolder
from studio.data.source import open_source
from studio.errors import StudioError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "photos"


def plain(colour, size=(16, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def write(folder, names, **save):
    """A plain image for each name, of a grey of its own."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain((10 * number, 10 * number, 10 * number)).save(path, **save)
    return folder


def numbered(count, before="", suffix=".png"):
    return [f"{before}{number:03}{suffix}" for number in range(count)]


def greys(examples):
    """The number of every example, by its grey."""
    pixels = (examples.images(range(len(examples))) + 1) * 127.5
    assert pixels.shape[1:] == (3, 8, 8) and (pixels.amax((1, 2, 3)) - pixels.amin((1, 2, 3))).max() < 0.1
    return [round(float(grey) / 10) for grey in pixels.mean((1, 2, 3))]


def only(folder, name, **options):
    """The pixels, 0 to 255, of one image of a folder."""
    source = ImageFolder(folder, 8, **options)
    number = source.pixels.names.index(name)
    side = next(part for part in (source.train, source.validation) if number in part.numbers)
    return (side.images(np.flatnonzero(side.numbers == number))[0] + 1) * 127.5


def test_a_flat_folder_is_neither_captioned_nor_of_classes(folder):
    write(folder, numbered(12))
    source = open_source(str(folder), 8)
    assert not source.has_captions and source.class_names is None and source.concepts is None
    assert len(source.train) + len(source.validation) == 12 and source.unseen is source.validation
    assert sorted(greys(source.train) + greys(source.validation)) == list(range(12))
    with pytest.raises(StudioError, match="has no captions: write them into a metadata.jsonl"):
        source.train.captions([0])
    with pytest.raises(StudioError, match="has no classes: put the images of each class"):
        source.train.labels([0])
    assert source.name == "photos" and "12" not in source.description and "images to train" in source.description


def test_sub_folders_are_classes(folder):
    write(folder, ["dog/a.png", "cat/b.png", "deep/er/fox/c.png", *numbered(9, "cat/")])
    source = ImageFolder(folder, 8)
    assert source.class_names == ["cat", "dog", "fox"]
    labels = {}
    for side in (source.train, source.validation):
        labels |= dict(zip(greys(side), side.labels(range(len(side))).tolist(), strict=True))
    assert {image: labels[image] for image in (1, 2)} == {1: 0, 2: 2} and set(labels.values()) == {0, 1, 2}
    write(folder, ["alone.png"])
    assert ImageFolder(folder, 8).class_names is None


def captions_of(source):
    known = {}
    for side in (source.train, source.validation):
        known |= dict(zip(greys(side), side.captions(range(len(side))), strict=True))
    return known


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_captions(folder, name, mark):
    names = ["below/x.png", *numbered(9)]
    write(folder, names)
    rows = [{"file_name": file, "text": f'no. {number}, "a, ü"'} for number, file in enumerate(names)]
    with open(folder / name, "w", encoding="utf-8", newline="") as stream:
        stream.write(mark)
        if name.endswith("csv"):
            writer = csv.DictWriter(stream, ("file_name", "text"))
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.write("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    source = ImageFolder(folder, 8)
    assert source.has_captions and source.class_names is None
    assert captions_of(source) == {number: f'no. {number}, "a, ü"' for number in range(10)}
    assert set(source.caption_corpus()) < {f'no. {number}, "a, ü"' for number in range(10)}
    assert "captioned images to train" in source.description


def test_several_wordings_of_an_image_are_chosen_at_random(folder):
    write(folder, numbered(8))
    rows = [{"file_name": name, "text": text} for name in numbered(8) for text in ("first", "second")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, rng = ImageFolder(folder, 8).train, np.random.default_rng(0)
    assert train.captions([0] * 9) == ["first"] * 9
    assert set(train.captions([0] * 50, rng)) == {"first", "second"}


def test_train_and_validation_folders_are_the_split(folder):
    """With classes or captions below them; images of other folders, such as `test/`, are in neither."""
    names = [
        f"{split}/{kind}/{number}.png"
        for split in ("train", "validation", "test")
        for kind in "ab"
        for number in "0123"
    ]
    write(folder, names)
    source = ImageFolder(folder, 8)
    assert sorted(greys(source.train)) == list(range(8)) and sorted(greys(source.validation)) == list(range(8, 16))
    assert source.class_names == ["a", "b"] and source.train.labels([0, 7]).tolist() == [0, 1]
    for split in ("train", "validation"):
        files = [name.removeprefix(f"{split}/") for name in names if name.startswith(split)]
        rows = [json.dumps({"file_name": name, "text": f"{split} {name}"}) for name in files]
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    source = ImageFolder(folder, 8)
    assert source.train.captions([0]) == ["train a/0.png"] and source.validation.captions([7]) == ["validation b/3.png"]


def test_metadata_beside_the_splits_may_name_other_folders_too(folder):
    names = [f"{split}/{number}.png" for split in ("train", "validation", "test") for number in range(5)]
    write(folder, names)
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert ImageFolder(folder, 8).validation.captions(range(5)) == names[5:10]


def test_one_in_twenty_is_held_out_by_its_name(folder):
    """Of 2,000 names: 5 % within 5 standard deviations; the side of a name does not depend on the other files."""
    names = numbered(2000)
    held_out = image_folder._held_out(names)
    assert abs(sum(held_out.values()) - 100) < 5 * (2000 * 0.05 * 0.95) ** 0.5
    fewer = image_folder._held_out(names[::2])
    assert sum(held_out[name] != side for name, side in fewer.items()) == 0
    assert sum(image_folder._held_out(numbered(8)).values()) == 1


def test_images_are_upright(folder):
    """An image that is stored on its side is turned as its EXIF says: its red top is on top."""
    write(folder, numbered(8))
    image = plain("blue", (32, 32))
    image.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "side.jpg", exif=exif, quality=95)
    pixels = only(folder, "side.jpg")
    assert pixels[0, :3].min() > 200 and pixels[2, :3].max() < 60 and pixels[2, 5:].min() > 200


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(folder, mode):
    write(folder, numbered(8))
    if mode == "P":
        image = plain(3, mode="P")
        image.putpalette([0, 0, 0] * 4)
        image.save(folder / "clear.png", transparency=3)
    else:
        plain((0, 0, 0, 0) if mode == "RGBA" else (0, 0), mode=mode).save(folder / "clear.png")
    assert only(folder, "clear.png").min() > 254


def test_greys_of_16_bits_keep_their_tone(folder):
    write(folder, numbered(8))
    for number, suffix in enumerate(("png", "tif")):
        grey = np.full((16, 16), (number + 1) * 20_000, dtype=np.uint16)
        Image.fromarray(grey).save(folder / f"deep.{suffix}")
        assert float(only(folder, f"deep.{suffix}").mean()) == pytest.approx(grey[0, 0] / 257, abs=1)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("L", 100, "png", (100, 100, 100)),
        ("1", 1, "png", (255, 255, 255)),
        ("P", 0, "gif", (10, 20, 30)),
        ("RGB", (200, 0, 100), "webp", (200, 0, 100)),
        ("RGB", (200, 0, 100), "BMP", (200, 0, 100)),
    ],
)
def test_other_colours_and_formats(folder, mode, colour, suffix, expected):
    write(folder, numbered(8))
    image = plain(colour, mode=mode)
    if mode == "P":
        image.putpalette([10, 20, 30])
    image.save(folder / f"other.{suffix}")
    mean = only(folder, f"other.{suffix}").mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float32), atol=4, rtol=0)


def gradient(folder):
    """A wide image, dark on the left and bright on the right, among others."""
    write(folder, numbered(8))
    row = np.linspace(0, 255, 64).astype(np.uint8)
    Image.fromarray(np.broadcast_to(row[None, :, None], (16, 64, 3)).copy()).save(folder / "wide.png")


def test_crops(folder, monkeypatch):
    """The middle; the whole, squeezed; a random square, anew each time a tokenizer reads it, the middle otherwise."""
    gradient(folder)
    monkeypatch.setattr(image_folder, "_held_out", lambda files: {name: name == "000.png" for name in files})
    centre, none = only(folder, "wide.png"), only(folder, "wide.png", crop="none")
    assert centre[0, 0, 0] == pytest.approx(255 * 3 / 8, abs=12) and centre[0, 0, -1] == pytest.approx(
        255 * 5 / 8, abs=12
    )
    assert none[0, 0, 0] < 30 and none[0, 0, -1] > 225
    random = ImageFolder(folder, 8, crop="random")
    assert torch.equal(only(folder, "wide.png", crop="random"), centre)

    def seen(source, count=400):
        images = (source.augmented(np.random.default_rng(0), count) + 1) * 127.5
        wide = (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) > 10
        return images[wide].mean((1, 2, 3))

    assert seen(random).min() < 60 and seen(random).max() > 195
    assert seen(ImageFolder(folder, 8)).std() < 1
    with pytest.raises(StudioError, match="--crop is one of centre, random, none, not 'middle'"):
        ImageFolder(folder, 8, crop="middle")


def test_images_are_mirrored_only_where_that_is_asked(folder, monkeypatch):
    """400 images (seed 0): none, or half within 5 standard deviations; never for validation or generators."""
    gradient(folder)
    monkeypatch.setattr(image_folder, "_held_out", lambda files: {name: name == "000.png" for name in files})

    def mirrored(source):
        images = source.augmented(np.random.default_rng(0), 400)
        wide = images[(images.amax((1, 2, 3)) - images.amin((1, 2, 3))) > 0.1]
        return float((wide[:, 0, 0, 0] > wide[:, 0, 0, -1]).float().mean()), len(wide)

    share, count = mirrored(ImageFolder(folder, 8, flip=True))
    assert abs(share - 0.5) < 5 * (0.25 / count) ** 0.5 and mirrored(ImageFolder(folder, 8))[0] == 0
    assert torch.equal(only(folder, "wide.png", flip=True), only(folder, "wide.png"))


def test_unreadable_files_are_left_out_and_named(folder):
    write(folder, numbered(9))
    (folder / "broken.png").write_bytes(b"no image")
    whole = (folder / "008.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    for _ in range(2):  # the second time from the cache
        source = ImageFolder(folder, 8)
        assert [name for name, _ in source.skipped] == ["broken.png", "cut.png", "empty.jpg"]
        assert all(reason for _, reason in source.skipped)
        assert len(source.train) + len(source.validation) == 9 and "3 unreadable files left out" in source.description


def test_too_few_images(folder, tmp_path):
    write(folder, numbered(7))
    with pytest.raises(StudioError, match="holds 7 readable images; training needs 8"):
        ImageFolder(folder, 8)
    (folder / "z.png").write_bytes(b"no image")
    with pytest.raises(StudioError, match=r"7 readable images \(1 could not be read, first z.png\)"):
        ImageFolder(folder, 8)
    for name in numbered(7):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(StudioError, match=r"0 readable images \(8 could not be read, first 000.png\)"):
        ImageFolder(folder, 8)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(StudioError, match="holds no images"):
        ImageFolder(folder, 8)
    for name in ("nowhere", "photos/000.png"):
        with pytest.raises(StudioError, match=f"There is no folder .*{name}: give --data a folder of images, or emoji"):
            ImageFolder(tmp_path / name, 8)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ([{"file_name": "gone.png", "text": "a"}], "name 1 images that are not in .*, first gone.png"),
        ([{"file_name": "/etc/passwd.png", "text": "a"}], "first /etc/passwd.png"),
        ([{"file_name": "000.png", "text": "a"}], "7 images in .* have no caption, first 001.png"),
        ([{"file_name": "000.png"}], r"Line 1 of .*metadata.jsonl needs file_name and text"),
        ([{"file_name": "000.png", "text": " "}], "both non-empty texts"),
        (["text"], "Line 1 of"),
        ('{"file_name": "000.png", "text": "a"}\n\n{"file_name": "001.png"}', r"Line 3 of .*metadata.jsonl needs"),
        ('{"file_name": "000.png", "text": "a"}\n\n{', r"Line 3 of .*metadata.jsonl cannot be read \(Expect[^:]*\)"),
        ('{"file_name": "000.png", "text": "a", "text": "b"}', r"Line 1 of .*metadata.jsonl: 'text' is given twice"),
        ("{", "metadata.jsonl cannot be read"),
        ("[" * 100_000, "metadata.jsonl cannot be read"),
        (b"\xff\xfe", "metadata.jsonl cannot be read"),
    ],
)
def test_captions_that_do_not_fit_are_one_sentence(folder, metadata, words):
    write(folder, numbered(8))
    if isinstance(metadata, list):
        metadata = "\n".join(map(json.dumps, metadata))
    (folder / "metadata.jsonl").write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    with pytest.raises(StudioError, match=words) as error:
        ImageFolder(folder, 8)
    assert "\n" not in str(error.value)


def test_a_csv_without_the_columns_is_one_sentence(folder):
    write(folder, numbered(8))
    (folder / "metadata.csv").write_text("name,caption\n000.png,a\n")
    with pytest.raises(StudioError, match="Line 2 of .*metadata.csv needs file_name and text"):
        ImageFolder(folder, 8)


def test_the_checksum_is_of_all_that_a_cache_of_training_examples_depends_on(folder):
    """Pixels, which of them are for training, captions and classes; not the folder's own name."""
    write(folder, numbered(8))
    checksums = [ImageFolder(folder, 8).checksum]
    copied = folder.with_name("copy")
    shutil.copytree(folder, copied)
    assert ImageFolder(copied, 8).checksum == checksums[0]
    for number in range(8):
        os.rename(copied / f"{number:03}.png", copied / f"a{number:03}.png")
    checksums.append(ImageFolder(copied, 8).checksum)
    for text in ("a", "b"):
        rows = [json.dumps({"file_name": name, "text": text}) for name in numbered(8)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        checksums.append(ImageFolder(folder, 8).checksum)
    (folder / "metadata.jsonl").unlink()
    checksums.append(ImageFolder(folder, 16).checksum)
    plain("red").save(folder / "000.png")
    checksums.append(ImageFolder(folder, 8).checksum)
    assert len(set(checksums)) == len(checksums)


def test_images_are_decoded_once_and_anew_when_they_change(folder, monkeypatch):
    write(folder, numbered(8))
    first = ImageFolder(folder, 8)
    monkeypatch.setattr(image_folder, "_read", None)
    again = ImageFolder(folder, 8)
    assert torch.equal(first.train.images(range(5)), again.train.images(range(5)))
    plain("red").save(folder / "000.png")
    with pytest.raises(TypeError):
        ImageFolder(folder, 8)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, full_disk, tmp_path):
    write(folder, numbered(8))
    with (
        full_disk(1000),
        pytest.raises(StudioError, match="images cannot be kept in .*: free some space, or set STUDIO_CACHE"),
    ):
        ImageFolder(folder, 64)
    assert not list((tmp_path / "cache").iterdir())
    assert len(ImageFolder(folder, 64).train) == 7


def test_the_licence_of_the_data_is_stated(folder):
    write(folder, numbered(8))
    assert ImageFolder(folder, 8).description.endswith("; licence: not stated")
    (folder / "LICENSE").write_text("\n CC0 1.0 Universal \nmore\n")
    assert ImageFolder(folder, 8).description.endswith("; licence: CC0 1.0 Universal")


def test_the_emoji_set_is_not_cropped_or_flipped():
    for options in ({"crop": "random"}, {"flip": True}):
        with pytest.raises(StudioError, match="leave out --crop and --flip"):
            open_source("emoji", 16, **options)
