"""Known tokens: they are kept, what is sampled follows the models' conditional distributions, and loops agree."""

from itertools import product

import pytest
import torch

from studio import (
    ContinuousSpeculative,
    DimensionWise,
    FirstHitting,
    Jacobi,
    Lantern,
    MaskedAutoregressive,
    Speculative,
    StudioError,
)
from studio.decoding.autoregressive import autoregressive
from studio.decoding.cspd import continuous_speculative
from studio.decoding.drafts import TokenRecycling
from studio.decoding.jacobi import jacobi
from studio.decoding.mar import masked_autoregressive
from studio.decoding.resgen import resgen_decoding
from studio.decoding.sampling import KnownTokens
from studio.decoding.speculative import speculative
from studio.decoding.token_bridge import dimension_wise
from studio.models.resgen import ResGen
from studio.tokenizers.residual_quantizer import ResidualQuantizer
from tests.decoding.test_jacobi import SETTINGS, states, strong
from tests.decoding.test_speculative import FLAT, GUIDANCE, conditions, exact_distribution, p_value, streams
from tests.decoding.test_speculative import tiny as tiny_llamagen
from tests.decoding.tiny_mar import tiny_mar
from tests.decoding.tiny_token_bridge import tiny_token_bridge

LEVEL, IMAGES = 1e-3, 20_000


def known_of(tokens, positions, length):
    mask = torch.zeros(len(tokens), length, dtype=torch.bool)
    mask[:, positions] = True
    return KnownTokens(tokens, mask)


def test_orders_and_plans():
    known = known_of(torch.zeros(2, 5), [1, 3], 5)
    order = torch.tensor([[3, 0, 1, 4, 2], [4, 3, 2, 1, 0]])
    assert known.known_last(order).tolist() == [[0, 4, 2, 3, 1], [4, 2, 0, 3, 1]] and known.unknown == 3
    assert not known.is_prefix and known_of(torch.zeros(1, 5), [0, 1], 5).is_prefix
    settings = MaskedAutoregressive(steps=8)
    whole, rest = settings.plan(16), settings.plan(16, 5)
    assert sum(step.last - step.first for step in rest) == 5 and rest[1:] == whole[-len(rest) + 1 :]
    assert rest[0].last == 5 and rest[0].progress == whole[-len(rest)].progress


def bridge():
    """Four cells of one number in three levels, and how it says what a cell is, given known ones."""
    model = tiny_token_bridge(grid_size=2, token_dim=1, levels=3, dimension_order=(0,))
    for name, weight in model.named_parameters():
        if "norm" in name or "_ln" in name:
            torch.nn.init.constant_(weight, float(name.endswith("weight")))
    values = torch.linspace(-2, 2, 3)

    @torch.no_grad()
    def conditional(cells, visible, wanted):
        buffer, _ = model.embed_condition(class_labels=torch.tensor([1]))
        places = (torch.tensor([visible]), torch.tensor([[wanted]]))
        states = model.conditions(values[torch.tensor(cells)].view(1, 4, 1), *places, buffer)[0, 0]
        head = model.head
        logits = head.next_logits(
            head.condition_proj(states), None, head.new_cache(1), model.config.sampling_first_input_adds_step_embedding
        )
        return logits[0].double().softmax(0)

    def sample(known, generators):
        condition = {"class_labels": torch.ones(len(generators), dtype=torch.long)}
        settings = DimensionWise(steps=4)
        return dimension_wise(model, values, condition, generators=generators, settings=settings, known=known).tokens

    return conditional, sample


def resgen():
    """Four cells of one code out of three."""
    torch.manual_seed(3)
    model = ResGen(
        num_positions=4, depth=1, vocab_size=3, code_dim=4, dim=16, num_layers=1, num_heads=2, num_classes=5,
        prediction="levels",
    ).eval()  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    quantizer = ResidualQuantizer((3,), 4, shared=False)
    for table in quantizer.tables:
        torch.nn.init.normal_(table)

    @torch.no_grad()
    def conditional(cells, visible, wanted):
        hidden = torch.tensor([[int(cell not in visible) for cell in range(4)]])
        codes = torch.where(hidden[..., None] > 0, -1, torch.tensor(cells).view(1, 4, 1))
        predicted = model(quantizer.lookup(codes).sum(dim=-2), hidden, class_labels=torch.tensor([1]))
        return predicted.logits[0, wanted, 0].double().softmax(0)

    def sample(known, generators):
        condition = {"class_labels": torch.ones(len(generators), dtype=torch.long)}
        settings = FirstHitting(steps=4)
        return resgen_decoding(
            model, quantizer, condition, generators=generators, settings=settings, known=known
        ).tokens

    return conditional, sample


def law_of_two(conditional, known):
    """The distribution (9,) of cells 0 and 3 given {1: ..., 2: ...}, sampled one after the other in a random order."""
    distribution = torch.zeros(3, 3, dtype=torch.float64)
    for first, second in ((0, 3), (3, 0)):
        for a, b in product(range(3), repeat=2):
            cells = [0, *known, 0]
            cells[first] = a
            chance = conditional(cells, [1, 2], first)[a] * conditional(cells, [1, 2, first], second)[b] / 2
            distribution[(a, b) if first == 0 else (b, a)] += chance
    return distribution.flatten()


@pytest.mark.parametrize("make", [bridge, resgen])
def test_redrawn_cells_follow_the_law_by_enumeration(make):
    """20,000 images, seeds 0 on, level 0.001: cells 0 and 3 given 1 and 2; the law given other cells is rejected."""
    conditional, sample = make()
    known = known_of(torch.tensor([0, 2, 0, 0]).view(1, 4, 1).expand(IMAGES, -1, -1), [1, 2], 4)
    tokens = sample(known, streams(*range(IMAGES)))[..., 0]
    assert (tokens[:, 1] == 2).all() and (tokens[:, 2] == 0).all()
    counts = torch.bincount(3 * tokens[:, 0] + tokens[:, 3], minlength=9).double()
    assert p_value(counts, law_of_two(conditional, (2, 0))) > LEVEL
    assert p_value(counts, law_of_two(conditional, (0, 2))) < LEVEL


@pytest.mark.parametrize("cspd", [None, "exact", "relaxed"])
def test_mar_samples_as_if_the_known_tokens_had_come_first(cspd):
    """Usual sampling whose first steps are overwritten with the known tokens ends in the same image."""
    model, draft = tiny_mar(), tiny_mar(1)
    tokens = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(5))
    known = known_of(tokens, list(range(10)), 16)
    condition = {"class_labels": torch.tensor([1, 3])}
    call = {"generators": streams(0, 1), "guidance_scale": 2.0}
    if cspd is None:
        edited = masked_autoregressive(model, condition, known=known, settings=MaskedAutoregressive(steps=16), **call)

        class Ordered:
            """The noise of an order that has the known tokens first."""

            def __init__(self, noise):
                self.noise = noise

            def order(self, total):
                return known.known_last(self.noise.order(total))

            def __getattr__(self, name):
                return getattr(self.noise, name)

        from studio.decoding.counter_rng import PositionNoise

        noise = Ordered(PositionNoise.of(streams(0, 1), 4, "cpu"))

        def overwrite(number, sampled, positions):
            sampled[:] = torch.where(known.mask[..., None] & (sampled != 0), tokens, sampled)

        usual = masked_autoregressive(
            model,
            condition,
            settings=MaskedAutoregressive(steps=16),
            guidance_scale=2.0,
            noise=noise,
            on_step=overwrite,
        )
        torch.testing.assert_close(edited.tokens, usual.tokens)
    else:
        more = {"draft_steps": 2} if cspd == "relaxed" else {}
        settings = ContinuousSpeculative(mode=cspd, steps=8, diffusion_steps=5, **more)
        edited = continuous_speculative(model, condition, draft=draft, known=known, settings=settings, **call)
    assert torch.equal(edited.tokens[:, :10], tokens[:, :10])
    assert edited.target_calls < 16 and (edited.tokens[:, 10:] != 0).all()


@pytest.mark.parametrize("captions", [False, True], ids=["classes", "captions"])
@pytest.mark.parametrize("name", SETTINGS)
def test_raster_loops_feed_known_tokens_where_they_stand(name, captions):
    """Plain decoding gives what it gives when a callback overwrites tokens; Jacobi decoding gives the same tokens."""
    model, condition = strong(captions), conditions(captions)
    tokens = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    known = known_of(tokens, [0, 1, 2, 3, 6, 7, 12], 16)
    generators = streams(1, 2, 3)
    edited = autoregressive(model, condition, generators=generators, known=known, **SETTINGS[name])

    def overwrite(index, sampled):
        if known.mask[0, index]:
            sampled[:, index] = tokens[:, index]

    forced = autoregressive(model, condition, generators=streams(1, 2, 3), on_step=overwrite, **SETTINGS[name])
    assert torch.equal(edited.tokens, forced.tokens) and edited.target_calls == 10 < forced.target_calls
    for window in (1, 4, 40):
        ours = streams(1, 2, 3)
        found = jacobi(model, condition, generators=ours, settings=Jacobi(window), known=known, **SETTINGS[name])
        assert torch.equal(found.tokens, edited.tokens)
        assert states(ours) == states(generators)


@pytest.mark.parametrize("drafts", [TokenRecycling(), Jacobi(3, "maximal"), Jacobi(3, "none")], ids=str)
def test_drafts_leave_the_law_of_raster_order(drafts):
    """6,000 images, seed 0, level 0.001: p(0) p(2 | 0, 1) p(3 | 0, 1, 2) with 1 known, not p(0, 2, 3 | 1)."""
    model = tiny_llamagen(vocab_size=3, grid_size=2)
    joint = exact_distribution(model, 4, FLAT).view(3, 3, 3, 3)
    posterior = joint[:, 1] / joint[:, 1].sum()
    law = joint.sum(dim=(1, 2, 3))[:, None, None] * joint[:, 1] / joint[:, 1].sum(dim=(1, 2), keepdim=True)
    condition, counts = {"class_labels": torch.full((2000,), 4)}, torch.zeros(27, dtype=torch.float64)
    known = known_of(torch.tensor([[0, 1, 0, 0]]).expand(2000, -1), [1], 4)
    shared = streams(0) * 2000
    for _ in range(3):
        tokens = speculative(
            model, condition, generators=shared, sampling=FLAT, guidance_scale=GUIDANCE,
            settings=Speculative(drafts=drafts), known=known,
        ).tokens  # fmt: skip
        assert (tokens[:, 1] == 1).all()
        counts += torch.bincount(9 * tokens[:, 0] + 3 * tokens[:, 2] + tokens[:, 3], minlength=27).double()
    assert p_value(counts, law.flatten()) > LEVEL
    assert p_value(counts, posterior.flatten()) < LEVEL


def test_relaxed_tests_keep_no_tokens():
    known = known_of(torch.zeros(3, 16, dtype=torch.long), [0], 16)
    with pytest.raises(StudioError, match="relaxed test may replace tokens"):
        speculative(
            tiny_llamagen(), conditions(False), generators=streams(0, 1, 2), settings=Lantern(3),
            codebook=torch.randn(32, 4), known=known,
        )  # fmt: skip
