"""VAR, its tokenizer and the authors' student of it, recorded: from images to tokens, steps, the teacher's scales."""

import json

import pytest
import torch
from safetensors.torch import load_file

from studio.checkpoints.distilled import (
    _learned,
    _var_config,
    _var_tokenizer_config,
    var_from_state_dict,
    var_student_from_state_dict,
    var_tokenizer_from_state_dict,
)
from studio.decoding.distilled import few_step, hybrid, mix, nearest
from studio.decoding.next_scale import next_scale
from studio.decoding.noise_map import noise_to_token
from studio.models.distilled_var import DistilledVAR
from studio.models.var import VAR
from studio.tokenizers.var import VARTokenizer
from tests.decoding.distributions import scale_probabilities
from tests.parity.recordings import find, stem

CLOSE = {"atol": 3e-4, "rtol": 1e-4}
CLEAR = 1e-3
VARS, KEYS = find("dd_var"), find("dd_official_keys")
var = pytest.mark.parametrize("path", VARS, ids=stem)


class Case:
    """A recording and its tokenizer, teacher and student."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.arrays = load_file(path.with_suffix(".safetensors"))
        self.config = self.info["config"]
        scales = {"scales": tuple(self.config["patch_nums"])}
        eps = {"norm_eps": self.config["norm_eps"]}
        self.tokenizer = var_tokenizer_from_state_dict(
            self.weights("vae"), phi_share=self.config["quant_resi"], **scales
        )
        self.teacher = var_from_state_dict(self.weights("var"), **scales, **eps)
        self.student = var_student_from_state_dict(self.weights("dd"), **scales, **eps)
        self.codebook, self.noise, self.labels = self.tokenizer.codebook, self["in.noise"], self["in.label"]
        self.condition = {"class_labels": self.labels}

    def __getitem__(self, name):
        return self.arrays[name]

    def weights(self, part):
        prefix = f"w.{part}."
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    def split_of(self, name):
        """Scales of a recorded end that hold codes, which the notes do not tell."""
        codes = self.codebook[nearest(self[name], self.codebook)]
        regressed = ~torch.isclose(codes, self[name]).all(dim=-1).all(dim=0)
        return sum(not regressed[:bound].any() for bound in self.student.bounds[1:])

    def image(self, features):
        return self.tokenizer.decode_features(features) / 2 + 0.5

    def teach(self, tokens, sample):
        """The teacher's loop over recorded tokens; `sample(logits)` sees the guided logits (B, k, V) of each scale."""

        def recorded(step, logits):
            sample(logits)
            return tokens[:, self.teacher.bounds[step] : self.teacher.bounds[step + 1]]

        end = len(self.teacher.bounds) - 1
        next_scale(self.teacher, self.tokenizer, self.labels, tokens[:, :0], end, recorded, guidance=self.config["cfg"])


def close(ours, recorded):
    torch.testing.assert_close(ours, recorded, **CLOSE)


@var
@torch.no_grad()
def test_tokenizer(path):
    case = Case(path)
    vectors = case.codebook[case["vq.idx"]]
    features = case.tokenizer.features(vectors)
    close(features, case["vq.fhat"])
    close(case.tokenizer.inputs(vectors), case["vq.var_input"])
    close(case.tokenizer.decode_features(features), case["vq.img"])
    assert torch.equal(case.tokenizer.encode_features(case["vq.f"]), case["vq.f_to_idx"])
    close(case.tokenizer.features(case.codebook[case["vq.f_to_idx"]]), case["vq.f_to_fhat"])
    assert torch.equal(case.tokenizer.encode(case["vq.img_in"]), case["vq.img_idx"])


@var
@torch.no_grad()
def test_teacher(path):
    case = Case(path)
    close(case.teacher(case["vq.var_input"], case.labels), case["var.fwd.logits"])
    everything = torch.ones(len(case.labels), dtype=torch.bool)
    close(case.teacher(case["vq.var_input"], case.labels, everything), case["var.fwd_uncond.logits"])
    seen, tokens = [], case["var.greedy.tokens"]
    case.teach(tokens, seen.append)
    clear = case["var.greedy.logit_margin"] > CLEAR
    assert torch.equal(torch.cat(seen, dim=1).argmax(dim=-1)[clear], tokens[clear])
    close(case.image(case.tokenizer.features(case.codebook[tokens])), case["var.greedy.img"])


@var
@torch.no_grad()
def test_pairs(path):
    case = Case(path)
    probs, filters = [], {"top_k": case.config["pair_top_k"], "top_p": case.config["pair_top_p"]}
    tokens, robust = case["pair.tokens"], case["pair.robust"]
    case.teach(tokens, lambda logits: probs.append(scale_probabilities(logits, **filters)))
    probs = torch.cat(probs, dim=1)
    close(probs, case["pair.probs"])
    mapped = noise_to_token(case["pair.noise"].flatten(0, 1), probs.flatten(0, 1), case.codebook, 64)
    assert torch.equal(mapped.view_as(tokens)[robust], tokens[robust])
    close(case.image(case.tokenizer.features(case.codebook[tokens])), case["pair.img"])


@var
@torch.no_grad()
def test_forward(path):
    case = Case(path)
    vectors, logits = case.student(case["dd.fwd.x"], case["dd.fwd.timestep"], case.labels)
    close(vectors, case["dd.fwd.tokens"])
    close(logits, case["dd.fwd.logits"])


@var
@torch.no_grad()
def test_few_steps(path):
    case = Case(path)
    bounds = case.student.bounds
    assert case.info["schedules"]
    for name, times, split in case.info["schedules"]:
        ends = []

        def on_call(vectors, tokens, ends=ends):
            ends.append((vectors, tokens))
            return vectors, False

        vectors, _ = few_step(
            case.student, case.codebook, case.noise, case.condition, times=tuple(times), split=split, on_call=on_call
        )
        for step, ((end, tokens), known) in enumerate(zip(ends, times, strict=True)):
            recorded = {key: case[f"{name}.step{step}.{key}"] for key in ("x_in", "x_out", "argmax", "logit_margin")}
            close(end, recorded["x_out"])
            _, logits = case.student(recorded["x_in"], known, case.labels)
            first = nearest(recorded["x_in"][:, : bounds[known]], case.codebook)
            composed = torch.cat((first, logits[:, bounds[known] :].argmax(dim=-1)), dim=1)
            clear = recorded["logit_margin"] > CLEAR
            assert torch.equal(composed[clear], recorded["argmax"][clear])
            clear[:, bounds[max(known, split)] :] = False
            assert torch.equal(tokens[clear], recorded["argmax"][clear])
        features = case.tokenizer.features(vectors)
        close(features, case[f"{name}.fhat"])
        close(case.image(features), case[f"{name}.img"])


@var
@torch.no_grad()
def test_scales_of_the_teacher(path):
    """From the start, and behind scales of the student under the right mask; the authors' own call lacks the mask."""
    case = Case(path)
    bounds, guidance = case.student.bounds, case.config["cfg"]
    names = {name.rsplit(".", 1)[0] for name in case.arrays if name.startswith("combine_") and "refbug" not in name}
    assert names
    for name in sorted(names):
        begin, end = (int(part) for part in name.split("_")[-2:])
        seen, split = [], case.split_of(f"combine_{'refbug_' if begin else ''}{begin}_{end}.x_out")

        def teacher_samples(prefix, begin=begin, end=end, seen=seen):
            if begin:
                prefix = case[f"combine_refbug_{begin}_{end}.prefix_idx"][:, : bounds[begin]]

            def greedy(step, logits):
                seen.append(logits)
                return logits.argmax(dim=-1)

            return next_scale(case.teacher, case.tokenizer, case.labels, prefix, end, greedy, guidance=guidance)

        vectors, tokens = hybrid(
            case.student, case.codebook, case.noise, case.condition, teacher_samples, begin=begin, end=end, split=split
        )
        assert torch.equal(tokens[:, bounds[begin] : bounds[end]], case[f"{name}.teacher_tokens"])
        if f"{name}.teacher_logits" in case.arrays:
            close(torch.cat(seen, dim=1), case[f"{name}.teacher_logits"])
        if f"{name}.x_out" in case.arrays:
            close(vectors, case[f"{name}.x_out"])
        if begin:
            ahead = case.noise[:, : bounds[begin]]
            _, prefix = mix(case.student, case.codebook, ahead, ahead[:, :, 0].long(), 0, split, case.condition)
            assert torch.equal(prefix, case[f"combine_refbug_{begin}_{end}.prefix_idx"][:, : bounds[begin]])


@var
def test_starts_from_the_teacher(path):
    case = Case(path)
    taken, weights = DistilledVAR.from_teacher(case.teacher).state_dict(), case.weights("var")
    lists = case.info["init_with_teacher"]
    for name in lists["changed"]:
        if name in ("lvl_embed.weight", "pos_1LC"):
            ours, theirs = (rows[0] if name == "pos_1LC" else rows for rows in (taken[name], weights[name]))
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2:], theirs[1:])
        elif name != "n_d_embed.weight":
            assert torch.equal(taken[name], weights[name]), name
    named = dict.fromkeys((*lists["changed"], *lists["unchanged"]), 0)
    assert set(taken) == set(_learned(named))


MODELS = [
    pytest.param(entry, id=f"{path.stem}-{name}")
    for path in KEYS
    for name, entry in json.loads(path.read_text()).items()
    if name.startswith("VAR") and "keys" in entry
]
SIZES = [
    pytest.param(name, entry["n_params"], id=f"{path.stem}-{name}")
    for path in KEYS
    for name, entry in json.loads(path.read_text()).items()
    if name.startswith("VAR-DD-d")
]


@pytest.mark.parametrize("entry", MODELS)
def test_keys_and_shapes(entry):
    pairs = {name: shape if isinstance(shape[0], list) else (shape, "param") for name, shape in entry["keys"].items()}
    shapes = {name: tuple(shape) for name, (shape, _) in _learned(pairs).items()}
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in shapes.items()}
        if "encoder.conv_in.weight" in official:
            model = VARTokenizer(**_var_tokenizer_config(official))
        else:
            model = (DistilledVAR if "n_d_embed.weight" in official else VAR)(**_var_config(official, "model"))
            assert model.config.dim == 64 * model.config.depth == 64 * model.config.num_heads
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == shapes
    assert sum(weight.numel() for weight in model.parameters()) == entry["n_params"]


@pytest.mark.parametrize(("name", "count"), SIZES)
def test_numbers_of_parameters(name, count):
    depth = int(name.rsplit("d", 1)[1])
    with torch.device("meta"):
        model = DistilledVAR(depth=depth, dim=64 * depth, num_heads=depth)
    assert sum(weight.numel() for weight in model.parameters()) == count
