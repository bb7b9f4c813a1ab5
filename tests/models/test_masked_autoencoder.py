"""Images that are not equally far in one call of a masked autoencoder."""

import torch

from studio.models.masked_autoencoder import Masked, MaskedAutoencoder
from tests.decoding.tiny_mar import tiny_mar

MODEL = tiny_mar().double()


def parts():
    """Images with no, five, nine and five visible tokens; the third and the last are guided."""
    torch.manual_seed(1)
    found = []
    for images, visible, wanted, streams in ((1, 0, 7, 1), (2, 5, 3, 1), (1, 9, 7, 2), (3, 5, 1, 2)):
        order = torch.rand(images, 16).argsort(dim=1)
        labels = torch.arange(streams * images) % 5
        drop = torch.arange(streams * images) >= images
        with torch.no_grad():
            buffer, _ = MODEL.embed_condition(class_labels=labels, drop=drop)
        tokens = torch.randn(images, 16, 4, dtype=torch.float64)
        found.append(Masked(tokens, order[:, :visible], order[:, 16 - wanted :], buffer))
    return found


@torch.no_grad()
def furthest():
    together = MODEL.conditions_together(parts())
    alone = [MODEL.conditions(*part) for part in parts()]
    assert [found.shape for found in together] == [expected.shape for expected in alone]
    return max(float((found - expected).abs().max()) for found, expected in zip(together, alone))


def test_conditions_do_not_depend_on_company():
    assert furthest() < 1e-10


def test_padding_that_is_read_would_be_noticed(monkeypatch):
    """The negative controls: what pads rows with fewer tokens is attended to, or takes a place."""
    encode, places = MaskedAutoencoder.encode, MaskedAutoencoder.decoder_input
    monkeypatch.setattr(MaskedAutoencoder, "encode", lambda self, *given: encode(self, *given[:3]))
    assert furthest() > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(MaskedAutoencoder, "decoder_input", lambda self, *given: places(self, *given[:2]))
    assert furthest() > 1e-3
