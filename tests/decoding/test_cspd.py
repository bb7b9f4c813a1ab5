"""Continuous speculative decoding at toy size: equal models, rows of their own, relaxed blocks, and what is refused."""

import pytest
import torch

from studio import ContinuousSpeculative, MaskedAutoregressive, StudioError
from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.cspd import AlignedAcceptance, FinalStep, continuous_speculative
from studio.decoding.mar import masked_autoregressive
from studio.decoding.speculative_diffusion import sample_residual
from studio.reference.cspd import AuthorsAcceptance, AuthorsContinuousSpeculative
from tests.decoding.tiny_mar import generators, tiny_mar

TARGET, DRAFT = tiny_mar(0).double(), tiny_mar(1, depth=1).double()
"""Heads in float64 say the same to a float32 state whatever else is in the batch."""
SIZES = {"steps": 6, "diffusion_steps": 5}
MODES = [{"mode": "exact"}, {"mode": "relaxed"}, {"kind": AuthorsContinuousSpeculative, "mode": "relaxed"}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=["exact", "relaxed", "reference"])


def sample(mode, draft=DRAFT, labels=(0, 1, 2), first=0, sizes=SIZES, **options):
    condition = {"class_labels": torch.tensor(labels)}
    settings = {"prefill": 0.2, **mode, **sizes}
    settings = settings.pop("kind", ContinuousSpeculative)(**settings)
    given = {"generators": generators(len(labels), first), "guidance_scale": 2.0, **options}
    return continuous_speculative(TARGET, condition, draft=draft, settings=settings, **given)


def test_exact_with_the_target_as_draft_is_plain_sampling():
    sampled = sample({"mode": "exact"}, draft=TARGET)
    plain = masked_autoregressive(
        TARGET,
        {"class_labels": torch.tensor([0, 1, 2])},
        generators=generators(3),
        guidance_scale=2.0,
        settings=MaskedAutoregressive(**SIZES),
    )
    assert sampled.acceptance == 1 and sampled.trials == 0 and sampled.tested == int(sampled.from_draft.sum())
    torch.testing.assert_close(sampled.tokens, plain.tokens, atol=1e-4, rtol=1e-4)


def test_exact_accepts_some_and_mends_the_rest():
    sampled = sample({"mode": "exact"}, labels=tuple([0] * 8))
    assert 0 < sampled.acceptance < 1 and sampled.trials > 0 and sampled.fallbacks == 0
    assert sampled.target_calls == 6 and sampled.draft_calls == 4
    assert sampled.tokens.isfinite().all()


@pytest.mark.parametrize("mode", ["exact", "relaxed"])
def test_a_batch_equals_its_single_calls(mode):
    together = sample({"mode": mode})
    for row in range(2):
        alone = sample({"mode": mode}, labels=(row,), first=row)
        torch.testing.assert_close(together.tokens[row], alone.tokens[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(together.from_draft[row], alone.from_draft[0])


@each_mode
def test_steps_are_reported_and_counted(mode):
    calls, steps = [], []

    def on_step(step, tokens, positions):
        steps.append(step)
        calls.append(("verify" if "draft" in dict(calls) else "target", positions.shape[1]))

    def on_draft(step, tokens, positions):
        steps.append(step)
        calls.append(("draft", positions.shape[1]))

    sampled = sample(mode, on_step=on_step, on_draft=on_draft)
    assert steps == sorted(steps) and set(steps) == set(range(6))
    kinds = [what for what, _ in calls]
    drafted = sum(count for what, count in calls if what == "draft")
    assert kinds[:2] == ["target", "target"]
    assert drafted == sum(count for what, count in calls if what == "verify")
    assert 3 * drafted == sampled.tested and 3 * 16 == sampled.tested + 3 * sum(n for w, n in calls if w == "target")
    assert sampled.target_calls == 6 - kinds.count("draft") + kinds.count("verify")
    assert sampled.draft_calls == kinds.count("draft") and set(sampled.seconds) == {"target", "draft"}
    if mode["mode"] == "relaxed":
        assert kinds == ["target", "target", "draft", "draft", "draft", "verify", "draft", "verify"]


@each_mode
@pytest.mark.parametrize("when", ["on_draft", "on_step"])
def test_callbacks_stop(mode, when):
    sampled = sample(mode, **{when: lambda step, tokens, positions: step >= 2})
    assert (sampled.tokens == 0).any() and sampled.draft_calls >= 1


def test_all_prefilled_is_plain_sampling():
    sampled = sample({"mode": "exact", "prefill": 1.0})
    assert sampled.draft_calls == 0 and sampled.acceptance == 0 and sampled.target_calls == 6


def ends(mean, count):
    return FinalStep(*(torch.full((count, 2), value) for value in (mean, 1.0, 0.0)))


def test_relaxed_falls_back_to_the_target_within_its_rounds():
    images = torch.arange(50)
    noise = PositionNoise(images, 2)
    rule, places = AlignedAcceptance(42.0, 3), TokenIndex(images, images * 0)
    resampled = rule.resample(ends(0.0, 50), ends(0.0, 50), places, noise, images)
    assert (resampled.rounds, int(resampled.fallbacks.sum())) == (3, 50)
    assert (resampled.tokens != 0).all() and abs(float(resampled.tokens.mean())) < 0.5


def test_exact_refuses_to_sample_from_nothing(monkeypatch):
    monkeypatch.setattr("studio.decoding.speculative_diffusion._MOST_TRIALS", 10)
    distribution = (torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(StudioError, match="rounding"):
        sample_residual(
            distribution,
            distribution,
            TokenIndex(torch.tensor([0]), torch.tensor([0])),
            PositionNoise(torch.tensor([1]), 2),
            1,
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "lossless"}, "exact, relaxed"),
        ({"prefill": 1.5}, "prefill"),
        ({"draft_steps": 4}, "draft_steps goes with"),
        ({"mode": "relaxed", "draft_steps": 0}, "draft_steps"),
        ({"mode": "relaxed", "inner_temperature": 0.0}, "inner_temperature"),
        ({"mode": "relaxed", "max_rounds": 1.5}, "max_rounds"),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(StudioError, match=words):
        ContinuousSpeculative(**settings)


def test_the_authors_rule_is_for_relaxed_mode():
    assert AuthorsContinuousSpeculative().approximate
    with pytest.raises(StudioError, match='mode="relaxed"'):
        AuthorsContinuousSpeculative(mode="exact")


def test_refused_calls():
    with pytest.raises(StudioError, match="temperature of 0"):
        sample({}, temperature=0.0)
    with pytest.raises(StudioError, match="two diffusion_steps"):
        sample({}, sizes={"steps": 4, "diffusion_steps": 1})
    with pytest.raises(StudioError, match="same tokens"):
        sample({}, draft=tiny_mar(0, grid_size=2))


@pytest.mark.parametrize("kind", [ContinuousSpeculative, AuthorsContinuousSpeculative])
def test_fallbacks_are_rejected_tokens_that_no_trial_accepted(monkeypatch, kind):
    """With the authors' scheme too, which tries all tokens of a block, also those whose draft is kept."""

    def every_other(self, x, *_):
        return torch.where(torch.arange(len(x)) % 2 == 0, torch.inf, -torch.inf).double()

    rule = AuthorsAcceptance if kind is AuthorsContinuousSpeculative else AlignedAcceptance
    monkeypatch.setattr(rule, "log_ratio", every_other)
    monkeypatch.setattr(rule, "trial_chance", lambda self, x, *_: x.new_zeros(len(x)))
    sampled = sample({"kind": kind, "mode": "relaxed", "max_rounds": 1})
    assert 0 < sampled.accepted < sampled.tested
    assert sampled.fallbacks == sampled.tested - sampled.accepted
