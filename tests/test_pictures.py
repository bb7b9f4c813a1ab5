"""Picture files as people have them: read as they are seen, or refused with the reason."""

import gc
import warnings

import numpy as np
import pytest
from PIL import Image

from studio.errors import StudioError
from studio.pictures import open_picture


def save(tmp_path, picture, name="picture.png", **settings):
    picture.save(tmp_path / name, **settings)
    return tmp_path / name


def test_transparency_is_put_on_white(tmp_path):
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 8, 16))
    read = open_picture(save(tmp_path, picture))
    assert read.mode == "RGB" and read.getpixel((2, 2)) == (255, 0, 0) and read.getpixel((12, 2)) == (255, 255, 255)


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    read = np.asarray(open_picture(save(tmp_path, Image.fromarray(values))))
    assert np.abs(read[..., 0].astype(int) - (values / 257).round()).max() <= 1


def test_cmyk_and_palettes_become_rgb(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    assert open_picture(save(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=95)).getpixel((8, 8))[0] > 200
    assert open_picture(save(tmp_path, red.quantize(4), "palette.png")).getpixel((8, 8)) == (250, 10, 10)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    assert open_picture(path).getpixel((8, 8)) == (255, 0, 0)


def test_a_cameras_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, Image.new("RGB", (32, 16)), "turned.jpg", exif=exif)
    assert open_picture(path).size == (16, 32)


@pytest.mark.parametrize(
    ("size", "word"), [((1, 1), "at least 8"), ((2000, 10), "100 times"), ((10000, 9000), "64 million")]
)
def test_sizes_that_no_model_reads_are_refused(tmp_path, size, word):
    path = save(tmp_path, Image.new("1", size))
    with pytest.raises(StudioError, match=word) as refusal:
        open_picture(path)
    assert str(refusal.value).startswith(f"{path} has {size[0]} x {size[1]} pixels: ")


def test_no_file_stays_open(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    moving = save(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    cut = tmp_path / "cut.gif"
    cut.write_bytes(moving.read_bytes()[:50])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        open_picture(moving)
        with pytest.raises(StudioError, match="damaged"):
            open_picture(cut)
        gc.collect()
    assert not [warning for warning in found if str(tmp_path) in str(warning.message)]


def test_what_is_no_whole_picture_is_refused(tmp_path):
    whole = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no picture")
    for name, word in {"cut.png": "damaged", "text.png": "not a picture", "absent.png": "no picture"}.items():
        with pytest.raises(StudioError, match=word):
            open_picture(tmp_path / name)


def test_messages_call_a_picture_by_its_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(StudioError, match="^my notes is not a picture"):
        open_picture(tmp_path / "notes.png", "my notes")
