"""The `.odp` file: the packed tokens of an image, with at most 32 bytes around them.

| bytes | content |
|---|---|
| 3 | `ODP` |
| 1 | version of the format, 1 |
| 1 | bits of a token number; 128 is added when the image is cut into tiles |
| 1 + k | length k of the tokenizer's name, at most 8, and the name in ASCII; empty for one that is not bundled |
| 4 | checksum of the tokenizer |
| 1-3, 1-3 | width and height of the image in pixels |
| 1-4 | number n of tokens |
| ceil(bits n / 8) | token numbers, highest bit first, the last byte filled up with zeros |
| 4 | CRC-32 of all bytes before |

Checksums are big-endian; width, height and n are written in groups of seven bits, lowest first, with 128 added to all
but the last (LEB128). Scope: bytes. `studio.pipelines.image_codec` encodes and decodes images.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from studio.checks import shown
from studio.errors import StudioError

MAGIC, VERSION = b"ODP", 1
MOST_NAME = 8
MOST_PIXELS = 64_000_000
MOST_TOKENS = 1 << 21
_TILED = 0x80
_MOST_BITS = 24
_SIDE_BYTES, _COUNT_BYTES = 3, 4
_CHECKSUM_BYTES = 4
_AT_ONCE = 1 << 16  # tokens, of which eight are whole bytes


@dataclass(frozen=True)
class OdpFile:
    """What an `.odp` file holds.

    Args:
        tokenizer: name of the bundled tokenizer, or empty.
        checksum: of the tokenizer's weights, 32 bits.
        width, height: size of the image in pixels.
        tiled: whether the image is cut into tiles, whose tokens follow one another.
        bits: of a token number.
        tokens: the numbers (n,).

    Raises:
        StudioError: values that the format cannot hold.
    """

    tokenizer: str
    checksum: int
    width: int
    height: int
    tiled: bool
    bits: int
    tokens: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.tokenizer, str) or not re.fullmatch(rf"[\x21-\x7e]{{0,{MOST_NAME}}}", self.tokenizer):
            named = shown(self.tokenizer)
            raise StudioError(f"A tokenizer's name in a file has at most {MOST_NAME} letters, not {named}.")
        if min(self.width, self.height) < 1 or self.width * self.height > MOST_PIXELS:
            raise StudioError(f"A file holds an image of 1 to 64 million pixels, not {self.width} x {self.height}.")
        if not 1 <= self.bits <= _MOST_BITS:
            raise StudioError(f"A token number has from 1 to {_MOST_BITS} bits in a file, not {self.bits}.")
        if not 1 <= len(self.tokens) <= MOST_TOKENS:
            raise StudioError(f"A file holds from 1 to {MOST_TOKENS} tokens, not {len(self.tokens)}.")
        if not 0 <= min(self.tokens) <= max(self.tokens) < 1 << self.bits:
            raise StudioError(f"Not all token numbers fit into {self.bits} bits.")

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        content = self._header() + pack(self.tokens, self.bits)
        return content + _crc(content)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the packed token numbers alone."""
        return payload_bytes(len(self.tokens), self.bits)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "The file") -> "OdpFile":
        """Parses the bytes of a file.

        Args:
            data: the bytes.
            name: of the file in messages.

        Raises:
            StudioError: bytes that are not an `.odp` file, of a later version, truncated or damaged.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise StudioError(f"{name} must be given as bytes, not as a {type(data).__name__}.")
        data = bytes(data)
        if data[: len(MAGIC)] != MAGIC:
            raise StudioError(f"{name} is not an .odp file: write one with `studio tokenize`.")
        if len(data) > 3 and data[3] != VERSION:
            raise StudioError(f"{name} is an .odp file of version {data[3]}; this Studio reads version {VERSION}.")
        if len(data) <= len(MAGIC) + 1 + _CHECKSUM_BYTES:
            raise StudioError(f"{name} is cut short: it ends within its header.")
        if _crc(data[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
            raise StudioError(f"{name} is damaged or cut short: its checksum is not that of its content.")
        reader = _Reader(data[:-_CHECKSUM_BYTES], len(MAGIC) + 1)
        damaged = f"{name} is not a whole .odp file: its header does not fit its content."
        try:
            tokenizer, checksum, width, height, tiled, bits, count = reader.header()
        except ValueError as error:
            raise StudioError(damaged) from error
        if count > MOST_TOKENS:
            raise StudioError(f"{name} says that it holds {count} tokens: at most {MOST_TOKENS} are read.")
        try:
            payload = reader.take(payload_bytes(count, bits))
            if reader.place != len(reader.data):
                raise ValueError("more bytes than tokens")
            tokens = tuple(unpack(payload, bits, count))
            file = cls(tokenizer, checksum, width, height, tiled, bits, tokens)
            if file.to_bytes() != data:
                raise ValueError("another way of writing the same")
        except ValueError as error:
            raise StudioError(damaged) from error
        return file

    def _header(self) -> bytes:
        name = self.tokenizer.encode("ascii")
        return b"".join(
            (
                MAGIC,
                bytes((VERSION, self.bits | (_TILED if self.tiled else 0), len(name))),
                name,
                self.checksum.to_bytes(_CHECKSUM_BYTES, "big"),
                *(_number(value) for value in (self.width, self.height, len(self.tokens))),
            )
        )


class _Reader:
    """Reads bytes in order; raises `ValueError` at the end."""

    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place

    def header(self) -> tuple[str, int, int, int, bool, int, int]:
        """The fields of an `OdpFile` without its tokens, and the number of tokens."""
        flags, name_length = self.take(1)[0], self.take(1)[0]
        bits = flags & ~_TILED
        if not 1 <= bits <= _MOST_BITS:
            raise ValueError("no bits, or too many")
        tokenizer = self.take(name_length).decode("ascii")
        checksum = int.from_bytes(self.take(_CHECKSUM_BYTES), "big")
        width, height, count = self.number(_SIDE_BYTES), self.number(_SIDE_BYTES), self.number(_COUNT_BYTES)
        return tokenizer, checksum, width, height, bool(flags & _TILED), bits, count

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = self.data[self.place : self.place + count]
        if len(taken) < count:
            raise ValueError("too few bytes")
        self.place += count
        return taken

    def number(self, most_bytes: int) -> int:
        """The next LEB128 number, of at most so many bytes."""
        value = 0
        for index in range(most_bytes):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value
        raise ValueError("a number without an end")


def payload_bytes(count: int, bits: int) -> int:
    """Number of bytes that hold `count` tokens of `bits` bits."""
    return -(-count * bits // 8)


def pack(tokens: Sequence[int], bits: int) -> bytes:
    """Tokens (n,) as bits, highest first, padded with zeros to whole bytes."""
    numbers = np.asarray(tokens, dtype=np.int32)
    places = np.arange(bits - 1, -1, -1, dtype=np.int32)
    parts = [numbers[start : start + _AT_ONCE, None] for start in range(0, len(numbers), _AT_ONCE)]
    return b"".join(np.packbits((part >> places & 1).astype(np.uint8)).tobytes() for part in parts)


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    """The first `count` tokens of packed bytes."""
    packed, values = np.frombuffer(data, dtype=np.uint8), 1 << np.arange(bits - 1, -1, -1, dtype=np.int32)
    numbers: list[int] = []
    for start in range(0, count, _AT_ONCE):
        some = min(_AT_ONCE, count - start)
        flat = np.unpackbits(packed[start * bits // 8 :][: payload_bytes(some, bits)], count=some * bits)
        numbers += (flat.reshape(some, bits) @ values).tolist()
    return numbers


def _number(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "big")
