"""The Tokenize tab: an image to tokens and back, beside other codecs, and `.odp` files both ways."""

import asyncio
import importlib.util
import re
import threading
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import handle_file
from PIL import Image

from studio import OdpFile, TokenBridgeTokenizer, decode_image, encode_image
from studio.ui.app import build_app
from studio.ui.jobs import tiling
from studio.ui.jobs import tokenize_job as tokenizing
from studio.ui.render.sizes import resized
from studio.ui.render.token_planes import code_colours
from studio.ui.server import models
from studio.ui.server.models import tokenizer_length_control
from studio.ui.tabs import tokenize

spec = importlib.util.spec_from_file_location(
    "tiny_tokenizers", Path(__file__).parents[1] / "evaluation" / "test_robustness.py"
)
tiny_tokenizers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_tokenizers)


@pytest.fixture
def loaded(monkeypatch):
    """The app has only this tokenizer, and tells whether it would load another."""

    def load(tokenizer, name="tiny"):
        monkeypatch.setattr(models, "_tokenizers", {name: tokenizer})
        return name

    return load


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path, quality=95)
    return str(path)


def updates(tokenizer, image, count=1, tile=False, show=tokenize.show_restoring):
    values = (tokenizer, image and {"path": str(image)}, count, tile)

    async def collect():
        return [dict(zip(tokenize.OUTPUTS, update, strict=True)) async for update in show(*values)]

    return asyncio.run(collect())


def opened(tokenizer, file):
    return updates(tokenizer, file, show=lambda name, path, *_: tokenize.show_opening(name, path))


def pair(found):
    """The original and the restored image that the page shows."""
    paths = next(each["pair"]["value"] for each in found if "value" in each["pair"])
    return [Image.open(path) for path in paths]


def test_original_and_restoration_are_of_one_size(loaded, tiny_vq, photo):
    found = updates(loaded(tiny_vq), photo)
    original, restored = pair(found)
    assert original.size == restored.size == (540, 360)
    square = Image.open(photo).resize((16, 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square).copy()).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        expected = ((tiny_vq(pixels)[0] + 1).clamp(0, 2) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy()
    assert np.array_equal(np.asarray(restored), Image.fromarray(expected).resize((540, 360), Image.Resampling.BICUBIC))
    assert (
        "16 tokens of a 16 x 16 square" in found[-1]["status"] and 'class="studio-status done"' in found[-1]["status"]
    )


def test_other_codecs_get_as_many_bytes_and_it_says_where_they_have_no_file(loaded, tiny_vq, photo):
    found = updates(loaded(tiny_vq), photo)[-1]
    captions = [caption for _, caption in found["codecs"]["value"]]
    assert captions[0].startswith("tiny · 12 bytes · ")
    for caption in captions[1:]:
        assert int(re.search(r"· (\d+) bytes", caption)[1]) <= 12
    assert "Token numbers alone are counted" in found["codes"]
    assert re.search(r"JPEG has no file of 12 bytes: the smallest has \d{3}\.", found["codes"])


def test_the_grid_says_every_code(loaded, tiny_vq, photo):
    codes = updates(loaded(tiny_vq), photo)[-1]["codes"]
    square = Image.open(photo).resize((16, 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square).copy()).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        tokens = tiny_vq.encode(pixels).flatten().tolist()
    assert re.findall(r"<title>(\d+)</title>", codes) == [str(token) for token in tokens]
    assert 'aria-label="Tokens: 16 of 16 used"' in codes


def test_equal_codes_have_equal_colours_and_near_ones_near(tiny_vq):
    codebook = torch.tensor([[0.0, 0, 0, 0], [0.01, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    first, near, far = (
        np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        for colour in code_colours(codebook, torch.tensor([0, 1, 2]))
    )
    assert np.abs(first - near).sum() < np.abs(first - far).sum()
    assert code_colours(torch.randn(8, 2), torch.tensor([3, 3]))[0].startswith("#")


def test_a_row_is_cut_short_and_can_be_taken_home(loaded, tiny_one_d, photo):
    found = updates(loaded(tiny_one_d), photo, 4)
    status, codes = found[-1]["status"], found[-1]["codes"]
    assert "4 of 6 tokens" in status and codes.count('class="dropped"') == 2
    assert "Whole files are counted" in codes
    path = next(each["download"]["value"] for each in found if "value" in each["download"])
    assert Path(path).name == "photo.odp"
    expected = encode_image(Image.open(photo), tiny_one_d, length=4)
    assert Path(path).read_bytes() == expected.data
    assert f"<dd>{len(expected.data)}</dd>" in status


def test_an_image_is_cut_into_tiles_of_one_length(loaded, tiny_one_d, photo):
    """90 x 60 pixels are 24 tiles of 16 x 16; what is shown, counted and taken home is what the library makes of it."""
    found = updates(loaded(tiny_one_d), photo, 4, tile=True)
    expected = encode_image(Image.open(photo), tiny_one_d, length=4 * 24, tile=True)
    path = next(each["download"]["value"] for each in found if "value" in each["download"])
    assert Path(path).read_bytes() == expected.data and OdpFile.from_bytes(expected.data).tiled
    _, restored = pair(found)
    assert restored.tobytes() == resized(decode_image(expected.data, tiny_one_d), (540, 360)).tobytes()
    status, codes = found[-1]["status"], found[-1]["codes"]
    assert "96 of 144 tokens of 24 tiles of 16 x 16." in status and f"<dd>{expected.psnr:.1f} dB</dd>" in status
    assert "the whole image" in codes and codes.count("4 of 6 used") == 24 and "Tile 24" in codes
    whole = updates(loaded(tiny_one_d), photo, 4)
    assert "4 of 6 tokens of a 16 x 16 square." in whole[-1]["status"]


def test_images_are_downloaded_under_names_that_tell_them_apart(loaded, tiny_one_d, photo, tmp_path):
    """Name, tokenizer and number of tokens; the other codecs' images by their bytes."""
    names = []
    for count, tile in ((4, False), (5, False), (4, True)):
        found = updates(loaded(tiny_one_d), photo, count, tile)
        paths = next(each["pair"]["value"] for each in found if "value" in each["pair"])
        names += [Path(path).name for path in paths]
        gallery = [Path(path).name for path, _ in found[-1]["codecs"]["value"]]
        assert gallery[0] == names[-1] and len({*gallery}) == len(gallery)
        assert all(re.fullmatch(r"photo-(jpeg|webp)-\d+-bytes\.png", name) for name in gallery[1:])
    originals, restored = names[::2], names[1::2]
    assert restored == ["photo-tiny-4-tokens.png", "photo-tiny-5-tokens.png", "photo-tiny-96-tokens-tiles.png"]
    assert {*originals} == {"photo-original.png"}
    (tmp_path / "home.odp").write_bytes(encode_image(Image.open(photo), tiny_one_d, length=3).data)
    shown = opened("tiny", tmp_path / "home.odp")[-1]["opened"]["value"]
    assert Path(shown).name == "home-tiny-3-tokens.png"


@pytest.mark.parametrize("made", ["vq", "rvq"])
def test_a_tokenizer_without_tiles_says_so(loaded, toasts, tiny_vq, photo, made):
    found = updates(loaded(tiny_vq if made == "vq" else tiny_tokenizers.made("rvq")), photo, 1, tile=True)
    assert len(toasts) == 1 and "tiny cannot cut images into tiles: choose a One-D-Piece" in toasts[0]
    assert all(update[name] == gr.skip() for update in found for name in tokenize.OUTPUTS[:-1])


def test_too_many_tiles_are_refused(loaded, toasts, tiny_one_d, photo, monkeypatch):
    monkeypatch.setattr(tiling, "_MOST_PIXELS", 23 * 16**2)
    updates(loaded(tiny_one_d), photo, 4, tile=True)
    assert len(toasts) == 1 and "24 tiles of 16 x 16 pixels, and this tab cuts at most 23" in toasts[0]


def test_the_box_for_tiles_has_a_line_of_help():
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app("tiny").config["components"]}
    assert fields["tile"]["value"] is False and "One-D-Piece only" in fields["tile"]["info"]


def test_a_file_comes_back_as_an_image(loaded, tiny_one_d, photo, tmp_path):
    data = encode_image(Image.open(photo), tiny_one_d, length=3).data
    (tmp_path / "photo.odp").write_bytes(data)
    found = opened(loaded(tiny_one_d), tmp_path / "photo.odp")[-1]
    image = decode_image(data, tiny_one_d)
    assert Image.open(found["opened"]["value"]).size == (540, 360) and image.size == (90, 60)
    assert "90 x 60 pixels from 3 tokens" in found["status"]
    assert not found["pair"]["visible"] and found["opened"]["visible"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"PNG" + data, "photo.odp is not an .odp file"),
        (lambda data: data[:-3], "damaged or cut short"),
        (lambda data: b"", "not an .odp file"),
        (lambda data: OdpFile("", 1, 9, 9, False, 5, (1, 2)).to_bytes(), "made with another tokenizer"),
    ],
)
def test_other_files_are_a_toast(loaded, toasts, tiny_one_d, photo, tmp_path, change, words):
    (tmp_path / "photo.odp").write_bytes(change(encode_image(Image.open(photo), tiny_one_d).data))
    found = opened(loaded(tiny_one_d), tmp_path / "photo.odp")
    assert len(toasts) == 1 and words in toasts[0] and str(tmp_path) not in toasts[0]
    assert found[-1]["opened"] == gr.skip() and "unchanged" in found[-1]["status"]


def test_a_file_needs_a_tokenizer_of_its_kind(loaded, toasts, tiny_vq, tiny_one_d, photo, tmp_path):
    (tmp_path / "photo.odp").write_bytes(encode_image(Image.open(photo), tiny_one_d).data)
    opened(loaded(tiny_vq), tmp_path / "photo.odp")
    opened("", tmp_path / "photo.odp")
    opened("tiny", None)
    assert "One-D-Piece" in toasts[0] and "names no bundled" in toasts[1] and "Give an .odp file" in toasts[2]


def test_a_file_of_a_bundled_tokenizer_names_it(loaded, tiny_one_d, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizing, "bundled_models", lambda kind: ["tiny"])
    found = updates(loaded(tiny_one_d), photo, 5)
    path = next(each["download"]["value"] for each in found if "value" in each["download"])
    assert OdpFile.from_bytes(Path(path).read_bytes()).tokenizer == "tiny"
    assert "<dd>tiny</dd>" in opened(None, path)[-1]["status"]


def test_levels_of_codes_are_a_grid_each_and_can_be_left_out(loaded, photo):
    name = loaded(tiny_tokenizers.made("rvq"))
    assert tokenizer_length_control(name).most == 3
    found = updates(name, photo, 2)[-1]
    assert found["codes"].count("<svg") == 3
    assert 'aria-label="Level 2: 64 of 64 used"' in found["codes"]
    assert 'aria-label="Level 3: 0 of 64 used"' in found["codes"]
    assert "128 tokens" in found["status"] and "<dd>64</dd>" in found["status"]


def test_numbers_without_codes_are_grey_and_have_no_bytes(loaded, photo):
    bridge = tiny_tokenizers.made("bridge")
    assert isinstance(bridge, TokenBridgeTokenizer)
    found = updates(loaded(bridge), photo)[-1]
    assert "Dimension 1" in found["codes"] and "bytes" in found["codecs"]["value"][0][1]
    found = updates(loaded(bridge.continuous), photo)[-1]
    assert "continuous numbers" in found["codes"] and "Channel 1" in found["codes"]
    assert found["codecs"] == gr.update(visible=False) and "bytes" not in found["status"]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (700, 9), (2600, 1400)])
def test_images_of_any_size(loaded, toasts, tiny_vq, tmp_path, size):
    Image.linear_gradient("L").resize(size).save(tmp_path / "image.png")
    original, restored = pair(updates(loaded(tiny_vq), tmp_path / "image.png"))
    assert original.size == restored.size and max(original.size) <= 1280 and not toasts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "Give an image"),
        ({"tokenizer": " "}, "Choose a tokenizer"),
        ({"tokenizer": None}, "Choose a tokenizer"),
        ({"tokenizer": "nobody-has-this"}, "no model or folder"),
        ({"count": 7}, "length must be a whole number from 1 to 6, not 7"),
        ({"count": 0}, "length must be a whole number from 1 to 6"),
        ({"count": 2.5}, "length must be a whole number from 1 to 6"),
        ({"count": "many"}, "length must be a whole number from 1 to 6"),
        ({"count": 7, "tile": True}, "length must be a whole number from 1 to 6, not 7"),
        ({"tile": "no"}, "True or False"),
    ],
)
def test_wrong_input_is_a_toast_and_loses_nothing(loaded, toasts, tiny_one_d, photo, changes, words):
    found = updates(**{"tokenizer": loaded(tiny_one_d), "image": photo, "count": 6, **changes})
    assert len(toasts) == 1 and words in toasts[0]
    assert all(update[name] == gr.skip() for update in found for name in tokenize.OUTPUTS[:-1])
    assert "unchanged" in found[-1]["status"]


def test_a_file_that_is_no_image_is_a_toast(loaded, toasts, tiny_vq, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    updates(loaded(tiny_vq), tmp_path / "notes.png")
    assert len(toasts) == 1 and "notes.png is not an image" in toasts[0] and str(tmp_path) not in toasts[0]


def test_a_folder_and_a_model_that_samples_have_their_tokenizer(toasts, tiny_folder, tiny_one_d, photo, tmp_path):
    tiny_one_d.save_pretrained(tmp_path)
    assert tokenizer_length_control(str(tmp_path)).most == 6 and tokenizer_length_control("owner/on-the-hub") is None
    assert "4 of 6 tokens" in updates(f" {tmp_path} ", photo, 4)[-1]["status"]
    assert tokenizer_length_control(str(tiny_folder)) is None
    assert "16 tokens" in updates(str(tiny_folder), photo)[-1]["status"] and not toasts
    assert list(models._tokenizers) == [str(tiny_folder)]


def test_a_reader_has_no_tokens_of_images(toasts, reader, photo, monkeypatch):
    monkeypatch.setattr("studio.load", lambda name, **_: reader, raising=False)
    monkeypatch.setattr(models, "_tokenizers", {})
    updates("some-reader", photo)
    assert len(toasts) == 1 and "makes no tokens of images" in toasts[0]


def test_choosing_a_tokenizer_shows_its_control(loaded, tiny_one_d, tiny_vq):
    tokenizer = loaded(tiny_one_d)
    settings = tokenize._control_settings(tokenizer_length_control(tokenizer))
    assert settings["visible"] and settings["maximum"] == settings["value"] == 6 and settings["label"] == "Length"
    assert tokenize._control_settings(tokenizer_length_control(loaded(tiny_vq))) == {"visible": False}
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app("tiny").config["components"]}
    assert "emoji-vq" in [name for name, _ in fields["tokenizer"]["choices"]]
    assert fields["tokenizer"]["value"] == "emoji-1d" and fields["scale"]["visible"] and fields["scale"]["value"] == 128


def test_closing_stops_before_the_next_codec(loaded, tiny_vq, photo, monkeypatch):
    """The first codec takes until the page was closed."""
    tried, begun, closed, ended = [], threading.Event(), threading.Event(), threading.Event()
    rival = tokenizing._rival

    def traced(codec, *rest):
        tried.append(codec)
        begun.set()
        closed.wait(20)
        found = rival(codec, *rest)
        ended.set()
        return found

    monkeypatch.setattr(tokenizing, "_rival", traced)

    async def close_at_once():
        work = tokenize.show_restoring(loaded(tiny_vq), {"path": photo}, 1)
        async for update in work:
            if "value" in update[0]:
                break
        await asyncio.to_thread(begun.wait, 20)
        await work.aclose()
        closed.set()

    asyncio.run(close_at_once())
    assert ended.wait(20)
    time.sleep(0.2)
    assert tried == ["webp"]


def test_programs_tokenize_too(client, loaded, tiny_one_d, photo):
    name = loaded(tiny_one_d)
    image, file, details = client.predict(handle_file(photo), name, 5, api_name="/tokenize")
    assert Image.open(image).size == (90, 60) and Path(file).suffix == ".odp"
    assert details["tokens"] == details["length"] == 5 and details["bytes"] == Path(file).stat().st_size
    assert details["bits"] == 25 and details["counted"] == "file" and set(details["beside"]) == {"webp", "jpeg"}
    assert details["beside"]["jpeg"]["best"] is None and details["beside"]["jpeg"]["smallest_file"] > 100
    back, told = client.predict(handle_file(file), name, api_name="/detokenize")
    assert told == {"tokenizer": name, "tokens": 5, "bytes": details["bytes"], "width": 90, "height": 60}
    expected = decode_image(Path(file).read_bytes(), tiny_one_d)
    for path in (image, back):
        assert Image.open(path).convert("RGB").tobytes() == expected.tobytes()
    with pytest.raises(Exception, match="length must be a whole number from 1 to 6"):
        client.predict(handle_file(photo), name, 9, api_name="/tokenize")
    _, file, details = client.predict(handle_file(photo), name, 1, True, api_name="/tokenize")
    assert OdpFile.from_bytes(Path(file).read_bytes()).tiled and details["tiles"] == details["tokens"] == 24


def test_programs_give_no_length_where_there_is_none(client, loaded, tiny_vq, photo):
    name = loaded(tiny_vq)
    _, file, details = client.predict(handle_file(photo), name, api_name="/tokenize")
    assert file is None and details["tokens"] == 16 and details["counted"] == "without fixed parts"
    with pytest.raises(Exception, match="restores from all of its tokens"):
        client.predict(handle_file(photo), name, 3, api_name="/tokenize")
