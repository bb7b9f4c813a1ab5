"""Pruning and merging inside the tower: which tokens go, in which others they count, and what a patch then reads."""

import pytest
import torch

from studio import StudioError, load, merge_tokens
from studio.pruning import diffrate
from studio.pruning.attention import cls_probabilities, received_attention
from studio.pruning.merging import merging_from
from tests.pruning import tiny_models
from tests.pruning.test_tome import FAMILIES, logits, pairs_of_equal_patches
from tests.pruning.tiny_families import ROWS, tiny

RANKS = pytest.mark.parametrize("rank", diffrate.RANKS)
WITH_CLS = pytest.mark.parametrize("cls", [0, 1])


def textbook(x, sizes, scores, alike, merged, pruned):
    """One image, token by token: the tokens (as lists of old ones), what counts in each, and each token's place."""
    cls, n = len(x) - len(scores), len(scores)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    gone = order[n - merged - pruned :]
    stays = sorted(set(range(n)) - set(gone))
    groups = {i: [i] for i in stays}
    joins = {i: max(stays, key=lambda j: alike[i][j]) for i in gone}
    for i in gone[:merged]:
        groups[joins[i]].append(i)
    total = [sum(float(sizes[cls + i]) for i in groups[j]) for j in stays]
    rows = [sum(sizes[cls + i] * x[cls + i] for i in groups[j]) / size for j, size in zip(stays, total)]
    places = [cls + stays.index(joins.get(i, i)) for i in range(n)]
    return [*x[:cls], *rows], [*sizes[:cls].tolist(), *total], [*range(cls), *places]


@WITH_CLS
@pytest.mark.parametrize(("merged", "pruned"), [(4, 0), (0, 4), (3, 2), (6, 5), (1, 10)])
def test_a_step_is_that_of_the_textbook(cls, merged, pruned):
    sample = torch.Generator().manual_seed(0)
    x, keys = torch.randn(3, 12 + cls, 4, generator=sample), torch.randn(3, 12, 5, generator=sample)
    sizes = torch.randint(1, 4, (3, 12 + cls), generator=sample).float()
    scores, alike = torch.rand(3, 12, generator=sample), diffrate.cosines(keys, 1)
    tokens, counts, places = diffrate.shrink(x, sizes, scores, alike, merged, pruned)
    assert tokens.shape == (3, 12 + cls - merged - pruned, 4)
    for row in range(3):
        expected = textbook(x[row], sizes[row], scores[row].tolist(), alike[row].tolist(), merged, pruned)
        torch.testing.assert_close(tokens[row], torch.stack(expected[0]))
        assert counts[row].tolist() == expected[1] and places[row].tolist() == expected[2]


def test_of_equal_tokens_the_first_stays():
    keys = torch.eye(4)[torch.tensor([0, 1, 0, 2, 1, 0])][None]
    scores = diffrate.novelty(diffrate.cosines(keys, 1))
    assert (scores[0] > -0.5).tolist() == [True, True, False, True, False, False]
    tokens, sizes, places = diffrate.shrink(keys, torch.ones(1, 6), scores, diffrate.cosines(keys, 1), 3, 0)
    torch.testing.assert_close(tokens[0], torch.eye(4)[:3])
    assert sizes.tolist() == [[3, 2, 1]] and places.tolist() == [[0, 1, 0, 2, 1, 0]]


def test_scores_count_a_token_by_its_size():
    """A token of size two gets what two equal ones get; control: without sizes it does not."""
    sample = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 7, 8, generator=sample) for _ in range(2))
    twice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3])
    sizes = torch.ones(1, 7).index_fill(1, torch.tensor(3), 2)
    for score, cls in ((cls_probabilities, 1), (received_attention, 0)):
        several = score(queries[:, twice], keys[:, twice], 2)
        whole = several[:, :-1].clone()
        whole[:, 3 - cls] += several[:, -1]
        torch.testing.assert_close(score(queries, keys, 2, None, sizes), whole)
        assert (score(queries, keys, 2) - whole).abs().max() > 1e-3


@FAMILIES
@RANKS
def test_no_tokens_are_the_plain_model_bit_for_bit(family, rank):
    """Control: one token merged, or pruned, is not."""
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    plain = logits(model, inputs)
    with merge_tokens(model, 0, pruned=[0, 0], rank=rank, method="diffrate"):
        assert torch.equal(logits(model, inputs), plain)
    for given in ({"merged": [1]}, {"pruned": [1]}, {"merged": [2], "pruned": [0, 1]}):
        with merge_tokens(model, **given, rank=rank, method="diffrate"):
            changed = logits(model, inputs)
        assert changed.shape == plain.shape and not torch.equal(changed, plain)
    assert torch.equal(logits(model, inputs), plain)


def test_equal_patches_give_the_same_answer_when_merged_and_another_when_pruned():
    """Which of two equal patches goes is known to `likeness` alone."""
    model, inputs = pairs_of_equal_patches()
    config = model.base_model.vision_tower.config
    half = (config.image_size // config.patch_size) ** 2 // 2
    plain = logits(model, inputs)
    with merge_tokens(model, [half], rank="likeness", method="diffrate"):
        torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
    for given in ({"pruned": [half], "rank": "likeness"}, {"merged": [half], "rank": "attention"}):
        with merge_tokens(model, **given, method="diffrate"):
            assert (logits(model, inputs) - plain).abs().max() > 1e-3


def lengths_of(tower):
    """Tokens of each layer, in a list that the next call fills, and what takes the hooks away."""
    lengths = []
    hooks = [
        part.register_forward_hook(lambda *call: lengths.append(call[2].shape[1])) for part in tower.encoder.layers
    ]
    return lengths, lambda: [hook.remove() for hook in hooks]


def test_the_bundled_reader_has_learned_numbers():
    model = load("emoji-vlm", device="cpu").model
    lengths, done = lengths_of(model.model.vision_tower)
    with merge_tokens(model, method="diffrate"):
        model.model.vision_tower(torch.zeros(1, 3, 96, 96))
    done()
    assert 145 > lengths[0] > lengths[1] > lengths[2] == lengths[3] > 1
    assert diffrate.with_learned(model, {})["rank"] == "likeness"


@RANKS
def test_counts_are_exact_and_every_patch_reads_a_token_that_is_there(rank):
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    tower = model.base_model.vision_tower
    lengths, done = lengths_of(tower)
    with merge_tokens(model, [5, 4], pruned=[3, 2], rank=rank, method="diffrate"):
        seen = tower(inputs["pixel_values"], output_hidden_states=True)
    done()
    assert lengths == [29, 23, 23]
    patches = [states[0, 1:].unique(dim=0).shape[0] for states in seen.hidden_states]
    assert patches == [36, 28, 22, 22] and seen.last_hidden_state.shape[1] == 37


def test_learned_numbers_stand_in_the_configuration():
    made = tiny_models.Llava15()
    model, inputs = made.model, made.prompt()
    with pytest.raises(StudioError, match="studio train diffrate"), merge_tokens(model, method="diffrate"):
        pass
    model.config.pruning = {"diffrate": {"merged": [5, 4], "pruned": [3, 2], "rank": "likeness"}}
    with merge_tokens(model, method="diffrate"):
        learned = logits(model, inputs)
    with merge_tokens(model, [5, 4], pruned=[3, 2], method="diffrate"):
        assert torch.equal(logits(model, inputs), learned)
    with merge_tokens(model, [5, 4], pruned=[3, 2], rank="attention", method="diffrate"):
        assert not torch.equal(logits(model, inputs), learned)
    for wrong in ([1], {"merged": 1}, {"merged": 1, "pruned": 1, "rank": "likeness", "more": 1}):
        model.config.pruning = {"diffrate": wrong}
        with pytest.raises(StudioError, match="and nothing else"), merge_tokens(model, method="diffrate"):
            pass


def test_refusals():
    model = tiny("llava").model
    for given, message in (
        ({"merged": [30], "pruned": [6]}, "Tokens of the tower: 37 can lose 35"),
        ({"merged": [10, 13], "pruned": [10, 3]}, "Tokens of the tower: 17 can lose 15"),
        ({"merged": [1, 1, 1]}, "give 2 numbers"),
        ({"merged": 1, "pruned": [-1]}, "number of tokens that go"),
        ({"merged": 1, "rank": "size"}, "rank is one of attention, likeness"),
        ({"rank": "likeness"}, "No rates were learned"),
        ({"merged": 1, "method": "other"}, "tome, diffrate"),
        ({"method": "tome"}, "tome takes the numbers"),
        ({"merged": 1, "pruned": 1, "method": "tome"}, "tome takes the numbers"),
        ({"merged": 1, "rank": "likeness", "method": "tome"}, "tome takes the numbers"),
    ):
        with pytest.raises(StudioError, match=message), merge_tokens(model, **{"method": "diffrate", **given}):
            pass
    with (
        pytest.raises(StudioError, match="qwen2_5_vl model stay"),
        merge_tokens(tiny("qwen2_5_vl").model, 1, method="diffrate"),
    ):
        pass
    flash = tiny_models.Llava15().model
    flash.base_model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(StudioError, match="sdpa or eager"), merge_tokens(flash, 1, method="diffrate"):
        pass


@pytest.mark.parametrize(
    ("asked", "means"),
    [
        (3, {"merged": 3}),
        ((3, 2), {"merged": (3, 2)}),
        ("56", {"merged": 56}),
        ("56, 28,14", {"merged": [56, 28, 14]}),
        ("diffrate", {"method": "diffrate"}),
        ("diffrate:36+10,28", {"method": "diffrate", "merged": [36, 28], "pruned": [10, 0]}),
        ("diffrate:0+7", {"method": "diffrate", "merged": 0, "pruned": 7}),
    ],
)
def test_short_forms(asked, means):
    assert merging_from(asked) == means


@pytest.mark.parametrize(
    "asked", ["", "x", "1,", "36+10", "-1", "diffrate:", "diffrate:1+", "diffrate:1+2+3", "tome:1", "²", "1" * 9]
)
def test_other_forms_are_refused(asked):
    with pytest.raises(StudioError, match="diffrate:36"):
        merging_from(asked)
