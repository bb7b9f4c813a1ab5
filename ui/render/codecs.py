"""Captions and notes that compare a tokenizer with JPEG and WebP in bytes."""

from html import escape
from typing import TYPE_CHECKING

from studio.ui.jobs.tokenize_job import CODECS, Restoration, Rival

if TYPE_CHECKING:
    from studio.bench.rate_distortion import Encoded


def codec_caption(name: str, size: int, psnr: float) -> str:
    """The caption of a codec's image."""
    return f"{name} · {size} bytes · {psnr:.1f} dB"


def counted_bytes(way: "Encoded", found: Restoration) -> int:
    """The bytes of an encoded image, counted as those of a `Restoration`."""
    return way.size if found.file else way.size - way.fixed


def comparison_note(found: Restoration) -> str:
    """A note on which bytes are counted of a `Restoration` and of the other codecs."""
    if found.bytes is None:
        return _note("Its tokens are continuous numbers, which have no size in bytes to compare.")
    if found.file:
        counted = "Whole files are counted, with headers and checksums."
    else:
        counted = (
            "Token numbers alone are counted, packed, and of JPEG and WebP what is left without headers and tables."
        )
    if found.tiles:
        given = "All were given the whole image; JPEG and WebP may shrink it."
    else:
        given = f"All were given the same {found.side} x {found.side} square; JPEG and WebP may shrink it further."
    return _note(" ".join((counted, given, *(_smallest(rival, found) for rival in found.rivals))))


def _smallest(rival: Rival, found: Restoration) -> str:
    name = CODECS[rival.codec]
    if found.bytes is not None and rival.smallest <= found.bytes:
        return f"The smallest whole {name} file has {rival.smallest} bytes."
    return f"{name} has no file of {found.bytes} bytes: the smallest has {rival.smallest}."


def _note(text: str) -> str:
    return f'<p class="studio-note">{escape(text)}</p>'
