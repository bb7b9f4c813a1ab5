"""Running batches with drafts: the tokens of a call do not depend on its company, nor on when it joined or who left."""

import random

import pytest
import torch

from studio import StudioError
from studio.backends import using
from studio.backends.cpu_c import NativeLlamaGen, is_available
from studio.decoding.continuous_speculative import SpeculativeBatch
from studio.decoding.eagle import AutoDrafts, DrafterDrafts
from studio.decoding.lantern import Lantern, LanternPlusPlus
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, SpeculativeRun, speculative
from studio.decoding.trees import DynamicTree
from studio.models.kv_cache import BatchCache, TreeCache
from tests.decoding.test_speculative import NAMES, sources, streams, tiny

CODEBOOK = torch.randn(32, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    """Reads captions of different lengths, and has region conditioning."""
    return tiny(captions=True)


@pytest.fixture(scope="module")
def drafts(model):
    return {**sources(model), "auto": AutoDrafts(), "auto-samples": AutoDrafts(sampled=True)}


def condition(seed, images):
    """A caption of one to five positions, the same for all images."""
    source = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, 5, 16, generator=source).expand(images, -1, -1)
    mask = torch.arange(5) < torch.randint(1, 6, (1, 1), generator=source)
    return {"captions": vectors, "caption_mask": mask.expand(images, -1)}


def mixed_requests(drafts, count, weights="auto", seed=0):
    """Requests of any kind: captions, seeds, guidance, temperatures, filters, drafts, tests, one to three images."""
    choose, requests = random.Random(seed), []
    for _ in range(count):
        images, order = choose.randint(1, 3), choose.choice(["llamagen", "lantern"])
        name, kind = choose.choice(list(drafts)), choose.choice([Speculative, Lantern, LanternPlusPlus])
        if kind is LanternPlusPlus and not drafts[name].sampled:
            kind = Lantern
        options = {"drafts": drafts[name], "filter_order": order, "weights": weights}
        options["guidance_schedule"] = choose.choice([None, "constant", "linear"])
        if kind is Lantern:
            options |= {"k": choose.choice([3, 20]), "delta": choose.choice([0.05, 0.3])}
        if kind is LanternPlusPlus:
            options |= {"k": choose.choice([3, 10]), "ratio": choose.choice([1.5, 5.0])}
        requests.append(
            {
                "condition": condition(choose.randrange(100), images),
                "seeds": [choose.randrange(10**6) for _ in range(images)],
                "guidance_scale": choose.choice([1.0, 0.0, 2.0, 3.5, 7.5]),
                "sampling": Sampling(
                    choose.choice([0.0, 0.5, 1.0, 1.7]),
                    choose.choice([0, 0, 5, 20]),
                    choose.choice([1.0, 1.0, 0.9, 0.3]),
                    order,
                ),
                "settings": kind(**options),
            }
        )
    return requests


def call_of(request):
    call = {name: request[name] for name in ("guidance_scale", "sampling", "settings")}
    return {**call, "generators": streams(*request["seeds"])}


def alone(model, request, drafter=None):
    """What a call samples for these images alone."""
    return speculative(model, request["condition"], codebook=CODEBOOK, drafter=drafter, **call_of(request))


def new_batch(model, drafts, weights="auto", max_images=8):
    drafter = drafts["dynamic"].drafter
    return SpeculativeBatch(model, max_images=max_images, weights=weights, codebook=CODEBOOK, drafter=drafter)


def served(batch, requests, leaving=0.04, seed=1):
    """Serves all requests; those that leave halfway are left out.

    Returns:
        Whole images by the number of the request, and how many requests shared each round.
    """
    choose = random.Random(seed)
    waiting, under_way, ends, shared = list(enumerate(requests)), {}, {}, []
    while waiting or under_way:
        while waiting and batch.max_images - batch.size >= len(waiting[0][1]["seeds"]) and choose.random() < 0.7:
            number, request = waiting.pop(0)
            under_way[batch.join(request["condition"], **call_of(request))] = number
        if under_way and choose.random() < leaving:
            run = choose.choice(list(under_way))
            batch.leave(run)
            del under_way[run]
        shared.append(len(under_way))
        for run in batch.step():
            ends[under_way.pop(run)] = run
    assert batch.size == 0 and not batch.runs and not batch.members and batch.cache.rows == 0
    return ends, shared


@pytest.mark.parametrize("weights", ["auto", "plain"])
def test_60_mixed_requests_are_those_of_calls_alone(model, drafts, weights):
    requests = mixed_requests(drafts, 60, weights)
    ends, shared = served(new_batch(model, drafts, weights), requests)
    assert max(shared) >= 5 and len({*shared}) >= 5 and 45 <= len(ends) < 60
    assert len({type(requests[number]["settings"]) for number in ends}) == 3
    assert {requests[number]["settings"].drafts for number in ends} == {*drafts.values()}
    for number, run in ends.items():
        expected = alone(model, requests[number], drafts["dynamic"].drafter)
        assert torch.equal(run.tokens, expected.tokens), number
        assert max(run.calls) == expected.target_calls
        assert run.mean_accepted_length == expected.mean_accepted_length


@pytest.mark.parametrize("weights", ["auto", "plain"])
@pytest.mark.parametrize("name", [*NAMES, "auto", "auto-samples"])
def test_requests_with_equal_settings_draft_together(model, drafts, name, weights, monkeypatch):
    """And get the same tokens, though they join and leave while others are halfway."""
    pool = mixed_requests({name: drafts[name]}, 3, weights, seed=4)
    choose, together, draft = random.Random(2), [], SpeculativeRun.draft
    requests = []
    for _ in range(24):
        images = choose.randint(1, 3)
        seeds = [choose.randrange(10**6) for _ in range(images)]
        requests.append({**choose.choice(pool), "condition": condition(choose.randrange(100), images), "seeds": seeds})
    monkeypatch.setattr(SpeculativeRun, "draft", lambda self: together.append(len(self.images)) or draft(self))
    batch = new_batch(model, drafts, weights)
    ends, shared = served(batch, requests)
    monkeypatch.undo()
    assert len(together) < 0.8 * sum(shared) and max(together) >= 5 and 12 <= len(ends) < 24
    for number, images in ends.items():
        expected = alone(model, requests[number], drafts["dynamic"].drafter)
        assert torch.equal(images.tokens, expected.tokens), number
        assert max(images.calls) == expected.target_calls
        assert images.mean_accepted_length == expected.mean_accepted_length


def test_a_wrong_row_of_the_drafter_would_be_noticed(model, drafts, monkeypatch):
    """The negative control: conditional and unconditional rows of two requests are mixed up in the drafter's cache."""
    settings = Speculative(drafts=drafts["static"])
    requests = [
        {"condition": condition(seed, 2), "seeds": [seed, seed + 50], "guidance_scale": 3.5, "sampling": Sampling(),
         "settings": settings}
        for seed in range(4)
    ]  # fmt: skip
    absorb = TreeCache.absorb_rows
    monkeypatch.setattr(TreeCache, "absorb_rows", lambda self, other, order: absorb(self, other, sorted(order)))
    ends, _ = served(new_batch(model, drafts), requests, leaving=0)
    monkeypatch.undo()
    assert any(not torch.equal(found.tokens, alone(model, requests[number]).tokens) for number, found in ends.items())


def test_static_shapes_give_the_same_tokens(model, drafts):
    """The backend for GPUs, whose calls have the whole cache."""
    requests = mixed_requests(drafts, 12)
    with using("graphs"):
        ends, shared = served(new_batch(model, drafts), requests, leaving=0)
    assert max(shared) > 3 and len(ends) == 12
    for number, run in ends.items():
        assert torch.equal(run.tokens, alone(model, requests[number], drafts["dynamic"].drafter).tokens), number


def test_runs_have_images_that_end_earlier_than_others(model, drafts):
    """Rows of complete images are free before the whole request is."""
    batch, sizes = new_batch(model, drafts), []
    [request] = mixed_requests(drafts, 1)
    request |= {"condition": condition(3, 3), "seeds": [1, 2, 3], "sampling": Sampling(0.7), "guidance_scale": 2.0}
    request["settings"] = Speculative(drafts=drafts["dynamic"])
    run = batch.join(request["condition"], **call_of(request))
    while batch.runs:
        sizes.append((batch.size, batch.cache.rows))
        batch.step()
    assert sizes[0] == (3, 6) and sizes[-1] in [(1, 2), (2, 4)]
    assert torch.equal(run.tokens, alone(model, request).tokens)


@pytest.mark.parametrize("wrong", ["rows", "keys", "draws"])
def test_what_is_wrong_would_be_noticed(model, drafts, monkeypatch, wrong):
    """The negative controls: rows that are mixed up, keys that are lost, and one stream of random numbers for all."""
    requests = mixed_requests(drafts, 16)
    for request in requests:
        request["sampling"] = Sampling(1.0)
    leave, accept, shared = BatchCache.leave, SpeculativeRun.accept, streams(0)[0]

    def unmoved(self, row):
        self._whole[:, self.rows - 1] = 0
        leave(self, row)

    def rolled(self, tree, states, logits):
        return accept(self, tree, states, logits.roll(1, dims=0))

    def common(self, tree, states, logits):
        self._progress.generators = [shared] * len(self._progress.generators)
        return accept(self, tree, states, logits)

    if wrong == "keys":
        monkeypatch.setattr(BatchCache, "leave", unmoved)
    else:
        monkeypatch.setattr(SpeculativeRun, "accept", rolled if wrong == "rows" else common)
    ends, _ = served(new_batch(model, drafts), requests, leaving=0)
    monkeypatch.undo()
    drafter = drafts["dynamic"].drafter
    assert any(not torch.equal(run.tokens, alone(model, requests[each], drafter).tokens) for each, run in ends.items())


def test_one_call_of_the_target_reads_the_trees_of_all(model, drafts, monkeypatch):
    if not is_available(model):
        pytest.fail("the compiled step is missing on this machine")
    rows, extend = [], NativeLlamaGen.extend_tree
    monkeypatch.setattr(
        NativeLlamaGen,
        "extend_tree",
        lambda self, tokens, *rest: rows.append(len(tokens)) or extend(self, tokens, *rest),
    )
    batch, runs = new_batch(model, drafts), []
    for number, (name, scale) in enumerate({"ngram": 1.0, "dynamic": 3.0, "auto-samples": 2.0}.items()):
        call = {"sampling": Sampling(0.5 + number), "guidance_scale": scale, "generators": streams(number)}
        runs.append(batch.join(condition(number, 1), settings=Speculative(drafts=drafts[name]), **call))
    while batch.runs:
        batch.step()
    calls = [max(run.calls) - 1 for run in runs]
    assert rows[0] == 5 and len(rows) == max(calls) < sum(calls)


def test_trees_of_any_size_fit(model, drafts):
    """The cache grows when a run joins whose trees are larger than those before."""
    small = {"sampling": Sampling(), "guidance_scale": 2.0, "settings": Speculative(drafts=drafts["ngram"])}
    large = DrafterDrafts(drafts["dynamic"].drafter, DynamicTree(nodes=60, levels=4, width=8))
    requests = [
        {**small, "condition": condition(number, 2), "seeds": [number, 9], "settings": settings}
        for number, settings in enumerate([small["settings"], Speculative(drafts=large), small["settings"]])
    ]
    ends, _ = served(new_batch(model, drafts), requests, leaving=0)
    assert all(torch.equal(run.tokens, alone(model, requests[each]).tokens) for each, run in ends.items())
    assert len(ends) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_class_conditional_model_joins_too(name):
    """Its prefix is one position, so that a drafter has nothing to read before the first round."""
    model = tiny()
    batch, settings = SpeculativeBatch(model, max_images=3), Speculative(drafts=sources(model)[name])
    requests = [
        {"condition": {"class_labels": torch.tensor([label])}, "seeds": [label], "guidance_scale": 2.0,
         "sampling": Sampling(), "settings": settings}
        for label in (3, 7, 1, 5)
    ]  # fmt: skip
    ends, _ = served(batch, requests, leaving=0)
    assert all(torch.equal(run.tokens, alone(model, requests[each]).tokens) for each, run in ends.items())
    assert len(ends) == 4


def test_what_cannot_join_is_refused_and_changes_nothing(model, drafts):
    batch, [request] = new_batch(model, drafts, max_images=1), mixed_requests(drafts, 1)
    call = {**call_of(request), "generators": streams(1)}
    one = condition(1, 1)
    with pytest.raises(StudioError, match="room for 1 images, not 2"):
        batch.join(condition(1, 2), **{**call, "generators": streams(1, 2)})
    for settings in (Speculative(), Speculative(weights="plain")):
        assert not settings.joins
        with pytest.raises(StudioError, match="drafts in trees, with weights 'auto'"):
            batch.join(one, **{**call, "settings": settings})
    with pytest.raises(StudioError, match="k must be below that"):
        batch.join(one, **{**call, "settings": Lantern(k=99, drafts=AutoDrafts())})
    with pytest.raises(StudioError, match="max_images"):
        SpeculativeBatch(model, max_images=0)
    assert not batch.runs and batch.cache.rows == 0 and batch.step() == []
