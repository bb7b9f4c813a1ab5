"""The authors' MAR, recorded: schedules, head, network, whole runs, autoencoder; names and shapes at full size."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from studio.checkpoints.mar import _kl_config, _mar_config, kl_from_state_dict, mar_from_state_dict
from studio.decoding.counter_rng import TokenIndex
from studio.decoding.denoising import ReverseTransitions, TimedHead, denoise
from studio.decoding.mar import MaskedAutoregressive, masked_autoregressive
from studio.models.diffusion_head import DiffusionLoss, GaussianDiffusion, time_waves
from studio.models.mar import MAR, patchify, take_rows, unpatchify
from tests.parity.arrays import Arrays, mar_sizes
from tests.parity.noises import RecordedNoise
from tests.parity.recordings import find, stem

Z = {"atol": 2e-5, "rtol": 1e-4}
HEAD = 1e-3


def close(ours, recorded, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(ours, recorded, atol=atol, rtol=rtol)


def each(form):
    """Every recording of a form; none is a failure."""
    return pytest.mark.parametrize("path", find(form), ids=stem)


def each_case(form):
    """Every case of every recording of a form."""
    found = [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in find(form)
        for name in json.loads(path.read_text())["config"]["cases"]
    ]
    return pytest.mark.parametrize(("path", "name"), found)


@each("schedule_cosine")
def test_schedule(path):
    recording = Arrays(path)
    config = recording.info["config"]
    assert config["schedule"] == "cosine"
    ours = GaussianDiffusion(config["steps"], config["train_steps"], config["max_beta"])
    for name, table in recording.arrays.items():
        if table.is_floating_point():
            close(getattr(ours, name), table, atol=0, rtol=1e-9)
        else:
            assert torch.equal(getattr(ours, name), table)


class Head:
    """A recorded head."""

    def __init__(self, path):
        self.recording = Arrays(path)
        self.config = config = self.recording.info["config"]
        self.loss = DiffusionLoss(config["target_channels"], config["z_channels"], config["width"], config["depth"])
        self.loss.load_state_dict(self.recording.state("sd.diffloss."))
        self.loss.eval()

    def tolerance(self, case):
        """The gap of the authors' own float32 run to float64, twenty times, or 1e-3."""
        (note,) = [note for note in self.recording.info["notes"] if "float64" in note]
        gaps = json.loads(note[note.index("{") : note.index("}") + 1].replace("'", '"'))
        return max(HEAD, 20 * gaps[case])


@each("diffloss")
@torch.no_grad()
def test_head_network(path):
    head = Head(path)
    io = head.recording.under("net.")
    waves = time_waves(io["t"])
    close(waves, io["tfreq"])
    close(head.loss.net.time_embed(io["t"]), io["temb"])
    close(head.loss.net(io["x"], io["t"], head.recording["z"]), io["out"])


@each("diffloss")
@torch.no_grad()
def test_head_training(path):
    head = Head(path)
    io, z = head.recording.under("train."), head.recording["z"]
    diffusion = head.loss.schedule()
    output = head.loss.net(diffusion.diffuse(io["x0"], io["t"], io["noise"]), io["t"], z)
    error, bound = diffusion.losses(io["x0"], io["t"], io["noise"], output)
    close(error, io["mse"], rtol=1e-4)
    close(bound, io["vb"], rtol=1e-3)
    close(head.loss(io["x0"], z, times=io["t"], noise=io["noise"]), io["loss"], rtol=1e-3)


@each_case("diffloss")
@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@torch.no_grad()
def test_head_sampling(path, name, compiled):
    """The noisiest steps multiply rounding by hundreds: only torch's own rounding leaves all of their means alike."""
    head = Head(path)
    case, io = head.config["cases"][name], head.recording.under(name + ".")
    conditions = [head.recording["z"]] + ([head.recording["z_uncond"]] if case["cfg"] != 1 else [])
    timed = TimedHead(head.loss, case["num_sampling_steps"])
    if not compiled:
        timed.native = None
    kernels = ReverseTransitions(timed, torch.stack(conditions), case["cfg"])
    steps = list(denoise(kernels, io["init"], io["noise"].flip(0), case["temperature"]))
    tolerance = head.tolerance(name)
    close(steps[-1][2], io["out"], atol=tolerance)
    if "mean" in io and not compiled:
        means, log_stds = (torch.stack([step[place] for step in steps]) for place in (2, 3))
        close(means, io["mean"], atol=tolerance, rtol=1e-3)
        close(2 * log_stds, io["logvar"], atol=tolerance, rtol=1e-3)
        states = torch.stack([step[1] for step in reversed(steps)])
        along = kernels.along(states, 0)
        close(along[0].flip(0), means, atol=tolerance, rtol=1e-3)
        close(along[1].flip(0), log_stds, atol=tolerance, rtol=1e-3)


def network(recording):
    return mar_from_state_dict(recording.state(), **mar_sizes(recording.info["config"]))


@each("mar_forward")
@torch.no_grad()
def test_forward(path):
    recording = Arrays(path)
    model, config = network(recording), recording.info["config"]
    assert model.config.grid_size == config["img_size"] // config["vae_stride"] // config["patch_size"]
    assert model.config.buffer_size == config["buffer_size"] and model.config.num_classes == config["class_num"]
    masks = [name for name in recording.arrays if name.endswith(".mask")]
    assert masks
    for name in masks:
        case, mask = name.removesuffix(".mask"), recording[name].bool()
        visible = torch.nonzero(~mask)[:, 1].view(len(mask), -1)
        hidden = torch.nonzero(mask)[:, 1].view(len(mask), -1)
        for kind in ("cond", "uncond"):
            drop = torch.full((len(mask),), kind == "uncond")
            buffer, _ = model.embed_condition(class_labels=recording["class_ids"], drop=drop)
            states = model.encode(recording["tokens"], visible, buffer)
            close(states, recording[f"{case}.{kind}.enc"], **Z)
            z = recording[f"{case}.{kind}.z"]
            close(model.decode(states, visible), z, **Z)
            close(model.decode(states, visible, hidden), take_rows(z, hidden), **Z)
        shuffled = recording["orders"][:, hidden.shape[1] :]
        assert torch.equal(shuffled.sort().values, visible)
        states = model.encode(recording["tokens"], shuffled, buffer)
        close(model.decode(states, shuffled), z, **Z)


@each("mar_forward")
def test_patches(path):
    recording = Arrays(path)
    size = recording.info["config"]["patch_size"]
    assert torch.equal(patchify(recording["patchify.in"], size), recording["patchify.out"])
    assert torch.equal(unpatchify(recording["patchify.out"], size), recording["patchify.in"])


def weights_of(path):
    """The recording of the forward pass whose weights a recorded run used."""
    note = json.loads(path.read_text())["config"]["weights"]
    (name,) = [word for word in note.split() if word.endswith(".npz")]
    return Arrays(path.with_name(name).with_suffix(".json"))


@each_case("mar_sample")
@torch.no_grad()
def test_whole_run(path, name):
    recording = Arrays(path)
    config = recording.info["config"]
    case, io = config["cases"][name], recording.under(name + ".")
    weights = weights_of(path)
    model = mar_from_state_dict(weights.state(), **mar_sizes(config))
    settings = MaskedAutoregressive(
        steps=case["num_iter"],
        diffusion_steps=int(config["num_sampling_steps"]),
        guidance_schedule=case["cfg_schedule"],
    )
    plan = settings.plan(model.num_tokens)
    batch = len(io["orders"])
    assert [batch * (step.last - step.first) for step in plan] == io["count"].tolist()
    scales = [settings.scale_at(step, case["cfg"]) for step in plan]
    close(torch.tensor(scales), io["cfg_iter"], atol=1e-6)
    noise = RecordedNoise(io["orders"], model.config.token_dim, settings.diffusion_steps)
    for number, step in enumerate(plan):
        places = TokenIndex.of(io["orders"][:, step.first : step.last].sort().values)
        noise.put(places, io[f"step{number}.init"], io[f"step{number}.noise"].flip(0))
    seen = []

    def on_step(number, tokens, positions):
        places = TokenIndex.of(positions.sort().values)
        seen.append((tokens[places.images, places.positions], io[f"step{number}.sampled"]))

    sampled = masked_autoregressive(
        model,
        {"class_labels": io["labels"]},
        guidance_scale=case["cfg"],
        temperature=case["temperature"],
        settings=settings,
        on_step=on_step,
        noise=noise,
    )
    tolerance = 2e-3 * float(io["latent"].abs().max())
    for ours, recorded in seen:
        close(ours, recorded, atol=tolerance)
    close(unpatchify(sampled.tokens, config["patch_size"]), io["latent"], atol=tolerance)


@each("vae_small")
@torch.no_grad()
def test_small_autoencoder(path):
    recording = Arrays(path)
    vae, scale = kl_from_state_dict(recording.state()), recording.info["scale"]
    distribution = vae.encode(recording["image"]).latent_dist
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    close(distribution.parameters, recording["moments"], **tolerance)
    close(distribution.mean, recording["mean"], **tolerance)
    close(distribution.logvar, recording["logvar"].clamp(-30, 20), **tolerance)
    close(distribution.mean + distribution.std * recording["noise"], recording["sample"], **tolerance)
    assert vae.config.scaling_factor == scale
    close(recording["sample"] * vae.config.scaling_factor, recording["tokens"], **tolerance)
    close(vae.decode(recording["latent_scaled"] / scale).sample, recording["decoded"], **tolerance)


@each("vae_kl16_full")
@torch.no_grad()
def test_full_autoencoder(path):
    recording = Arrays(path)
    info = recording.info
    vae = kl_from_state_dict({key: sampled_weight(key, shape, info) for key, shape in info["keys"].items()})
    tolerance = {"atol": 2e-4, "rtol": 2e-4}
    close(vae.encode(recording["image"]).latent_dist.parameters, recording["moments"], **tolerance)
    decoded = vae.decode(recording["latent_scaled"] / vae.config.scaling_factor).sample
    close(decoded, recording["decoded"], **tolerance)


def sampled_weight(key, shape, info):
    """A weight as the recording's recipe samples it."""
    seed = (zlib.crc32(key.encode()) ^ info["config"]["seed"]) & 0x7FFFFFFF
    sampled = np.random.RandomState(seed).standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)
    if len(shape) == 1:
        sampled = 1 + np.float32(0.1) * sampled if key.endswith("weight") else np.float32(0.1) * sampled
    else:
        sampled = sampled / np.float32(np.sqrt(math.prod(shape[1:])))
    return torch.from_numpy(sampled.astype(np.float16).astype(np.float32))


MODELS = [(path, name) for path in find("mar_official_keys") for name in json.loads(path.read_text())]


@pytest.mark.parametrize(("path", "name"), MODELS, ids=[f"{path.stem}-{name}" for path, name in MODELS])
def test_official_keys(path, name):
    entry = json.loads(path.read_text())[name]
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
        if "encoder.conv_in.weight" in official:
            from diffusers import AutoencoderKL

            model = AutoencoderKL(**_kl_config(official))
            assert len(model.state_dict()) == len(official)
        else:
            model = MAR(**_mar_config(official))
            assert {key: list(weight.shape) for key, weight in model.state_dict().items()} == entry["keys"]
            assert count(model.diffloss) == entry["params_diffloss"]
            letter = {"base": "B", "large": "L", "huge": "H"}.get(name.split("_")[-1])
            if letter:
                assert public(MAR.preset(letter).config) == public(model.config)
    assert count(model) == entry["params"]


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def count(module):
    return sum(weight.numel() for weight in module.parameters())
