"""Image files as people have them: read as they are seen, or refused with the reason."""

import gc
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from studio.errors import StudioError
from studio.images import open_image, read_alpha, read_image, rgb_image


def save(tmp_path, image, name="image.png", **settings):
    image.save(tmp_path / name, **settings)
    return tmp_path / name


def test_transparency_is_put_on_white(tmp_path):
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 16))
    read = open_image(save(tmp_path, image))
    assert read.mode == "RGB" and read.getpixel((2, 2)) == (255, 0, 0) and read.getpixel((12, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_opacity_is_read_as_upright_as_the_colours(mode):
    image = Image.new("RGBA", (16, 24), (9, 9, 9, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 24))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.convert(mode).save(file, "PNG", exif=exif)
    alpha = read_alpha(file.getvalue())
    if mode == "L":
        assert alpha is None
        return
    assert alpha.mode == "L" and alpha.size == read_image(file.getvalue()).size == (24, 16)
    assert np.array_equal(alpha, np.repeat([0, 255], 8)[:, None].repeat(24, 1))
    with pytest.raises(StudioError, match="cannot be read|can be read"):
        read_alpha(file.getvalue()[:60])


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    read = np.asarray(open_image(save(tmp_path, Image.fromarray(values))))
    assert np.abs(read[..., 0].astype(int) - (values / 257).round()).max() <= 1


def test_cmyk_and_palettes_become_rgb(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    assert open_image(save(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=95)).getpixel((8, 8))[0] > 200
    assert open_image(save(tmp_path, red.quantize(4), "palette.png")).getpixel((8, 8)) == (250, 10, 10)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((8, 8)) == (255, 0, 0)


def test_a_cameras_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, Image.new("RGB", (32, 16)), "turned.jpg", exif=exif)
    assert open_image(path).size == (16, 32)


@pytest.mark.parametrize(
    ("size", "word"), [((1, 1), "at least 8"), ((2000, 10), "100 times"), ((10000, 9000), "64 million")]
)
def test_sizes_that_no_model_reads_are_refused(tmp_path, size, word):
    path = save(tmp_path, Image.new("1", size))
    with pytest.raises(StudioError, match=word) as refusal:
        open_image(path)
    assert str(refusal.value).startswith(f"{path} has {size[0]} x {size[1]} pixels: ")


def test_no_file_stays_open(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    moving = save(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    cut = tmp_path / "cut.gif"
    cut.write_bytes(moving.read_bytes()[:50])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        open_image(moving)
        with pytest.raises(StudioError, match="damaged"):
            open_image(cut)
        gc.collect()
    assert not [warning for warning in found if str(tmp_path) in str(warning.message)]


def test_what_is_no_whole_image_is_refused(tmp_path):
    whole = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no image")
    for name, word in {"cut.png": "damaged", "text.png": "not an image", "absent.png": "no image"}.items():
        with pytest.raises(StudioError, match=word):
            open_image(tmp_path / name)


def test_messages_call_a_image_by_its_name(tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(StudioError, match="^my notes is not an image"):
        open_image(tmp_path / "notes.png", "my notes")


def encoded(image, form, **settings):
    file = io.BytesIO()
    image.copy().save(file, form, **settings)
    return file.getvalue()


def deep(level, dtype=np.uint16):
    return Image.fromarray(np.full((16, 16), level, dtype))


@pytest.mark.parametrize(
    ("level", "dtype", "shown"),
    [
        (200, np.uint16, 1),
        (300, np.uint16, 1),
        (32_896, np.uint16, 128),
        (65_535, np.uint16, 255),
        (300, np.int32, 1),
        (65_535, np.int32, 255),
        (2**31 - 1, np.int32, 255),
        (-5, np.int32, 0),
        (0.5, np.float32, 128),
        (1.0, np.float32, 255),
        (300.0, np.float32, 255),
        (np.nan, np.float32, 0),
    ],
)
def test_levels_are_scaled_by_mode_and_not_by_what_is_shown(tmp_path, level, dtype, shown):
    image = deep(level, dtype)
    assert np.all(np.asarray(rgb_image(image)) == shown)
    assert np.all(np.asarray(open_image(save(tmp_path, image, "deep.tiff"))) == shown)


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path):
    image = deep(1000)
    image.putpixel((3, 3), 2000)
    read = open_image(save(tmp_path, image, transparency=2000))
    assert read.getpixel((3, 3)) == (255, 255, 255) and read.getpixel((4, 4)) == (4, 4, 4)


def upright_cases():
    red_left = Image.new("RGB", (32, 16), "white")
    red_left.paste((255, 0, 0), (0, 0, 8, 16))
    clear = red_left.convert("RGBA")
    clear.putalpha(128)
    for orientation in (None, 1, 3, 6, 8):
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        files = {"JPEG": red_left, "PNG": clear, "WEBP": red_left, "TIFF": clear, "AVIF": red_left}
        for form, image in files.items():
            yield pytest.param(form, encoded(image, form, exif=exif.tobytes()), orientation, id=f"{form}-{orientation}")


@pytest.mark.parametrize(("form", "data", "orientation"), upright_cases())
def test_a_file_and_an_open_image_are_read_alike(tmp_path, form, data, orientation):
    """By every door: a path, an image that Pillow opened, one that was read before, and one that was converted."""
    path = tmp_path / "image"
    path.write_bytes(data)
    read = open_image(path)
    assert read.size == ((16, 32) if orientation in (6, 8) else (32, 16))
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    others = [Image.open(io.BytesIO(data)), loaded, loaded.copy(), loaded.convert("RGBA"), read, rgb_image(loaded)]
    for other in others:
        assert np.array_equal(rgb_image(other), read)
    named = Image.open(path)
    assert np.array_equal(rgb_image(named), read) and named.filename == str(path)


def test_the_codec_and_the_reader_of_questions_use_the_same_pixels(tmp_path, tiny_one_d, tiny_reader):
    from studio import OdpFile, VisualQuestionPipeline, encode_image

    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.random.default_rng(0).integers(0, 256, (16, 32, 4), np.uint8)
    path = save(tmp_path, Image.fromarray(levels), exif=exif)
    data = [encode_image(image, tiny_one_d).data for image in (open_image(path), Image.open(path))]
    assert data[0] == data[1] and OdpFile.from_bytes(data[1]).height == 32
    pipe = VisualQuestionPipeline(*tiny_reader)
    answers = [pipe(image, "what", max_new_tokens=2) for image in (open_image(path), Image.open(path))]
    assert answers[0].answer == answers[1].answer and answers[0].visual_tokens == answers[1].visual_tokens


def test_only_the_orientation_of_an_exif_matters(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = encoded(Image.new("RGB", (32, 16)), "JPEG", exif=exif)
    at = data.index((72).to_bytes(4, "big") + (1).to_bytes(4, "big"))
    (tmp_path / "zero.jpg").write_bytes(data[: at + 4] + bytes(4) + data[at + 8 :])
    assert open_image(tmp_path / "zero.jpg").size == (16, 32)
    start = data.index(b"Exif") + 14
    (tmp_path / "broken.jpg").write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert open_image(tmp_path / "broken.jpg").mode == "RGB"


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "DDS", "JPEG2000", "EPS", "PCX", "ICNS", "SGI", "QOI", "BLP"])
def test_other_formats_never_reach_their_decoder(tmp_path, form, monkeypatch):
    Image.init()
    image = Image.new("P", (16, 16)) if form == "BLP" else Image.new("RGB", (16, 16))
    (tmp_path / "image.png").write_bytes(encoded(image, form))
    opened, accept = Image.OPEN[form]
    monkeypatch.setitem(Image.OPEN, form, (lambda *_: pytest.fail("its decoder was called"), accept))
    with pytest.raises(StudioError, match="not an image that can be read: give a PNG, JPEG, WebP"):
        open_image(tmp_path / "image.png")


def test_a_photo_of_a_phone_gets_a_hint(tmp_path):
    (tmp_path / "photo.heic").write_bytes(bytes(3) + b"\x18ftypheic" + bytes(40))
    with pytest.raises(StudioError, match="HEIC photo.*save it as JPEG"):
        open_image(tmp_path / "photo.heic")


@pytest.mark.parametrize("form", ["AVIF", "WEBP", "TIFF", "GIF", "BMP", "JPEG"])
def test_every_cut_of_a_file_is_one_sentence(tmp_path, form):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)), form)
    for length in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / "cut").write_bytes(data[:length])
        try:
            open_image(tmp_path / "cut")
        except StudioError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "\ud800", "~nobody-here/a.png", "/dev/zero"])
def test_paths_of_no_file_are_refused(path):
    with pytest.raises(StudioError, match="There is no image"):
        open_image(path)


@pytest.mark.parametrize("image", [None, "image.png", np.zeros((16, 16, 3), np.uint8), Image.new("RGB", (0, 5))])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(StudioError):
        rgb_image(image)
