"""EVS and VidCom2: which tokens stay, and videos in real classes of transformers at tiny size."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from studio.data.clips import draw_clip
from studio.data.scenes import CELL
from studio.errors import StudioError
from studio.pruning.api import prune, prune_inputs
from studio.pruning.evs import evs
from studio.pruning.kv_cache import compress
from studio.pruning.registry import VIDEO as METHODS
from studio.pruning.vidcom2 import frame_shares, vidcom2
from tests.pruning.tiny_families import answer, tiny
from tests.pruning.tiny_models import END, IMAGE, PAD, START, VIDEO

FRAMES, HEIGHT, WIDTH = 4, 8, 12
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")
BOTH = ("qwen2_5_vl", "qwen3_vl", "llava_next_video")
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


def tokens_of(family):
    """Tokens of one frame, and behind the last."""
    return (HEIGHT * WIDTH // 4, 0) if "qwen" in family else (9, 1 if family == "llava_onevision" else 0)


def placeholders(family):
    frame, last = tokens_of(family)
    if family == "qwen3_vl":
        return [token for t in range(FRAMES) for token in (80 + t, START, *[VIDEO] * frame, END)]
    return [START, *[VIDEO] * (frame * FRAMES + last), END]


def prompt(family, rows=1, image=False):
    """Rows of text with a video each; in all but the first row text is shorter, so that it is padded."""
    sample = torch.Generator().manual_seed(5)
    lines, pictures = [], []
    for row in range(rows):
        before = torch.randint(3, 80, (4 - row,), generator=sample).tolist()
        if image:
            pictures.append(tiny(family).prompt(((0,),)))
            count = int((pictures[-1]["input_ids"] == IMAGE).sum())
            before = [*before, START, *[IMAGE] * count, END]
        lines.append([1, *before, *placeholders(family), *torch.randint(3, 80, (5,), generator=sample).tolist()])
    longest = max(map(len, lines))
    ids = torch.tensor([[PAD] * (longest - len(line)) + line for line in lines])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if "qwen" in family:
        patches = torch.randn(rows * FRAMES * HEIGHT * WIDTH, 96, generator=sample)
        inputs |= {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[FRAMES, HEIGHT, WIDTH]] * rows)}
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.0][:rows])
    else:
        inputs["pixel_values_videos"] = torch.randn(rows, FRAMES, 3, 24, 24, generator=sample)
    for picture in pictures:
        for name in ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"):
            if name in picture:
                inputs[name] = torch.cat([inputs[name], picture[name]]) if name in inputs else picture[name]
    return inputs


def dropped(inputs, info):
    mask = inputs["attention_mask"].clone()
    stays = [torch.isin(torch.arange(before), kept).long() for before, kept in zip(info.tokens_before, info.kept)]
    mask[inputs["input_ids"] == VIDEO] = torch.cat(stays)
    return mask


def whole_positions(model, inputs):
    if "video_grid_thw" in inputs:
        return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    return (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 0)


@families
def test_keeping_all_is_bitwise_the_plain_model(family):
    model, inputs = tiny(family).model, prompt(family, rows=2)
    plain, logits = answer(model, inputs), model(**inputs).logits
    with prune(model, "evs", keep=1.0) as record:
        same = answer(model, inputs)
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(plain.sequences, same.sequences) and all(map(torch.equal, plain.logits, same.logits))
    assert (
        record.info.tokens_after
        == record.info.tokens_before
        == [sum(map(int.__mul__, tokens_of(family), (FRAMES, 1)))] * 2
    )


@pytest.mark.parametrize(("family", "image"), [*((family, False) for family in FAMILIES), *((f, True) for f in BOTH)])
@methods
def test_kept_tokens_are_those_of_a_masked_prompt(family, method, image):
    model, inputs = tiny(family).model, prompt(family, 2, image)
    pruned, info = prune_inputs(model, inputs, method, keep=0.3)
    frame, last = tokens_of(family)
    wanted = max(frame if method == "evs" else FRAMES, round(0.3 * frame * FRAMES))
    assert info.tokens_after == [wanted + last] * 2 and len(info.kept) == 2
    assert (pruned["input_ids"] == VIDEO).sum() == 2 * (wanted + last)
    assert (pruned["input_ids"] == IMAGE).sum() == (inputs["input_ids"] == IMAGE).sum()
    text = inputs["input_ids"][(inputs["input_ids"] != VIDEO) & (inputs["attention_mask"] > 0)]
    assert torch.equal(pruned["input_ids"][(pruned["input_ids"] != VIDEO) & (pruned["attention_mask"] > 0)], text)
    mask, positions = dropped(inputs, info), whole_positions(model, inputs)
    masked = answer(model, {**inputs, "attention_mask": mask}, position_ids=positions)
    with prune(model, method, keep=0.3):
        short = answer(model, inputs)
    assert torch.equal(masked.sequences, short.sequences)
    for ours, theirs in zip(short.logits, masked.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert short.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - info.removed + 3


@families
def test_beams_of_a_batch_equal_its_rows(family):
    model, inputs = tiny(family).model, prompt(family, rows=2)
    options = dict(num_beams=2, num_return_sequences=2)
    length = inputs["input_ids"].shape[1]
    with prune(model, "vidcom2", keep=0.4):
        batch = answer(model, inputs, **options).sequences[:, length:].view(2, 2, -1)
        for row, together in enumerate(batch):
            real = inputs["attention_mask"][row].bool()
            alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "pixel_values_videos"}
            pixels = inputs["pixel_values_videos"]
            alone["pixel_values_videos"] = pixels.chunk(2)[row]
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if name in alone:
                    alone[name] = alone[name][:, real]
            assert torch.equal(answer(model, alone, **options).sequences[:, int(real.sum()) :], together)


def test_later_places_take_videos_too():
    made, inputs = tiny("qwen2_5_vl"), prompt("qwen2_5_vl")
    tokens = HEIGHT * WIDTH // 4 * FRAMES
    with prune(made.model, "fastv", keep=0.25, after_layer=1) as record:
        out = answer(made.model, inputs)
    assert record.info.tokens_after == [tokens // 4]
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held[0] - held[1] == tokens - tokens // 4
    with compress(made.model, "coverage", keep=0.1) as record:
        answer(made.model, inputs)
    assert record.info.tokens_after == [round(0.1 * tokens)]


def test_what_is_refused():
    for family in ("llava", "internvl", "glm4v"):
        with pytest.raises(StudioError, match="evs prunes videos, and .* models are none of llava_next_video"):
            prune_inputs(tiny(family).model, tiny(family).prompt(), "evs")
    model = tiny("qwen2_5_vl").model
    with prune(model, "divprune"), pytest.raises(StudioError, match="for videos use evs or vidcom2"):
        answer(model, prompt("qwen2_5_vl"))
    with prune(model, "evs"), pytest.raises(StudioError, match="only images: use divprune"):
        answer(model, tiny("qwen2_5_vl").prompt())
    for method in ("evs", "mmtok"):
        with pytest.raises(StudioError, match="without after_layer"), prune(model, method, after_layer=1):
            pass
    with pytest.raises(StudioError, match="keeps the newline"):
        prune_inputs(model, prompt("qwen2_5_vl"), "evs", newline="drop")
    short = prompt("qwen2_5_vl")
    short["input_ids"][0, 10] = 5
    with pytest.raises(StudioError, match="video tokens, but the vision tower"):
        prune_inputs(model, short, "evs")
    for frames in (0, 3):
        with pytest.raises(StudioError, match="frames"):
            evs(torch.randn(8, 2), 4, frames=frames)


def test_evs_keeps_the_first_frame_and_what_moves():
    clip = draw_clip(np.random.default_rng(1), (2, 2), steps=4, hold=1)
    cells = torch.from_numpy(clip.frames).float().unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    features = cells.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
    moved = [{tuple(step) for step in pair.tolist()} for pair in np.stack((clip.path[1:], clip.path[:-1]), 1)]
    places = [frame * 16 + row * 4 + column for frame, pair in enumerate(moved, 1) for row, column in pair]
    kept = evs(features, 16 + len(places), frames=4).tolist()
    assert kept == [*range(16), *sorted(places)]
    assert evs(features, 2, frames=4).tolist() == [*range(16)]
    order = [set(evs(features, budget, frames=4).tolist()) for budget in range(16, 64)]
    assert all(fewer < more for fewer, more in zip(order, order[1:]))


def test_vidcom2_beside_a_loop():
    sample = torch.Generator().manual_seed(2)
    frames, tokens, width, wanted = 3, 10, 8, 9
    features = torch.randn(frames * tokens, width, generator=sample) * torch.rand(width, generator=sample)
    spread = [float(((column - column.mean()) ** 2).mean()) for column in features.T]
    quiet = sorted(range(width), key=spread.__getitem__)[:4]
    unit = [[row[quiet] / row[quiet].norm() for row in frame] for frame in features.view(frames, tokens, -1)]

    def similarity(row, centre):
        apart = float(((row - centre) ** 2).sum())
        return sum(math.exp(-apart / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

    middle = sum(sum(frame) for frame in unit) / (frames * tokens)
    of_video = [[similarity(row, middle) for row in frame] for frame in unit]
    of_frame = [[similarity(row, sum(frame) / tokens) for row in frame] for frame in unit]
    distinct = [-sum(frame) / tokens for frame in of_video]
    raised = [math.exp((u - max(distinct)) / 0.01) for u in distinct]
    shares = [wanted / 30 * (1 + part / sum(raised) - 1 / frames) for part in raised]
    numbers = [math.floor(share * tokens) for share in shares]
    for frame in sorted(range(frames), key=lambda frame: numbers[frame] - shares[frame] * tokens):
        numbers[frame] += sum(numbers) < wanted
    assert min(numbers) >= 1 and len(set(numbers)) > 1
    expected = []
    for frame, number in enumerate(numbers):
        scores = [v + w for v, w in zip(of_video[frame], of_frame[frame])]
        expected += [frame * tokens + place for place in sorted(range(tokens), key=scores.__getitem__)[:number]]
    assert vidcom2(features, wanted, frames=frames).tolist() == sorted(expected)


def test_vidcom2_budgets_are_exact():
    sample = torch.Generator().manual_seed(0)
    for frames in (1, 3, 7):
        features = torch.randn(frames * 6, 10, generator=sample)
        for budget in range(1, frames * 6 + 3):
            kept = vidcom2(features, budget, frames=frames)
            assert len(kept) == min(max(frames, budget), frames * 6) and torch.equal(kept, kept.unique())
            assert torch.bincount(kept // 6, minlength=frames).min() >= 1
    same = F.normalize(torch.ones(4, 5), dim=1)
    torch.testing.assert_close(frame_shares(same, 0.3), torch.full((4,), 0.3))
