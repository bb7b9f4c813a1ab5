"""The .odp file: a round trip, its size, and the refusal of every byte that is not as it was written."""

import random
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio import StudioError
from studio.pipelines.odp_file import MAGIC, VERSION, OdpFile, pack, payload_bytes, unpack

at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def file(**changes):
    whole = {"tokenizer": "emoji-1d", "checksum": 0xDEADBEEF, "width": 640, "height": 480, "tiled": False, "bits": 12}
    return OdpFile(**{**whole, "tokens": (0, 4095, 17, 2048, 1), **changes})


def textbook_pack(tokens, bits):
    text = "".join(f"{token:0{bits}b}" for token in tokens)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


@at_any_speed
@given(st.integers(1, 24).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_packing_is_the_textbooks_and_comes_back(case):
    bits, tokens = case
    packed = pack(tokens, bits)
    assert packed == textbook_pack(tokens, bits)
    assert unpack(packed, bits, len(tokens)) == tokens


@pytest.mark.parametrize(("n", "expected"), [(1, 2), (8, 12), (16, 24), (32, 48), (64, 96), (128, 192), (256, 384)])
def test_two_tokens_of_twelve_bits_are_three_bytes(n, expected):
    assert payload_bytes(n, 12) == expected == len(pack([1] * n, 12))


@at_any_speed
@given(
    st.text("abz-19", max_size=8),
    st.integers(0, 2**32 - 1),
    st.integers(1, 8000),
    st.integers(1, 8000),
    st.booleans(),
    st.lists(st.integers(0, 4095), min_size=1, max_size=50),
)
def test_a_file_comes_back_with_at_most_32_bytes_around_the_tokens(name, checksum, width, height, tiled, tokens):
    written = file(
        tokenizer=name, checksum=checksum, width=width, height=height, tiled=tiled, tokens=tuple(tokens)
    )  # fmt: skip
    data = written.to_bytes()
    assert OdpFile.from_bytes(data) == written
    assert written.payload_bytes <= len(data) <= written.payload_bytes + 32


def test_the_widest_header_has_32_bytes():
    widest = file(width=2**14, height=3000, tokens=(1,) * 2**21)
    assert len(widest.to_bytes()) - widest.payload_bytes <= 32


def test_every_changed_byte_is_noticed():
    data = file().to_bytes()
    for place in range(len(data)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= change
            with pytest.raises(StudioError, match="image.odp"):
                OdpFile.from_bytes(bytes(damaged), "image.odp")


def test_every_cut_and_every_addition_is_noticed():
    data = file().to_bytes()
    for length in range(len(data)):
        with pytest.raises(StudioError):
            OdpFile.from_bytes(data[:length])
    with pytest.raises(StudioError, match="damaged"):
        OdpFile.from_bytes(data + b"\0")


def test_messages_give_the_reason():
    data = file().to_bytes()
    for content, reason in (
        (b"", "not an .odp file"),
        (b"\x89PNG\r\n", "not an .odp file"),
        (data[:3] + b"\2" + data[4:], "version 2"),
        (data[:6], "cut short"),
        (data[:-1], "damaged or cut short"),
    ):
        with pytest.raises(StudioError, match=reason):
            OdpFile.from_bytes(content)


def test_headers_that_lie_are_refused_though_their_checksum_is_right():
    """Random headers of seed 0 with a right checksum: each is refused, or is what such a file would be written as."""
    from studio.pipelines.odp_file import _crc

    rng, whole = random.Random(0), file().to_bytes()[:-4]
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(4, len(content))] = rng.randrange(256)
        data = bytes(content) + _crc(bytes(content))
        try:
            assert OdpFile.from_bytes(data).to_bytes() == data
        except StudioError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokenizer": "emoji-one-d"},
        {"tokenizer": "é"},
        {"width": 0},
        {"width": 9000, "height": 9000},
        {"bits": 0},
        {"bits": 25},
        {"tokens": ()},
        {"tokens": (4096,)},
        {"tokens": (-1,)},
    ],
)
def test_what_the_format_cannot_hold_is_refused(wrong):
    with pytest.raises(StudioError):
        file(**wrong)


def test_a_short_file_that_would_expand_is_refused_at_once():
    """Ten million bytes of one-bit tokens were eighty million numbers."""
    payload = bytes(10_000_000)
    count = 8 * len(payload)
    groups = bytes(((count >> shift) & 0x7F) | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
    content = MAGIC + bytes((VERSION, 1, 0)) + bytes(4) + b"\x10\x10" + groups + payload
    began = time.monotonic()
    with pytest.raises(StudioError, match="at most 2097152 are read"):
        OdpFile.from_bytes(content + zlib.crc32(content).to_bytes(4, "big"))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("bits", [1, 7, 24])
def test_many_tokens_are_packed_as_few_are(bits):
    rng = np.random.default_rng(bits)
    tokens = rng.integers(0, 1 << bits, 2 * 65_536 + 13).tolist()
    data = pack(tokens, bits)
    text = "".join(f"{token:0{bits}b}" for token in tokens)
    assert data == int(text.ljust(8 * len(data), "0"), 2).to_bytes(len(data), "big")
    assert unpack(data, bits, len(tokens)) == tokens


@pytest.mark.parametrize("data", [None, "ODP", 3, [1, 2]])
def test_what_is_no_bytes_is_refused(data):
    with pytest.raises(StudioError, match="given as bytes"):
        OdpFile.from_bytes(data)
