"""The loop of Jacobi decoding on a real tiny model: the tokens of plain decoding, edits, batches, settings."""

import pytest
import torch

from studio import Jacobi, Lantern, LanternPlusPlus, Speculative, StudioError
from studio.backends.cpu_c import NativeLlamaGen
from studio.decoding import jacobi as loop
from studio.decoding import windows
from studio.decoding.autoregressive import autoregressive
from studio.decoding.jacobi import jacobi
from studio.decoding.sampling import KnownTokens, Sampling
from studio.decoding.speculative import speculative
from studio.decoding.windows import _round_seconds, choose_window
from studio.models.kv_cache import TreeCache
from studio.reference.lantern import AuthorsLantern
from tests.decoding.test_speculative import FLAT, GUIDANCE, conditions, exact_distribution, p_value, streams, tiny

SETTINGS = {
    "plain": {},
    "guided": {"guidance_scale": 3.0},
    "a first guided token": {"guidance_scale": 3.0, "cfg_interval": 0},
    "an interval": {"guidance_scale": 3.0, "cfg_interval": 7},
    "filters": {"sampling": Sampling(0.9, 12, 0.9)},
    "filters of lantern": {"sampling": Sampling(0.9, 12, 0.9, "lantern"), "guidance_scale": 2.0},
    "greedy": {"sampling": Sampling(0), "guidance_scale": 3.0, "cfg_interval": 9},
}


def strong(captions=False):
    """A model whose attention matters: blocks of large weights."""
    model = tiny(captions)
    for weight in model.layers.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def states(generators):
    return [generator.get_state().tolist() for generator in generators]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
@pytest.mark.parametrize("weights", ["native", "plain"])
def test_tokens_and_generators_are_those_of_plain_decoding(name, captions, weights):
    """In C bit by bit, whatever the window; the model itself rounds otherwise, and its tokens are the same here."""
    model, condition, calls = strong(captions), conditions(captions), []
    for first in (1, 11):
        seeds = (first, first + 1, first + 2)
        plain_streams = streams(*seeds)
        plain = autoregressive(model, condition, generators=plain_streams, **SETTINGS[name])
        for window in (1, 2, 5, 16, 40):
            ours, settings = streams(*seeds), Jacobi(window, weights=weights)
            found = jacobi(model, condition, generators=ours, settings=settings, **SETTINGS[name])
            assert torch.equal(found.tokens, plain.tokens), window
            assert states(ours) == states(plain_streams), window
            assert found.image_tokens == 48 and found.image_calls <= 48 and found.target_calls <= 16
            assert window > 1 or found.target_calls == 16
            calls.append(found.image_calls)
    assert min(calls) < 48 or (captions and name == "greedy")


def differing(owner=None, name=None, value=None):
    """How many of six images differ from plain decoding's, with one attribute of an owner replaced."""
    model, found = strong(), 0
    call = {"guidance_scale": 3.0, "sampling": Sampling(0.7)}
    for seeds in ((1, 2, 3), (4, 5, 6)):
        plain = autoregressive(model, conditions(False), generators=streams(*seeds), **call).tokens
        with pytest.MonkeyPatch.context() as patch:
            if owner is not None:
                patch.setattr(owner, name, value)
            other = jacobi(model, conditions(False), generators=streams(*seeds), settings=Jacobi(6), **call).tokens
        found += int((plain != other).any(dim=1).sum())
    return found


def test_mistakes_are_seen():
    """Negative controls: noise taken anew each call, a rejected guess kept in the cache, all guesses at one place."""
    reach, keep, extend = loop.PositionRaces.reach, TreeCache.keep, NativeLlamaGen.extend_tree

    def anew(self, numbers, ends):
        self.taken = [1] * len(self.taken)
        reach(self, numbers, ends)

    def one_more(self, kept):
        room = max(self.lengths) < 6
        keep(self, [range(min(self.length - self.base, len(path) + room)) for path in kept])

    def at_the_root(self, tokens, cache, positions, visible):
        return extend(self, tokens, cache, positions[:, :1].expand_as(positions), visible)

    assert differing() == 0
    assert differing(loop.PositionRaces, "reach", anew) == 6
    assert differing(TreeCache, "keep", one_more) >= 5
    assert differing(NativeLlamaGen, "extend_tree", at_the_root) >= 5


def test_noise_past_the_end_is_seen(monkeypatch):
    """Negative control of the generators' state: noise for all places of the last windows."""
    init = loop.PositionRaces.__init__

    def longer(self, generators, vocab, slots, total, device):
        init(self, generators, vocab, slots, total + 8, device)

    monkeypatch.setattr(loop.PositionRaces, "__init__", longer)
    ours, theirs = streams(1, 2, 3), streams(1, 2, 3)
    autoregressive(tiny(), conditions(False), generators=theirs)
    jacobi(tiny(), conditions(False), generators=ours, settings=Jacobi(6))
    assert states(ours) != states(theirs)


@pytest.mark.parametrize("coupling", ["seed", "none", "maximal", "gumbel"])
@pytest.mark.parametrize("relaxed", [False, True], ids=["lossless", "relaxed"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_equals_its_single_calls(coupling, relaxed, temperature):
    if relaxed and coupling == "seed":
        return
    model, condition = tiny(), conditions(False)
    codebook = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    drafts = Jacobi(5, coupling)
    for watched in (False, True):
        call = {"guidance_scale": 2.0, "cfg_interval": 5, "sampling": Sampling(temperature)}
        call |= {"on_step": (lambda index, tokens: None) if watched else None}
        calls = []

        def run(condition, generators, call=call):
            if not relaxed:
                return jacobi(model, condition, generators=generators, settings=drafts, **call)
            settings = Lantern(20, 0.3, drafts=drafts)
            return speculative(model, condition, generators=generators, settings=settings, codebook=codebook, **call)

        together = run(condition, streams(1, 2, 3))
        for row in range(3):
            one = {key: value[row : row + 1] for key, value in condition.items()}
            alone = run(one, streams(row + 1))
            assert torch.equal(alone.tokens[0], together.tokens[row])
            calls.append(alone.target_calls)
        assert together.target_calls == max(calls) and together.image_calls == sum(calls)
        assert len(set(calls)) > 1 or coupling == "none"


def test_a_shared_generator_is_seen():
    """Negative control of batches: images that take noise from one generator in turn."""
    model, one = tiny(), {"class_labels": torch.tensor([1])}
    shared = streams(1) * 3
    together = jacobi(model, {"class_labels": torch.tensor([1, 1, 1])}, generators=shared).tokens
    alone = jacobi(model, one, generators=streams(1)).tokens
    assert not torch.equal(together[0], alone[0])


def edits(index, tokens):
    if index in (5, 11):
        tokens[1:, index] = (tokens[1:, index] + index) % 32


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("window", [3, 9])
def test_a_changed_token_is_gone_on_from_as_in_plain_decoding(temperature, window):
    call = {"guidance_scale": 2.0, "cfg_interval": 9, "on_step": edits, "sampling": Sampling(temperature)}
    model, theirs, ours = tiny(), streams(1, 2, 3), streams(1, 2, 3)
    plain = autoregressive(model, conditions(False), generators=theirs, **call)
    found = jacobi(model, conditions(False), generators=ours, settings=Jacobi(window), **call)
    assert torch.equal(found.tokens, plain.tokens) and states(ours) == states(theirs)


@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_other_couplings_drop_their_guesses_behind_a_changed_token(coupling):
    """The image that is not changed comes out as it was; the others go on from the change."""
    call = {"generators": streams(1, 2, 3), "settings": Jacobi(4, coupling)}
    untouched = jacobi(tiny(), conditions(False), **call | {"generators": streams(1, 2, 3)})
    changed = jacobi(tiny(), conditions(False), on_step=edits, **call)
    assert torch.equal(changed.tokens[0], untouched.tokens[0])
    assert torch.equal(changed.tokens[:, :5], untouched.tokens[:, :5])
    assert torch.equal(changed.tokens[1:, 5], (untouched.tokens[1:, 5] + 5) % 32)
    assert not torch.equal(changed.tokens[1:, 6:], untouched.tokens[1:, 6:])


@pytest.mark.parametrize("editable", [False, True])
def test_on_step_sees_and_stops(editable):
    seen = []

    def stop_after_five(index, tokens):
        seen.append(tokens.clone())
        return index == 4

    plain = autoregressive(tiny(), conditions(False), generators=streams(1, 2, 3)).tokens
    call = {"generators": streams(1, 2, 3), "on_step": stop_after_five, "editable": editable}
    found = jacobi(tiny(), conditions(False), **call)
    assert [tokens.shape[1] for tokens in seen] == [1, 2, 3, 4, 5]
    assert torch.equal(found.tokens, plain[:, :5]) and found.target_calls <= 5


def test_rounds_can_be_watched():
    rounds = []
    settings = Jacobi(4, on_round=lambda lengths, tokens: rounds.append((lengths.tolist(), tokens.tolist())))
    found = jacobi(tiny(), conditions(False), generators=streams(1, 2, 3), settings=settings)
    assert len(rounds) == found.target_calls - 1 and rounds[0][0] == [1, 1, 1]
    for lengths, tokens in rounds:
        for image in range(len(lengths)):
            if len(lengths) == 3:
                assert tokens[image][0] == found.tokens[image, lengths[image] - 1]


def test_greedy_lantern_takes_what_its_test_lets_pass():
    codebook = tiny().tok_embeddings.weight.detach()
    call = {"generators": streams(1, 2, 3), "sampling": Sampling(0), "codebook": codebook}
    exact, much = (
        speculative(tiny(), conditions(False), settings=Lantern(31, delta, drafts=Jacobi(6)), **call)
        for delta in (0.0, 0.9)
    )
    plain = autoregressive(tiny(), conditions(False), generators=streams(1, 2, 3), sampling=Sampling(0))
    assert torch.equal(exact.tokens, plain.tokens)
    assert much.mean_accepted_length > exact.mean_accepted_length


@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_without_a_budget_lantern_is_lossless(coupling):
    codebook = tiny().tok_embeddings.weight.detach()
    call = {"codebook": codebook, "guidance_scale": 2.0}
    lossless = jacobi(
        tiny(), conditions(False), generators=streams(1, 2, 3), settings=Jacobi(6, coupling), guidance_scale=2.0
    )
    drafts = Jacobi(6, coupling)
    for settings in (
        Speculative(drafts=drafts), Lantern(31, 0.0, drafts=drafts),
        LanternPlusPlus(k=31, ratio=1.0, drafts=drafts),
    ):  # fmt: skip
        found = speculative(tiny(), conditions(False), generators=streams(1, 2, 3), settings=settings, **call)
        assert torch.equal(found.tokens, lossless.tokens)
    relaxed = Lantern(31, 0.9, drafts=drafts)
    found = speculative(tiny(), conditions(False), generators=streams(1, 2, 3), settings=relaxed, **call)
    assert found.mean_accepted_length > lossless.mean_accepted_length


SEED, IMAGES, LEVEL = 5, 12_000, 1e-3


def counts_of(settings, model):
    """How often each image of 2 x 2 tokens comes among `IMAGES`."""
    weights, shared = 3 ** torch.arange(3, -1, -1), torch.Generator().manual_seed(SEED)
    counts, labels = torch.zeros(81), {"class_labels": torch.full((IMAGES // 4,), 4)}
    for _ in range(4):
        tokens = jacobi(
            model, labels, generators=[shared] * (IMAGES // 4), settings=settings, sampling=FLAT,
            guidance_scale=GUIDANCE,
        ).tokens  # fmt: skip
        counts += (tokens * weights).sum(dim=1).bincount(minlength=81)
    return counts.double()


@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_images_have_the_models_distribution(coupling):
    """12,000 images of the whole loop, seed 5, level 0.001."""
    model = tiny(vocab_size=3, grid_size=2, seed=3)
    assert p_value(counts_of(Jacobi(3, coupling), model), exact_distribution(model, 4, FLAT)) > LEVEL


def test_what_is_not_the_models_distribution_is_seen(monkeypatch):
    """Negative control: guesses are tested against the distributions of the place before theirs."""
    right = loop.next_proposals
    monkeypatch.setattr(
        loop, "next_proposals", lambda distributions, outcomes, kept: right(distributions.roll(1, 1), outcomes, kept)
    )
    model = tiny(vocab_size=3, grid_size=2, seed=3)
    assert p_value(counts_of(Jacobi(3, "maximal"), model), exact_distribution(model, 4, FLAT)) < LEVEL


def test_the_window_follows_measured_costs(monkeypatch):
    asked = []

    def costs(per_row):
        def seconds(model, batch, streams, nodes, weights):
            asked.append((batch * streams, nodes))
            return 1 + per_row * batch * streams * nodes

        return seconds

    for per_row, least, most in ((0.0, 32, 32), (0.01, 16, 32), (0.1, 6, 6), (1.0, 1, 1)):
        monkeypatch.setattr(windows, "_round_seconds", costs(per_row))
        assert least <= choose_window(tiny(), Jacobi(), 1, 2) <= most
    monkeypatch.setattr(windows, "_round_seconds", costs(0.3))  # guesses would gain 7 %
    assert choose_window(tiny(), Jacobi(), 1, 2) == 1
    monkeypatch.setattr(windows, "_WORTH", 1.0)
    assert choose_window(tiny(), Jacobi(), 1, 2) > 1
    model, count = tiny(), len(asked)
    first = choose_window(model, Jacobi(), 2, 2)
    assert len(asked) > count and {rows for rows, _ in asked[count:]} == {4}
    count = len(asked)
    assert choose_window(model, Jacobi(), 2, 2) == first and len(asked) == count
    assert choose_window(model, Jacobi(coupling="none"), 5, 2) == 3 and choose_window(model, Jacobi(7), 1, 1) == 7
    assert len(asked) == count


@pytest.mark.parametrize(
    "known", [None, KnownTokens(torch.ones(3, 16, dtype=torch.long), torch.arange(16).expand(3, -1) < 8)]
)
def test_without_guesses_it_is_plain_decoding(known, monkeypatch):
    monkeypatch.setattr(windows, "_round_seconds", lambda model, batch, streams, nodes, weights: nodes)
    model, seeds = strong(False), (1, 2, 3)
    plain = autoregressive(model, conditions(False), generators=streams(*seeds), known=known)
    found = jacobi(model, conditions(False), generators=streams(*seeds), known=known)
    assert found.window == 1 and torch.equal(found.tokens, plain.tokens)
    assert found.target_calls == plain.target_calls and found.mean_accepted_length == plain.mean_accepted_length
    rounds = []
    settings = Jacobi(on_round=lambda lengths, tokens: rounds.append(tokens.shape))
    jacobi(model, conditions(False), generators=streams(*seeds), settings=settings)
    assert set(rounds) == {(3, 1)}  # somebody looks on


def test_settings_are_checked():
    for wrong in (
        lambda: Jacobi(0), lambda: Jacobi(True), lambda: Jacobi("wide"), lambda: Jacobi(2.5),
        lambda: Jacobi(coupling="eagle"), lambda: Jacobi(filter_order="other"), lambda: Jacobi(weights="int4"),
    ):  # fmt: skip
        with pytest.raises(StudioError):
            wrong()
    for settings in (Speculative, Lantern, LanternPlusPlus):
        assert settings(drafts=Jacobi()).guesses.coupling == "maximal"
        with pytest.raises(StudioError, match="share their noise"):
            settings(drafts=Jacobi(coupling="seed"))
        with pytest.raises(StudioError, match=f"to {settings.__name__}, not"):
            settings(drafts=Jacobi(weights="plain"))
    with pytest.raises(StudioError, match="use Lantern with Jacobi drafts"):
        AuthorsLantern(drafts=Jacobi())


@pytest.mark.parametrize("weights", ["auto", "plain"])
def test_a_call_is_measured_without_a_trace(weights):
    model = tiny()
    for nodes in (1, 32):
        assert 0 < _round_seconds(model, 1, 2, nodes, weights) < 60
    assert choose_window(model, Jacobi(weights=weights), 1, 2) in range(1, 33)
