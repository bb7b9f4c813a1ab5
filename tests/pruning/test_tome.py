"""Merging of tokens inside the tower: exact where tokens are equal, and a mean where they are not."""

import contextvars
import threading

import pytest
import torch

from studio import StudioError, merge_tokens
from studio.pruning import tome
from studio.pruning.api import prune, prune_inputs
from tests.pruning import tiny_models
from tests.pruning.tiny_families import ROWS, answer, tiny

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])


def logits(model, inputs):
    return model(**inputs).logits


def count_hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize("first", [0, 2])
def test_each_patch_is_in_one_token_which_is_the_mean_of_its_patches(first):
    generator = torch.Generator().manual_seed(0)
    patches, keys = (torch.randn(3, 13, 4, generator=generator) for _ in range(2))
    tokens, sizes, slots = tome.merge(patches, keys, torch.ones(3, 13), 3, first)
    tokens, sizes, places = tome.merge(tokens, tokens, sizes, 2, first)
    slots = places.gather(1, slots)
    assert tokens.shape == (3, 8, 4) and torch.equal(sizes.sum(dim=1), torch.full((3,), 13.0))
    for row in range(3):
        for slot in range(8):
            inside = slots[row] == slot
            assert inside.sum() == sizes[row, slot]
            torch.testing.assert_close(tokens[row, slot], patches[row, inside].mean(dim=0))
        if first:
            assert torch.equal(tokens[row, 0], patches[row, 0])


def test_the_most_alike_pairs_are_merged_in_place():
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [-1, 0], [0, -1], [0.5, 0.5]]])
    tokens, sizes, slots = tome.merge(torch.arange(6.0).view(1, 6, 1), keys, torch.ones(1, 6), 2, 0)
    assert tokens.flatten().tolist() == [0.5, 3.0, 4.0, 3.5] and sizes.tolist() == [[2, 1, 1, 2]]
    assert slots.tolist() == [[0, 0, 3, 1, 2, 3]]


@FAMILIES
def test_nothing_merged_is_the_plain_model_bit_for_bit(family):
    """Control: one token merged is not."""
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    plain = logits(model, inputs)
    with merge_tokens(model, 0):
        assert torch.equal(logits(model, inputs), plain)
    with merge_tokens(model, [1]):
        assert not torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), plain)


def pairs_of_equal_patches():
    """A LLaVA-1.5 without places in its tower, and an image whose patches are equal in pairs."""
    made = tiny_models.Llava15()
    tower = made.model.base_model.vision_tower
    tower.embeddings.position_embedding.weight.zero_()
    inputs = made.prompt()
    pixels, side = inputs["pixel_values"], tower.config.patch_size
    blocks = pixels.unflatten(3, (-1, 2, side))
    inputs["pixel_values"] = blocks[..., :1, :].expand_as(blocks).flatten(3)
    return made.model, inputs


def test_equal_patches_give_the_same_answer_when_merged(monkeypatch):
    """Control: without the sizes of tokens, attention is another one."""
    model, inputs = pairs_of_equal_patches()
    config = model.base_model.vision_tower.config
    half = (config.image_size // config.patch_size) ** 2 // 2
    plain = logits(model, inputs)
    with merge_tokens(model, [half]):
        torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
    merge = tome.merge
    monkeypatch.setattr(tome, "merge", lambda *given: [f(part) for f, part in zip(
        (lambda x: x, torch.ones_like, lambda x: x), merge(*given), strict=True)])  # fmt: skip
    with merge_tokens(model, [half]):
        assert (logits(model, inputs) - plain).abs().max() > 1e-3


@FAMILIES
def test_a_block_is_of_its_thread_alone_and_leaves_nothing(family):
    model, inputs = tiny(family).model, tiny(family).prompt()
    plain, seen = logits(model, inputs), []

    def elsewhere():
        with torch.no_grad():
            seen.append(logits(model, inputs))

    hooks = count_hooks(model)
    with merge_tokens(model, [2]):
        merged = logits(model, inputs)
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        assert torch.equal(logits(model, inputs), merged)
    assert torch.equal(seen[0], plain) and not torch.equal(merged, plain)
    assert torch.equal(logits(model, inputs), plain)
    assert count_hooks(model) == hooks


@FAMILIES
@pytest.mark.parametrize("method", ["divprune", "hired", "globalcom2"])
def test_pruning_goes_on_behind_a_merging_tower(family, method):
    model, inputs = tiny(family).model, tiny(family).prompt()
    with prune(model, method, keep=0.5) as plain:
        answer(model, inputs)
    with merge_tokens(model, [3]), prune(model, method, keep=0.5) as record:
        answer(model, inputs)
    assert record.info.tokens_before == plain.info.tokens_before
    assert record.info.tokens_after == plain.info.tokens_after


def test_scores_of_merged_patches_are_those_of_their_token():
    """With equal patches in pairs, HiRED chooses what it chooses without merging."""
    model, inputs = pairs_of_equal_patches()
    with prune(model, "hired", keep=0.5) as plain:
        logits(model, inputs)
    with merge_tokens(model, [4]), prune(model, "hired", keep=0.5) as record:
        logits(model, inputs)
    assert torch.equal(record.info.kept[0], plain.info.kept[0])


def test_refusals():
    model = tiny("llava").model
    tower = model.base_model.vision_tower
    read = tower.config.num_hidden_layers - 1
    for merged, message in (
        (10_000, "can lose"),
        ([1] * (read + 1), f"the first {read} layers of the tower"),
        ([-1], "number of tokens that go"),
        ([0.5], "number of tokens that go"),
        (0.5, "number of tokens that go"),
    ):
        with pytest.raises(StudioError, match=message), merge_tokens(model, merged):
            pass
    with pytest.raises(StudioError, match="qwen2_5_vl model stay"), merge_tokens(tiny("qwen2_5_vl").model, 1):
        pass
    flash = tiny_models.Llava15().model
    flash.base_model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(StudioError, match="sdpa or eager"), merge_tokens(flash, 1):
        pass


@FAMILIES
@pytest.mark.parametrize("feature_layer", [-1, -2, [-1]])
def test_the_record_counts_the_tokens_of_the_features(family, feature_layer, monkeypatch):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    tower = model.base_model.vision_tower
    monkeypatch.setattr(model.config, "vision_feature_layer", feature_layer)
    has_cls = tower.config.model_type == "clip_vision_model"
    read = tower.encoder.layers[-1 if feature_layer != -2 else -2]
    seen = []
    with merge_tokens(model, [2, 1]) as record:
        assert record.latest is None
        hook = read.register_forward_hook(lambda layer, arguments, output: seen.append(output.shape[:2]))
        model(**inputs)
        hook.remove()
    crops, tokens = seen[-1]
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    assert record.latest.patches == crops * patches and record.latest.tokens == crops * (tokens - has_cls)
    assert record.places.shape == (crops, patches)
    assert all(len(row.unique()) == tokens - has_cls == row.max() + 1 and row.min() == 0 for row in record.places)


@FAMILIES
def test_the_projector_maps_each_token_once(family):
    """It maps what the tower has just left, and a row of anything else for itself."""
    model, inputs = tiny(family).model, tiny(family).prompt()
    tower, projector = model.base_model.vision_tower, model.base_model.multi_modal_projector
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    rows = []
    with merge_tokens(model, [2, 1]) as record:
        hook = projector.register_forward_pre_hook(lambda module, given: rows.append(given[0]))
        logits(model, inputs)
        states = rows[0].new_empty(*rows[0].shape[:1], patches, rows[0].shape[2]).normal_()
        assert projector(states).shape[1] == rows[1].shape[1] == patches
        hook.remove()
    crops = record.latest.patches // patches
    assert rows[0].shape[:2] == (crops, patches - 3) and record.latest.tokens == crops * (patches - 3)
    one_by_one = [projector(rows[0][crop, record.places[crop]]) for crop in range(crops)]
    features = []
    with merge_tokens(model, [2, 1]):
        hook = projector.register_forward_hook(lambda module, given, output: features.append(output))
        logits(model, inputs)
        hook.remove()
    torch.testing.assert_close(features[0], torch.stack(one_by_one), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fails", ["the tower", "the projector"])
def test_a_run_that_an_exception_ended_leaves_nothing(fails):
    """Scores of later calls are those of calls without it, in the block and behind it."""
    model, inputs = tiny_models.LlavaNext().model, tiny("llava_next").prompt()
    plain = prune_inputs(model, inputs, "hired", 0.3)[1].kept[0]
    with merge_tokens(model, [6, 4]):
        merged = prune_inputs(model, inputs, "hired", 0.3)[1].kept[0]
    tower, projector = model.base_model.vision_tower, model.base_model.multi_modal_projector

    def stop(module, arguments):
        raise KeyboardInterrupt

    part = tower.encoder.layers[1] if fails == "the tower" else projector.linear_2
    for expected in (merged, plain):
        with merge_tokens(model, [6, 4]):
            hook = part.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
            hook.remove()
            if expected is merged:
                assert torch.equal(prune_inputs(model, inputs, "hired", 0.3)[1].kept[0], merged)
        assert torch.equal(prune_inputs(model, inputs, "hired", 0.3)[1].kept[0], plain)
    assert not torch.equal(plain, merged)


def test_a_copied_context_forgets_a_run_when_its_block_closes():
    model, inputs = tiny_models.LlavaNext().model, tiny("llava_next").prompt()
    plain = prune_inputs(model, inputs, "hired", 0.3)[1].kept[0]

    def stop(module, arguments):
        raise KeyboardInterrupt

    with merge_tokens(model, [6, 4]):
        context = contextvars.copy_context()
        hook = model.base_model.vision_tower.encoder.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            context.run(model, **inputs)
        hook.remove()
    assert torch.equal(context.run(prune_inputs, model, inputs, "hired", 0.3)[1].kept[0], plain)


@FAMILIES
def test_of_nested_blocks_the_innermost_counts(family):
    model, inputs = tiny(family).model, tiny(family).prompt()
    with merge_tokens(model, [6, 4]) as alone:
        inner = logits(model, inputs)
    with merge_tokens(model, [4, 4]) as outer:
        before = logits(model, inputs)
        of_outer = outer.latest
        with merge_tokens(model, [6, 4]) as record:
            assert torch.equal(logits(model, inputs), inner)
        assert record.latest == alone.latest and outer.latest is of_outer
        assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(before, inner)


def test_a_layer_of_features_of_a_single_call_is_refused():
    """One that the configuration names is not."""
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt()
    with merge_tokens(model, [6, 4]):
        expected = logits(model, inputs)
        assert torch.equal(model(**inputs, vision_feature_layer=-2).logits, expected)
        with pytest.raises(StudioError, match="leave out vision_feature_layer"):
            model(**inputs, vision_feature_layer=-1)
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused_in_training(reentrant):
    made = tiny_models.LlavaNext()
    model, inputs = made.model, made.prompt(labels=True)
    with merge_tokens(model, [6, 4]):
        loss = model(**inputs).loss
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert torch.equal(model(**inputs).loss, loss), "nothing is computed again without gradients"
        with torch.enable_grad(), pytest.raises(StudioError, match="gradient checkpointing"):
            model(**inputs)
