"""A tokenizer beside JPEG and WebP: what is counted, and where a codec has no file that small."""

from html import escape

from studio.ui.jobs.tokenize_job import CODECS


def codec_caption(name, size, psnr):
    """What stands below a codec's image."""
    return f"{name} · {size} bytes · {psnr:.1f} dB"


def counted_bytes(way, found):
    """Bytes of an `Encoded` image as they are counted beside a `Restoration`."""
    return way.size if found.file else way.size - way.fixed


def comparison_note(found):
    """Say what the bytes of a `Restoration` are, and what those of the other codecs."""
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
    return _note(" ".join((counted, given, *(_least(rival, found) for rival in found.rivals))))


def _least(rival, found):
    """Whether a codec has any whole file that small."""
    name = CODECS[rival.codec]
    if rival.least <= found.bytes:
        return f"The smallest whole {name} file has {rival.least} bytes."
    return f"{name} has no file of {found.bytes} bytes: the smallest has {rival.least}."


def _note(text):
    return f'<p class="studio-note">{escape(text)}</p>'
