"""LANTERN++: what its drafts must be, and the distribution of a token by enumeration over all drafts of its tree."""

import pytest
import torch

from studio import LanternPlusPlus, LlamaGen, StudioError
from studio.decoding.drafts import NGram, TokenRecycling
from studio.decoding.eagle import AutoDrafts, DrafterDrafts
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, speculative
from studio.decoding.trees import DynamicTree, StaticTree
from studio.reference.lantern import AuthorsLantern
from tests.decoding.distributions import distance, distribution_of_node, without_replacement

ROUNDING = 1e-6
VOCAB = 6


def problems(count, seed):
    """`count` times: a target's distribution of which one code is excluded, a drafter's distribution, a codebook."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        p, q = (2 * torch.randn(2, VOCAB, generator=generator, dtype=torch.float64)).softmax(dim=1)
        p[index % VOCAB] = 0
        yield p / p.sum(), q, torch.randn(VOCAB, 3, generator=generator)


def distributions(settings, codebook, p, q, siblings):
    """The distribution of a token, and the part of it that comes from accepted drafts, over all samples of siblings."""
    rule = settings.rule(codebook)
    distribution, accepted = torch.zeros_like(p), torch.zeros_like(p)
    for sampled, probability in without_replacement(q, siblings):
        tokens = torch.tensor(sampled)
        acceptance = rule.probs(p[None], tokens[None], q[None])
        distribution += probability * distribution_of_node(acceptance, tokens)
        reached = probability
        for token, ratio in zip(sampled, acceptance.ratios[0].clamp(max=1).tolist()):
            accepted[token] += reached * ratio
            reached *= 1 - ratio
    return distribution, accepted


@pytest.mark.parametrize("siblings", [1, 2, 3])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_no_token_passes_the_ratio(siblings, ratio):
    largest = 0.0
    for p, q, codebook in problems(12, seed=0):
        distribution, accepted = distributions(LanternPlusPlus(k=5, ratio=ratio), codebook, p, q, siblings)
        assert float(distribution.sum()) == pytest.approx(1)
        assert (accepted <= ratio * p + ROUNDING).all() and (distribution <= ratio * p + ROUNDING).all()
        assert distance(distribution, p) <= ratio - 1 + ROUNDING
        assert siblings > 1 or distance(distribution, p) <= distance(p, q) + ROUNDING
        largest = max(largest, float((distribution / p).nan_to_num(0.0).max()))
    assert ratio == 1 or largest > 1 + (ratio - 1) / 2


def test_a_bound_on_moved_mass_lets_what_is_excluded_through():
    """The negative control: the authors' other bound, on the same drafts, breaks what the ratio guarantees."""
    excluded, farthest = 0.0, 0.0
    for p, q, codebook in problems(12, seed=0):
        distribution, accepted = distributions(
            AuthorsLantern(5, 0.3, drafts=TokenRecycling(sampled=True)), codebook, p, q, 2
        )
        excluded, farthest = max(excluded, float(accepted[p == 0].sum())), max(farthest, distance(distribution, p))
    assert excluded > 0.05 and farthest > 0.3


def target():
    torch.manual_seed(0)
    model = LlamaGen(vocab_size=32, dim=32, num_layers=2, num_heads=2, grid_size=4, num_classes=9)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.3)
    return model.eval()


def sample(settings, **sampling):
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    codebook = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    labels = {"class_labels": torch.arange(8)}
    call = {"settings": settings, "sampling": Sampling(top_k=20, **sampling)}
    return speculative(target(), labels, generators=generators, codebook=codebook, **call)


def test_a_larger_ratio_accepts_more_and_one_accepts_what_is_lossless():
    lossless = sample(Speculative(drafts=TokenRecycling(sampled=True)))
    assert torch.equal(sample(LanternPlusPlus(ratio=1.0, drafts=AutoDrafts(sampled=True))).tokens, lossless.tokens)
    relaxed = sample(LanternPlusPlus(k=31, ratio=20.0, drafts=AutoDrafts(sampled=True)))
    assert relaxed.mean_accepted_length > lossless.mean_accepted_length > 1


def test_greedy_drafts_are_the_likeliest():
    sampled, likeliest = (
        sample(Speculative(drafts=TokenRecycling(sampled=sampled)), temperature=0) for sampled in (True, False)
    )
    assert torch.equal(sampled.tokens, likeliest.tokens) and sampled.target_calls == likeliest.target_calls


def test_drafts_must_be_sampled():
    fixed = DrafterDrafts(None, StaticTree(((0,), (1,))))
    assert LanternPlusPlus(drafts=fixed).drafts is fixed
    for drafts in (TokenRecycling(), NGram(), DrafterDrafts(None, DynamicTree())):
        with pytest.raises(StudioError, match="sampled"):
            LanternPlusPlus(drafts=drafts)


@pytest.mark.parametrize("wrong", [{"ratio": None}, {"ratio": 0.9}, {"k": 0}, {"delta": 2.0}], ids=str)
def test_settings_are_checked(wrong):
    with pytest.raises(StudioError):
        LanternPlusPlus(**wrong)
