"""The authors' student of LlamaGen, recorded: forward, few steps, steps of the teacher, pairs, names at full size."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from studio.checkpoints.distilled import _student_config, student_from_state_dict
from studio.checkpoints.llamagen import gpt_from_state_dict
from studio.decoding.distilled import few_step, hybrid, nearest, teacher_tokens, trajectory
from studio.decoding.noise_map import noise_to_token
from studio.decoding.sampling import Sampling
from studio.models.distilled import DistilledStudent
from tests.parity.recordings import find, stem

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
CLEAR = 1e-3
LLAMAGEN, KEYS = find("dd_llamagen"), find("dd_official_keys")
llamagen = pytest.mark.parametrize("path", LLAMAGEN, ids=stem)


class Case:
    """A recording, the student and the teacher with its weights, and its condition."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.arrays = load_file(path.with_suffix(".safetensors"))
        config = self.info["config"]
        heads = config["n_head"]
        sizes = {
            "num_heads": heads,
            "num_kv_heads": config.get("n_kv_head") or heads,
            "grid_size": math.isqrt(config["block_size"]),
            "norm_eps": config["norm_eps"],
            "rope_base": float(config["rope_base"]),
        }
        self.student = student_from_state_dict(self.weights("student"), **sizes)
        self.teacher = gpt_from_state_dict(self.weights("teacher"), **sizes)
        self.codebook, self.noise = self["codebook"], self["in.noise"]
        self.condition = {"class_labels": self["in.cond_idx"].flatten()}

    def __getitem__(self, name):
        return self.arrays[name]

    def weights(self, part):
        prefix = f"w.{part}."
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}


class Watched:
    """A student that keeps what it was called with and which logits it gave."""

    def __init__(self, student):
        self.student, self.inputs = student, []

    def __getattr__(self, name):
        return getattr(self.student, name)

    def hidden_states(self, vectors, known, **condition):
        self.inputs.append((vectors, known))
        return self.student.hidden_states(vectors, known, **condition)


def close(ours, recorded):
    torch.testing.assert_close(ours, recorded, **CLOSE)


@llamagen
@torch.no_grad()
def test_forward(path):
    case = Case(path)
    known = case["fwd.timestep"].long()
    vectors, logits = case.student(case["fwd.x"], known, **case.condition)
    close(vectors, case["fwd.tokens"])
    close(logits, case["fwd.logits"])
    close(trajectory(vectors, case["fwd.x"], known), case["fwd.final_predict_tokens"])
    assert torch.equal(nearest(case["fwd.x"], case.codebook), case["fwd.nearest_idx"])


@llamagen
@torch.no_grad()
def test_few_steps(path):
    case = Case(path)
    assert case.info["schedules"]
    for name, times, split in case.info["schedules"]:
        ends, watched = [], Watched(case.student)

        def on_call(vectors, tokens, ends=ends):
            ends.append((vectors, tokens))
            return vectors, False

        vectors, _ = few_step(
            watched, case.codebook, case.noise, case.condition, times=tuple(times), split=split, on_call=on_call
        )
        for step, ((point, known), (end, tokens)) in enumerate(zip(watched.inputs, ends, strict=True)):
            recorded = {key: case[f"{name}.step{step}.{key}"] for key in ("x_in", "x_out", "argmax", "logit_margin")}
            close(point, recorded["x_in"])
            close(end, recorded["x_out"])
            _, logits = case.student(point, known, **case.condition)
            composed = torch.cat((nearest(point[:, :known], case.codebook), logits[:, known:].argmax(dim=-1)), dim=1)
            clear = recorded["logit_margin"] > CLEAR
            assert torch.equal(composed[clear], recorded["argmax"][clear])
            clear[:, max(known, split) :] = False
            assert torch.equal(tokens[clear], recorded["argmax"][clear])
        side = case.student.config.grid_size
        close(vectors.transpose(1, 2).unflatten(2, (side, side)), case[f"{name}.latent_bchw"])


@llamagen
def test_steps_of_the_teacher(path):
    case = Case(path)
    assert case.info["combine"]
    for name, begin, end, split, scale in case.info["combine"]:
        seen = {}

        def teacher_samples(prefix, begin=begin, end=end, scale=scale, seen=seen):
            seen["prefix"], sampling = prefix, Sampling(top_k=1)
            seen["tokens"] = teacher_tokens(
                case.teacher,
                case.condition,
                prefix,
                end,
                lambda index, logits: sampling.probabilities(logits).argmax(dim=-1),
                guidance_scale=scale,
            )
            return seen["tokens"]

        with torch.no_grad():
            vectors, _ = hybrid(
                case.student, case.codebook, case.noise, case.condition, teacher_samples,
                begin=begin, end=end, split=split,
            )  # fmt: skip
        if f"{name}.prefix_idx" in case.arrays:
            assert torch.equal(seen["prefix"], case[f"{name}.prefix_idx"])
        assert torch.equal(seen["tokens"], case[f"{name}.teacher_seq"])
        close(vectors, case[f"{name}.x_out"])


@llamagen
def test_pairs(path):
    case = Case(path)
    settings = dict(case.info["pair"])
    scale, sampling, probs, recorded = settings.pop("cfg"), Sampling(**settings), [], case["pair.tokens"]

    def sample(index, logits):
        probs.append(sampling.probabilities(logits))
        return recorded[:, index]

    teacher_tokens(case.teacher, case.condition, recorded[:, :0], recorded.shape[1], sample, guidance_scale=scale)
    close(torch.stack(probs, dim=1), case["pair.probs"])
    probs = torch.stack(probs, dim=1).flatten(0, 1)
    tokens = noise_to_token(case["pair.noise"].flatten(0, 1), probs, case.codebook, 64)
    robust = case["pair.robust"]
    assert torch.equal(tokens.view_as(recorded)[robust], recorded[robust])


@llamagen
def test_starts_from_the_teacher(path):
    case = Case(path)
    taken = DistilledStudent.from_teacher(case.teacher, case.codebook).state_dict()
    weights = case.weights("teacher")
    for name in case.info["init_with_teacher"]["changed"]:
        assert torch.equal(taken[name], weights[name]), name
    assert set(taken) == {name for names in case.info["init_with_teacher"].values() for name in names}


MODELS = [
    pytest.param(entry, id=f"{path.stem}-{name}")
    for path in KEYS
    for name, entry in json.loads(path.read_text()).items()
    if name.startswith("LlamaGen") and "keys" in entry
]


@pytest.mark.parametrize("entry", MODELS)
def test_keys_and_shapes(entry):
    shapes = {name: tuple(shape) for name, shape in entry["keys"].items()}
    with torch.device("meta"):
        config = _student_config({name: torch.empty(shape) for name, shape in shapes.items()})
        model = DistilledStudent(**config)
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == shapes
    assert sum(weight.numel() for weight in model.parameters()) == entry["n_params"]
    assert model.head_dim == 64 and model.num_tokens == 256
