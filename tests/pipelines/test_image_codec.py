"""Images to bytes and back: sizes, tiles, targets, and files that do not belong."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from studio import OdpFile, StudioError, decode_image, encode_image
from studio.errors import Stopped
from studio.pipelines.image_codec import (
    count_tiles,
    image_psnr,
    smallest,
    tile_lengths,
    token_bits,
    tokenizer_checksum,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_one_d):
    return tiny_one_d


def image(width, height):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (9, 64)])
@pytest.mark.parametrize("tile", [False, True])
def test_the_size_is_restored(tokenizer, size, tile):
    encoded = encode_image(image(*size), tokenizer, tile=tile)
    restored = decode_image(encoded.data, tokenizer)
    assert restored.size == size and restored.mode == "RGB"
    tiles = math.ceil(size[0] / 16) * math.ceil(size[1] / 16) if tile else 1
    assert len(encoded.file.tokens) == 6 * tiles
    assert encoded.psnr == pytest.approx(image_psnr(restored, image(*size)))
    assert encoded.restored.tobytes() == restored.tobytes() and all(spent > 0 for spent in encoded.seconds.values())
    assert encoded.tokens.shape == (tiles, 6) and tuple(encoded.tokens.flatten().tolist()) == encoded.file.tokens
    assert OdpFile.from_bytes(encoded.data) == encoded.file


def test_a_square_of_the_tokenizers_size_is_what_the_tokenizer_makes_of_it(tokenizer):
    original = image(16, 16)
    images = torch.from_numpy(np.asarray(original).copy()).movedim(-1, 0)[None] / 127.5 - 1
    tokens = tokenizer.encode(images)
    encoded = encode_image(original, tokenizer, length=4)
    assert list(encoded.file.tokens) == tokens[0, :4].tolist()
    expected = ((tokenizer.decode(tokens, 4) + 1).clamp(0, 2) * 127.5).round()[0].movedim(0, -1)
    assert np.abs(np.asarray(decode_image(encoded.data, tokenizer)) - expected.detach().numpy()).max() <= 1


def test_tiles_are_images_of_their_own(tokenizer):
    """Each tile of an image, 13 tokens over 4 tiles, is restored as the tile alone with its share of the tokens."""
    original = image(32, 32)
    whole = decode_image(encode_image(original, tokenizer, tile=True, length=13).data, tokenizer)
    for index, (left, top) in enumerate([(0, 0), (16, 0), (0, 16), (16, 16)]):
        box = (left, top, left + 16, top + 16)
        alone = encode_image(original.crop(box), tokenizer, length=4 if index == 0 else 3)
        alone = np.asarray(decode_image(alone.data, tokenizer)).astype(int)
        assert np.abs(np.asarray(whole.crop(box)) - alone).max() <= 1


def test_bytes_are_a_limit_that_one_more_token_would_break(tokenizer):
    for size in (24, 26, 27, 28, 1000):
        encoded = encode_image(image(20, 20), tokenizer, size=size, name="tiny")
        assert len(encoded.data) <= size
        n = len(encoded.file.tokens)
        if n < 6:
            assert len(encode_image(image(20, 20), tokenizer, length=n + 1, name="tiny").data) > size
    with pytest.raises(StudioError, match="at least"):
        encode_image(image(20, 20), tokenizer, size=10)


@pytest.mark.parametrize("wish", [{"length": 9}, {"size": 40}, {}], ids=["length", "size", "all"])
def test_a_search_restores_better_in_a_file_of_the_same_form(tokenizer, wish):
    original = image(32, 32)
    plain, refined = (encode_image(original, tokenizer, tile=True, refine=steps, **wish) for steps in (0, 20))
    assert len(refined.data) == len(plain.data) and refined.psnr > plain.psnr
    assert decode_image(refined.data, tokenizer).tobytes() == refined.restored.tobytes()
    with pytest.raises(StudioError, match="refine must be a whole number"):
        encode_image(original, tokenizer, refine=-1)


def test_a_search_meets_a_target_that_the_encoder_does_not(tokenizer):
    original = image(16, 16)
    wish = encode_image(original, tokenizer, refine=20).psnr
    assert wish > encode_image(original, tokenizer).psnr
    assert encode_image(original, tokenizer, psnr=wish, refine=20).psnr >= wish


def test_psnr_is_a_target_that_is_met(tokenizer):
    original = image(16, 16)
    reached = [encode_image(original, tokenizer, length=n).psnr for n in range(1, 7)]
    for wish in (reached[0] - 1, reached[-1] - 0.01, reached[-1]):
        encoded = encode_image(original, tokenizer, psnr=wish)
        assert encoded.psnr >= wish and encoded.psnr == reached[len(encoded.file.tokens) - 1]
    assert len(encode_image(original, tokenizer, psnr=min(reached) - 1).file.tokens) == 1
    with pytest.raises(StudioError, match=f"{reached[-1]:.2f} dB"):
        encode_image(original, tokenizer, psnr=99)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 2), (3, 11), (1, 128)])
def test_bisection_finds_the_smallest(low, high):
    for answer in range(low, high + 1):
        asked = Asked(answer)
        assert smallest(asked, low, high) == answer
        assert asked.times <= math.ceil(math.log2(high - low + 1))


class Asked:
    """Whether a number is at least the answer, and how often that was asked."""

    def __init__(self, answer):
        self.answer, self.times = answer, 0

    def __call__(self, n):
        self.times += 1
        return n >= self.answer


def test_lengths_of_tiles():
    assert tile_lengths(13, 4) == [4, 3, 3, 3] and tile_lengths(8, 4) == [2] * 4
    assert all(sum(tile_lengths(n, 7)) == n for n in range(7, 50))


@pytest.mark.parametrize("wrong", [{"length": 7}, {"length": 0}, {"length": 1, "size": 50}, {"psnr": 9.0, "size": 50}])
def test_lengths_and_double_wishes_are_refused(tokenizer, wrong):
    with pytest.raises(StudioError):
        encode_image(image(16, 16), tokenizer, **wrong)
    with pytest.raises(StudioError, match="from 4 to 24"):
        encode_image(image(32, 32), tokenizer, length=3, tile=True)


def test_files_of_others_are_refused(tokenizer):
    encoded = encode_image(image(16, 16), tokenizer)
    torch.manual_seed(1)
    other = type(tokenizer)(**{key: value for key, value in tokenizer.config.items() if not key.startswith("_")})
    with pytest.raises(StudioError, match="another tokenizer"):
        decode_image(encoded.data, other.eval())
    for changes in ({"tokens": (1,) * 7}, {"bits": 6}, {"width": 40, "tiled": True, "tokens": (1, 2)}):
        wrong = dataclasses.replace(encoded.file, **changes)
        with pytest.raises(StudioError, match="damaged"):
            decode_image(wrong.to_bytes(), tokenizer)


def test_the_checksum_knows_every_weight_and_no_precision(tokenizer, tmp_path):
    checksum = tokenizer_checksum(tokenizer)
    tokenizer.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.to(torch.float32)
    again = type(tokenizer).from_pretrained(tmp_path, dtype=torch.float32)
    assert tokenizer_checksum(again) == tokenizer_checksum(tokenizer) == checksum
    with torch.no_grad():
        again.decoder.ffn[2].bias[0] += 1
    assert tokenizer_checksum(again) != checksum


def test_the_work_of_tiles_is_bounded_before_it_begins(tiny_one_d, monkeypatch):
    """A line of two million pixels has as many tiles as an image of half a thousand million."""
    monkeypatch.setattr(type(tiny_one_d), "decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(type(tiny_one_d), "encode", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr("studio.pipelines.image_codec.MOST_TILE_PIXELS", 16**2 * 1000)
    line = OdpFile("", tokenizer_checksum(tiny_one_d), 2_097_151, 1, True, token_bits(tiny_one_d), (1,) * 131_072)
    with pytest.raises(StudioError, match="131072 tiles of 16 x 16"):
        decode_image(line, tiny_one_d)
    with pytest.raises(StudioError, match="2000 tiles"):
        encode_image(Image.new("RGB", (32_000, 1)), tiny_one_d, tile=True)


def test_every_image_that_is_read_may_be_cut_into_tiles():
    """Those of 64 million pixels, and of the thinnest shape, with the bundled tokenizer and one of twice its side."""
    for side in (64, 128, 256):
        for size in ((8000, 8000), (80_000, 800), (800, 8), (8, 800)):
            assert count_tiles(size, side) >= 1
        with pytest.raises(StudioError, match="tiles"):
            count_tiles((2_097_151, 1), side)


@pytest.mark.parametrize("wish", [{}, {"refine": 3}, {"psnr": 5}], ids=str)
def test_work_on_tiles_can_be_stopped(tiny_one_d, wish):
    """It is called before each batch, so at most one batch is computed after it returns True."""
    image = Image.new("RGB", (16 * 20, 16 * 10))
    asked = []
    with pytest.raises(Stopped):
        encode_image(image, tiny_one_d, tile=True, stopped=lambda: asked.append(1) or len(asked) > 2, **wish)
    assert len(asked) == 3
    data = encode_image(image, tiny_one_d, tile=True).data
    with pytest.raises(Stopped):
        decode_image(data, tiny_one_d, stopped=lambda: True)
    assert decode_image(data, tiny_one_d, stopped=lambda: False).size == image.size


@pytest.mark.parametrize("wish", [{"length": 2.5}, {"length": 10**30}, {"psnr": "20"}, {"size": None, "psnr": np.nan}])
def test_wishes_of_no_number_are_refused(tiny_one_d, wish):
    with pytest.raises(StudioError):
        encode_image(Image.new("RGB", (16, 16)), tiny_one_d, **wish)
