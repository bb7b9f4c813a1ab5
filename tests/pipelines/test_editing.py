"""Editing with tiny pipelines: kept pixels, windows, seams, variations, sizes, and bad input in one sentence."""

import inspect
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from studio import ContinuousSpeculative, Distilled, Jacobi, LlamaGenPipeline, StudioError
from studio.pipelines.canvas import EditRequest, blended, cover, fill_hidden, hidden_cells, read_mask, resized

GRIDS = ["tiny_pipeline", "tiny_mar_pipeline", "tiny_bridge_pipeline", "tiny_resgen_pipeline"]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def photo(width=40, height=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box(size, top, left, height, width):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def encoded(pipe, pixels):
    """The tokens of an array."""
    side = pipe.image_grid()[0]
    return pipe._encoded(resized(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255, side, side))


@pytest.fixture(params=GRIDS)
def pipe(request):
    pipe = request.getfixturevalue(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("soft_edge", [None, 0, 5])
def test_kept_pixels_are_equal_and_redrawn_ones_change(pipe, soft_edge):
    pixels, mask = photo(), box((24, 40), 6, 10, 12, 13)
    out = pipe(
        "a red apple", image=Image.fromarray(pixels), mask_image=Image.fromarray(mask), num_images_per_prompt=2,
        generator=streams(0, 1), soft_edge=soft_edge,
    )  # fmt: skip
    for image in out.images:
        assert image.size == (40, 24)
        assert np.array_equal(np.asarray(image)[~mask], pixels[~mask])
        assert not np.array_equal(np.asarray(image)[mask], pixels[mask])
    assert not np.array_equal(*map(np.asarray, out.images))
    assert out.approximate == isinstance(pipe, LlamaGenPipeline)
    assert out.stats.target_calls > 0 and len(out.prompts) == 2


def test_forms_of_image_mask_and_output_agree(pipe):
    pixels, mask = photo(16, 16), box((16, 16), 8, 0, 8, 16)
    tensor, levels = torch.from_numpy(pixels).movedim(-1, 0) / 255, torch.from_numpy(mask).float()[None]
    results = [
        pipe("a red apple", image=image, mask_image=white, generator=streams(0), output_type="pt").images
        for image, white in (
            (Image.fromarray(pixels), Image.fromarray(mask)), (pixels, mask), (pixels / 255, mask[..., None] * 1.0),
            (tensor, levels), (tensor[None], levels[None]),
            (Image.fromarray(pixels), Image.fromarray(mask).convert("RGB")),
        )
    ]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0][0][:, :8], tensor[:, :8])
    array = pipe("a red apple", image=pixels, mask_image=mask, generator=streams(0), output_type="np").images
    assert torch.equal(torch.from_numpy(array).movedim(-1, 1), results[0])
    tokens = pipe("a red apple", image=pixels, mask_image=mask, generator=streams(0), output_type="tokens")
    assert torch.equal(tokens.images, tokens.tokens)
    images, _, stats = pipe("a red apple", image=pixels, mask_image=mask, generator=streams(0), return_dict=False)
    assert images[0].size == (16, 16) and stats.tokens > 0


def test_a_batch_is_its_single_edits(pipe):
    pixels, mask = photo(16, 16), box((16, 16), 4, 4, 8, 8)
    call = {"image": pixels, "mask_image": mask, "strength": 0.5, "output_type": "pt"}
    together = pipe(["a red apple", "blue sky"], generator=streams(3, 4), **call).images
    for row, (prompt, seed) in enumerate((("a red apple", 3), ("blue sky", 4))):
        torch.testing.assert_close(pipe(prompt, generator=streams(seed), **call).images[0], together[row])


def test_the_lower_half_is_continued_exactly_in_raster_order(tiny_pipeline):
    """Known tokens that all stand before the others: no approximation, and Jacobi decoding gives the same image."""
    call = {"image": photo(16, 16), "mask_image": box((16, 16), 8, 0, 8, 16)}
    out = tiny_pipeline("a red apple", generator=streams(0), **call)
    assert not out.approximate
    again = tiny_pipeline("a red apple", generator=streams(0), decoding=Jacobi(4), **call)
    assert torch.equal(again.tokens, out.tokens)


def test_cspd_edits(tiny_mar_pipeline):
    pixels, mask = photo(16, 16), box((16, 16), 4, 4, 8, 8)
    out = tiny_mar_pipeline(
        "a red apple", image=pixels, mask_image=mask, generator=streams(0), decoding=ContinuousSpeculative(prefill=0.0)
    )
    assert np.array_equal(np.asarray(out.images[0])[~mask], pixels[~mask]) and 0 <= out.stats.acceptance <= 1


def test_expanding_keeps_the_middle(pipe):
    pixels = photo(16, 16)
    out = pipe("a red apple", image=pixels, expand={"left": 8, "right": 16, "top": 3}, generator=streams(0))
    result = np.asarray(out.images[0])
    assert result.shape == (19, 40, 3) and np.array_equal(result[3:, 8:24], pixels)
    assert len(np.unique(result[:, 24:].reshape(-1, 3), axis=0)) > 8


def test_variations_redraw_their_share_of_cells(pipe):
    pixels = photo(16, 16)
    known = encoded(pipe, pixels)
    out = pipe.variations(pixels, 0.25, prompt="a red apple", generator=streams(0))
    differ = (out.tokens != known).flatten(2).any(dim=2) if known.ndim == 3 else out.tokens != known
    assert 1 <= int(differ.sum()) <= round(0.25 * known.shape[1])


def test_a_row_keeps_its_first_tokens(tiny_row_pipeline):
    tiny_row_pipeline.set_progress_bar_config(disable=True)
    pixels = photo(30, 20)
    known = encoded(tiny_row_pipeline, pixels)
    out = tiny_row_pipeline.variations(pixels, 0.5, prompt="a red apple", generator=streams(0))
    assert torch.equal(out.tokens[:, :3], known[:, :3]) and out.images[0].size == (30, 20) and not out.approximate
    for placed in (
        {"mask_image": box((20, 30), 0, 0, 9, 9)}, {"expand": {"left": 8}},
        {"strength": 0.5, "padding_mask_crop": 4}, {"strength": 0.5, "soft_edge": 2},
    ):  # fmt: skip
        with pytest.raises(StudioError, match="are a row and have no places"):
            tiny_row_pipeline("a red apple", image=pixels, **placed)


def test_classes_and_interruption(tiny_mar_class_pipeline):
    pixels, mask = photo(16, 16), box((16, 16), 0, 0, 8, 16)
    out = tiny_mar_class_pipeline(class_labels=[1, 2], image=pixels, mask_image=mask, generator=streams(0, 1))
    assert len(out.images) == 2 and out.prompts is None

    def stop(pipe, step, _, tensors):
        pipe._interrupt = True

    stopped = tiny_mar_class_pipeline(
        class_labels=1, image=pixels, expand={"left": 32}, generator=streams(0), callback_on_step_end=stop
    )
    assert stopped.stats.target_calls == 1 and stopped.images[0].size == (48, 16)


def test_windows_cover_the_mask_with_known_overlap():
    mask = torch.zeros(64, 256, dtype=torch.bool)
    mask[:, :100], mask[:, 164:] = True, True
    left = mask.clone()
    for window, hidden in cover(mask, 64):
        assert torch.equal(hidden, window.of(left)) and 2 * int(hidden.sum()) <= 64 * 64
        window.of(left)[:] = False
    assert not left.any()
    small = torch.zeros(64, 256, dtype=torch.bool)
    small[20:30, 100:140] = True
    [(window, hidden)] = cover(small, 64)
    assert (window.top, window.left) == (0, 88) and int(hidden.sum()) == 400
    request = EditRequest(photo(256, 64), small.numpy(), padding_mask_crop=4)
    [(window, _)] = request.windows(small)
    assert window == (1, 96, 48, 48)


def test_hidden_cells():
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    hidden[3:5, 15] = True
    assert hidden_cells(hidden, 4, 16, 1.0, [None])[0].nonzero()[:, 0].tolist() == [3, 7]
    half = hidden_cells(torch.ones(16, 16), 4, 16, 0.5, streams(0, 1))
    assert half.sum(dim=1).tolist() == [8, 8] and not torch.equal(*half)
    assert hidden_cells(hidden, None, 6, 0.5, [None]).tolist() == [[False] * 3 + [True] * 3]


def test_hidden_pixels_do_not_reach_the_encoder(pipe):
    """Another content under the mask gives the same edit."""
    one, other = photo(16, 16), photo(16, 16)
    mask = box((16, 16), 4, 4, 8, 8)
    other[mask] = 255 - other[mask]
    first, second = (
        pipe("a red apple", image=pixels, mask_image=mask, generator=streams(0), output_type="pt").images
        for pixels in (one, other)
    )
    assert torch.equal(first, second)


def test_filling_and_soft_edges():
    pixels, known = torch.full((1, 3, 11, 13), 0.25), torch.zeros(1, 1, 11, 13, dtype=torch.bool)
    known[..., :2] = True
    torch.testing.assert_close(fill_hidden(pixels * known, known), pixels)
    hidden, original = ~known[0, 0], torch.full((1, 3, 11, 13), 0.5)
    flat = blended(torch.full_like(original, 0.3), original, hidden, 4)[0, 0, 5]
    torch.testing.assert_close(flat[:8], torch.tensor([0.5, 0.5, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3]))
    assert torch.equal(blended(original * 0, original, hidden, 0)[..., 2:], original[..., 2:] * 0)


def slowly_blended(sampled, original, hidden, reach):
    """As of `blended`, by averages over all pixels, again for each pixel of `reach`."""
    known = (~hidden).float()
    filled, near = original * known, torch.zeros(hidden.shape)
    for _ in range(reach):
        weight = F.avg_pool2d(known[None, None], 3, stride=1, padding=1)
        means = F.avg_pool2d(filled, 3, stride=1, padding=1) / weight.clamp(min=0.01)
        filled, known = torch.where(known > 0, filled, means), (weight[0, 0] > 0).float()
        near += known
    return torch.where(hidden, torch.lerp(sampled, filled, near / reach), original)


def test_a_soft_edge_is_the_mean_of_what_is_nearer():
    generator = torch.Generator().manual_seed(0)
    sampled, original = torch.rand(2, 2, 3, 21, 33, generator=generator)
    for share, reach in ((0.5, 3), (0.97, 6), (0.998, 40)):
        hidden = torch.rand(21, 33, generator=generator) < share
        expected = slowly_blended(sampled, original, hidden, reach)
        torch.testing.assert_close(blended(sampled, original, hidden, reach), expected)


def test_a_wide_soft_edge_takes_no_longer_than_a_narrow_one():
    pixels, hidden = torch.zeros(1, 3, 384, 384), torch.ones(384, 384, dtype=torch.bool)
    hidden[0, 0] = False
    began = time.process_time()
    blended(pixels, pixels, hidden, 383)
    assert time.process_time() - began < 3


def test_a_mask_of_another_size_is_resized_with_a_warning():
    with pytest.warns(UserWarning, match="The mask has 8 x 4 pixels, the image 16 x 8: it is resized"):
        white = read_mask(box((4, 8), 1, 2, 2, 3), (8, 16))
    assert torch.equal(white, torch.from_numpy(box((8, 16), 2, 4, 4, 6)))


IMAGE, MASK = photo(16, 16), box((16, 16), 0, 0, 8, 8)
BAD = {
    "There is no image to edit": {"mask_image": MASK},
    "no white, so nothing would be redrawn": {"mask_image": np.zeros((16, 16))},
    "white everywhere, so nothing": {"mask_image": np.ones((16, 16))},
    "white everywhere": {},
    "at least 8 a side": {"image": photo(7, 16), "mask_image": MASK},
    "prompt is empty": {"mask_image": MASK, "prompt": None},
    "strength must be a finite number above 0": {"mask_image": MASK, "strength": 0},
    "at most 1": {"mask_image": MASK, "strength": 1.5},
    "leave it out where you expand": {"expand": {"left": 8}, "strength": 0.5},
    "expand names sides": {"expand": {"west": 8}},
    "expand left must be": {"expand": {"left": -1}},
    "expand names": {"expand": 3},
    "padding_mask_crop must be": {"mask_image": MASK, "padding_mask_crop": -1},
    "soft_edge must be": {"mask_image": MASK, "soft_edge": 1.5},
    "and soft_edge belong to a mask": {"strength": 0.5, "soft_edge": 4},
    "padding_mask_crop and soft_edge belong": {"strength": 0.5, "padding_mask_crop": 4},
    "The image is a PIL image": {"image": "photo.png", "mask_image": MASK},
    "The image has the shape": {"image": photo(16, 16)[..., 0], "mask_image": MASK},
    r"numbers outside \[0, 1\]": {"image": IMAGE * 1.0, "mask_image": MASK},
    "The image has the type": {"image": IMAGE.astype(int), "mask_image": MASK},
    "The mask is a PIL image": {"mask_image": "mask.png"},
    "The mask has the shape": {"mask_image": photo(16, 16)},
    "knows no masks": {"masks": MASK},
    "more than 256 windows": {"image": photo(8, 8), "expand": {"right": 4000}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_sentence(message, tiny_mar_pipeline):
    call = {"prompt": "a red apple", "image": None if "There is no" in message else IMAGE, **BAD[message]}
    with pytest.raises(StudioError, match=message) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_mar_pipeline(**call)
    assert str(error.value).count(". ") == 0


def test_what_cannot_edit(tiny_rq_pipeline, tiny_pipeline):
    with pytest.raises(StudioError, match="generates whole images only"):
        tiny_rq_pipeline("a red apple", image=IMAGE, mask_image=MASK)
    with pytest.raises(StudioError, match="needs a student"):
        tiny_pipeline("a red apple", image=IMAGE, mask_image=MASK, decoding=Distilled())


def test_the_arguments_are_in_signature_and_help():
    parameters = inspect.signature(LlamaGenPipeline.__call__).parameters
    assert parameters["strength"].default == 1.0 and "mask_image: white" in LlamaGenPipeline.__call__.__doc__
