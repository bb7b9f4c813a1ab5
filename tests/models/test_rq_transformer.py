"""The two transformers: attention, caches, levels of different size, conditions."""

import pytest
import torch

from studio import StudioError
from studio.models.rq_transformer import RQTransformer

SIZES = {
    "grid": (2, 3),
    "depth": 3,
    "vocab_size": 7,
    "code_dim": 4,
    "dim": 16,
    "spatial_layers": 2,
    "depth_layers": 2,
    "spatial_heads": 2,
    "depth_heads": 4,
    "num_classes": 5,
}
FORMS = {
    "codes": {},
    "last-level": {"depth_reads_sums": False},
    "own-tables": {
        "vocab_size": (7, 4, 5),
        "spatial_reads_codes": False,
        "depth_reads_codes": False,
        "shared_embedding": False,
        "shared_classifier": False,
    },
    "one-table": {"spatial_reads_codes": False, "depth_reads_codes": False, "activation": "quick_gelu"},
    "text": {"num_classes": None, "caption_words": 5, "caption_length": 4},
    "captions": {"num_classes": None, "caption_dim": 6, "caption_length": 4, "dropout": 0.0},
    "one-level": {"depth": 1},
}
every_form = pytest.mark.parametrize("form", FORMS)


class Case:
    """A tiny model of one form, two images, and what the model is called with."""

    def __init__(self, form):
        torch.manual_seed(0)
        self.model = RQTransformer(**{**SIZES, **FORMS[form]}).eval()
        for weight in self.model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        self.codebooks = [torch.randn(size, 4) for size in self.model.vocab_sizes]
        length, self.valid = self.model.prefix_length, None
        self.condition = torch.randint(5, (2, length))
        if form == "captions":
            self.condition, self.valid = torch.randn(2, length, 6), torch.arange(length) < torch.tensor([[4], [2]])
        self.tokens = torch.stack([torch.randint(size, (2, 2, 3)) for size in self.model.vocab_sizes], dim=-1)

    @torch.no_grad()
    def logits(self, tokens=None):
        tokens = self.tokens if tokens is None else tokens
        return self.model(tokens, self.condition, self.codebooks, valid=self.valid)[0]


@every_form
def test_a_code_is_seen_only_behind_it(form):
    case = Case(form)
    depth, before = case.model.config.depth, case.logits().flatten(1, 3)
    for slot in range(before.shape[1]):
        changed = case.tokens.clone().view(2, -1)
        changed[:, slot] = (changed[:, slot] + 1) % case.model.vocab_sizes[slot % depth]
        after = case.logits(changed.view_as(case.tokens)).flatten(1, 3)
        torch.testing.assert_close(after[:, : slot + 1], before[:, : slot + 1])
        same = torch.equal(after[:, slot + 1 :], before[:, slot + 1 :])
        assert same == (slot == before.shape[1] - 1), slot


@every_form
@torch.no_grad()
def test_cached_steps_equal_the_whole(form):
    case = Case(form)
    model, cells = case.model, case.tokens.flatten(1, 2)
    spatial, deep = model.new_caches(2)
    context, steps = model.first_context(case.condition, spatial, valid=case.valid), []
    for index in range(6):
        if index:
            context = model.next_context(cells[:, index - 1], index - 1, spatial, case.codebooks)
        for level in range(model.config.depth):
            steps.append(model.level_logits(context, cells[:, index, :level], deep, case.codebooks))
    torch.testing.assert_close(torch.stack(steps, dim=1), case.logits().flatten(1, 3), atol=1e-4, rtol=1e-4)


def test_levels_of_different_size():
    logits = Case("own-tables").logits()
    for level, size in enumerate((7, 4, 5)):
        assert logits[..., level, :size].isfinite().all()
        assert (logits[..., level, size:] == float("-inf")).all()


def test_words_are_predicted_behind_the_first():
    case = Case("text")
    words = case.model(case.tokens, case.condition, case.codebooks)[1]
    assert words.shape == (2, 3, 5)
    changed = case.condition.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 5
    torch.testing.assert_close(case.model(case.tokens, changed, case.codebooks)[1], words)
    shorter = case.model(case.tokens, case.condition[:, :2], case.codebooks)[1]
    torch.testing.assert_close(shorter, words[:, :1])


def test_padding_of_captions_is_not_seen():
    case = Case("captions")
    before, padded = case.logits(), ~case.valid[..., None]
    case.condition = torch.where(padded, 9.0, case.condition)
    torch.testing.assert_close(case.logits(), before)
    case.condition, case.valid = (part.roll(2, dims=1) for part in (case.condition, case.valid))
    torch.testing.assert_close(case.logits()[1], before[1])  # padded on the other side
    case.valid = None
    assert not torch.allclose(case.logits()[1], before[1])


def test_a_dropped_caption_is_the_null_caption():
    case = Case("captions")
    drop = torch.tensor([True, False])
    dropped = case.model(case.tokens, case.condition, case.codebooks, drop=drop)[0]
    case.condition, case.valid = case.condition.clone(), None
    case.condition[0] = case.model.cond_emb.uncond_embedding
    torch.testing.assert_close(dropped, case.logits())
    whole = case.logits()
    case.model.train()
    torch.manual_seed(0)
    same = torch.stack([(case.logits() - whole).abs().amax(dim=(1, 2, 3, 4)) < 1e-4 for _ in range(40)]).double().mean()
    assert 0.5 < same < 1  # a tenth is dropped


@pytest.mark.parametrize("form", ["own-tables", "captions"])
def test_save_and_load(form, tmp_path):
    case = Case(form)
    case.model.save_pretrained(tmp_path)
    case.model, before = RQTransformer.from_pretrained(tmp_path), case.logits()
    torch.testing.assert_close(case.logits(), before)


def test_refuses_what_does_not_fit():
    case = Case("codes")
    with pytest.raises(StudioError, match="codebooks"):
        case.model(case.tokens, case.condition)
    with pytest.raises(StudioError, match=r"\(2, 3, 3\)"):
        case.model(case.tokens[:, :1], case.condition, case.codebooks)
    with pytest.raises(StudioError, match="condition"):
        case.model(case.tokens, case.condition[:, 0], case.codebooks)
    with pytest.raises(StudioError, match="no null condition"):
        case.model(case.tokens, case.condition, case.codebooks, drop=torch.ones(2, dtype=torch.bool))
    other = Case("captions")
    with pytest.raises(StudioError, match="Captions are"):
        other.model(other.tokens, other.condition[:, 1:], other.codebooks)
    for wrong in (
        {"vocab_size": (7, 7)}, {"depth_heads": 3}, {"activation": "relu"}, {"num_classes": None}, {"caption_words": 4},
        {"num_classes": None, "caption_dim": 4},
    ):  # fmt: skip
        with pytest.raises(StudioError):
            RQTransformer(**{**SIZES, **wrong})
    with pytest.raises(StudioError, match="sizes are"):
        RQTransformer.preset("5T")
    with torch.device("meta"):
        assert RQTransformer.preset("480M").config.spatial_layers == 12
