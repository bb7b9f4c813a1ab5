"""Pixels of one seed, whatever it was sampled with."""

import pytest
import torch

from studio import load
from studio.errors import StudioError


@pytest.mark.parametrize("model", ["emoji-ar", "emoji-bridge"])
def test_pixels_do_not_depend_on_the_batch(model):
    pipe = load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    streams = [torch.Generator().manual_seed(seed) for seed in range(4)]
    out = pipe("a red apple", num_images_per_prompt=4, generator=streams, output_type="pt")
    for seed, tokens, image in zip(range(4), out.tokens, out.images):
        alone = pipe("a red apple", generator=torch.Generator().manual_seed(seed), output_type="pt")
        assert torch.equal(alone.tokens[0], tokens) and torch.equal(alone.images[0], image)


def test_pixels_that_are_no_numbers_are_refused():
    pipe = load("emoji-ar", device="cpu")
    with pytest.raises(StudioError, match="no finite pixels"):
        pipe.postprocess(torch.full((1, 3, 4, 4), torch.nan), "pil")
