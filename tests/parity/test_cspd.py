"""The authors' continuous speculative decoding, recorded: acceptance, what replaces rejected tokens, and whole runs."""

import json

import pytest
import torch

from studio.checkpoints.mar import mar_from_state_dict
from studio.decoding.counter_rng import TokenIndex
from studio.decoding.cspd import AlignedAcceptance, FinalStep, continuous_speculative
from studio.models.mar import unpatchify
from studio.reference.cspd import AuthorsAcceptance, AuthorsContinuousSpeculative
from tests.parity.arrays import Arrays, mar_sizes
from tests.parity.noises import RecordedNoise
from tests.parity.recordings import find

MARGIN = 1e-4


def close(ours, recorded, atol=1e-5, rtol=1e-3):
    torch.testing.assert_close(ours, recorded, atol=atol, rtol=rtol)


def each_case(form):
    """Every case of every recording of a form; none is a failure."""
    found = [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in find(form)
        for name in json.loads(path.read_text())["cases"]
    ]
    return pytest.mark.parametrize(("path", "name"), found)


def ends(io, side):
    return FinalStep(io[f"{side}_mean"], io[f"{side}_std"], io[f"{side}_logsd"])


def check_decisions(ours, io):
    """Those of the recording, except where the uniform number is too close to tell; exact where products underflow."""
    uniform = io["u"].double()
    right = torch.where(ours.exp().isfinite(), (ours.exp() - uniform).abs(), torch.inf) >= MARGIN
    if "accept" in io:
        assert torch.equal((ours > uniform.log())[right], io["accept"][right])


@each_case("cspd_processor")
def test_acceptance(path, name):
    recording = Arrays(path)
    io, tau = recording.under(name + "."), recording.info["cases"][name]["inner_temperature"]
    target, draft = ends(io, "p"), ends(io, "q")
    ratio = AuthorsAcceptance(tau, 100).log_ratio(io["x"], target, draft)
    close(ratio, io["log_ratio64"], atol=1e-4, rtol=1e-6)
    if "sign_corrected_log_ratio64" in io:
        close(
            AlignedAcceptance(tau, 100).log_ratio(io["x"], target, draft),
            io["sign_corrected_log_ratio64"],
            atol=1e-4,
            rtol=1e-6,
        )
    if "accept" in io:
        close(ratio.exp().float(), io["ratio"])
    check_decisions(ratio, io)


def trials(io, count):
    """The recorded trials of one image's `count` rows, as noise."""
    noise = RecordedNoise(torch.arange(count)[None], io["x"].shape[1], 1)
    places = TokenIndex.of(noise.orders)
    noise.put_test(places, io["u"], io["prop_eps"], io["prop_u"])
    return places, noise


@each_case("cspd_processor")
def test_replacements(path, name):
    recording = Arrays(path)
    io, tau = recording.under(name + "."), recording.info["cases"][name]["inner_temperature"]
    target, draft = ends(io, "p"), ends(io, "q")
    rule = AuthorsAcceptance(tau, 100)
    if "prop_eps" not in io:
        tokens, _, _ = rule.resample_all(target, draft, *generated(io))
        assert tokens.isfinite().all()
        return
    places, noise = trials(io, len(io["x"]))
    first = target.mean + target.std * io["prop_eps"][0]
    close(rule.trial_chance(first, target, draft).float(), io["res_alpha"], atol=1e-4)
    tokens, rounds, ever_accepted = rule.resample_all(target, draft, places, noise)
    assert rounds == int(io["rounds"])
    close(tokens, io["residual"])
    accepted = rule.log_ratio(io["x"], target, draft) > io["u"].double().log()
    resampled = rule.resample(target, draft, places, noise, torch.nonzero(~accepted)[:, 0])
    assert (
        torch.equal(resampled.tokens, tokens[~accepted]) and not (resampled.fallbacks & ever_accepted[~accepted]).any()
    )
    assert int(resampled.fallbacks.sum()) == recording.info["cases"][name]["zero_rows_emitted"]
    out = io["x"] if accepted.all() else torch.where(accepted[:, None], io["x"], tokens)
    close(out, io["out"])


def generated(io):
    """Places and random numbers of our own for a case without recorded trials."""
    from studio.decoding.counter_rng import PositionNoise

    places = TokenIndex.of(torch.arange(len(io["x"]))[None])
    return places, PositionNoise(torch.tensor([7]), io["x"].shape[1])


@each_case("cspd_processor")
def test_ours_never_leaves_zeros(path, name):
    recording = Arrays(path)
    io = recording.under(name + ".")
    everything = torch.arange(len(io["x"]))
    resampled = AlignedAcceptance(42.0, 3).resample(ends(io, "p"), ends(io, "q"), *generated(io), everything)
    assert resampled.tokens.isfinite().all() and (resampled.tokens != 0).any(dim=1).all()


@each_case("cspd_run")
@torch.no_grad()
def test_whole_run(path, name):
    recording = Arrays(path)
    config, case, io = recording.info["config"], recording.info["cases"][name], recording.under(name + ".")
    target, draft = (
        mar_from_state_dict(recording.state(f"{side}_sd."), **mar_sizes(config[side])) for side in ("target", "draft")
    )
    steps = int(config["target"]["num_sampling_steps"])
    settings = AuthorsContinuousSpeculative(
        steps=case["num_iter"],
        diffusion_steps=steps,
        guidance_schedule=case["cfg_schedule"],
        prefill=case["ratio"],
        draft_steps=case["num_draft"],
        inner_temperature=float(case["inner"]),
    )
    noise = RecordedNoise(io["orders"], target.config.token_dim, steps)
    everywhere = TokenIndex.of(torch.arange(target.num_tokens).expand(len(io["orders"]), -1))
    noise.put(everywhere, io["noise"].flatten(0, 1), io["inter_noise"].flatten(0, 1).transpose(0, 1))
    blocks = [number for number, (what, _) in enumerate(case["calls"]) if what == "target:verify"]
    for verify, number in enumerate(blocks):
        places = TokenIndex(*io[f"call{number}.index"].long())
        made = io.get(f"verify{verify}.prop_eps"), io.get(f"verify{verify}.prop_u")
        if made[0] is None:
            made = torch.zeros(0, len(places.images), target.config.token_dim), torch.zeros(0, len(places.images))
        noise.put_test(places, io[f"verify{verify}.u"], *made)
    calls = []

    def on_draft(step, tokens, positions, what="draft:step"):
        number = len(calls)
        calls.append([what, positions.numel()])
        places = TokenIndex.of(positions.sort().values)
        assert torch.equal(torch.stack(places), io[f"call{number}.index"].long())
        if what == "target:verify":
            sampled = tokens[places.images, places.positions]
            close(sampled, io[f"verify{blocks.index(number)}.out"], atol=tolerance)
        else:
            close(tokens, io[f"call{number}.tokens"], atol=tolerance)

    def on_step(step, tokens, positions):
        has_drafts = bool(calls) and calls[-1][0] == "draft:step"
        on_draft(step, tokens, positions, "target:verify" if has_drafts else "target:step")

    tolerance = 2e-3 * float(io["latent"].abs().max())
    sampled = continuous_speculative(
        target,
        {"class_labels": io["labels"]},
        draft=draft,
        guidance_scale=case["cfg"],
        temperature=case["temperature"],
        settings=settings,
        on_step=on_step,
        on_draft=on_draft,
        noise=noise,
    )
    assert calls == case["calls"]
    close(unpatchify(sampled.tokens, config["target"]["patch_size"]), io["latent"], atol=tolerance)
    accepted = sum(round(verify["n"] * verify["accept"]) for verify in case["verifies"])
    assert (sampled.tested, sampled.accepted) == (sum(verify["n"] for verify in case["verifies"]), accepted)
