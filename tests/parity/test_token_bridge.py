"""The authors' TokenBridge, recorded: quantiser, network, head, whole runs; names and shapes of published files."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from studio.checkpoints.token_bridge import _BUFFERS, _token_bridge_config, token_bridge_from_state_dict
from studio.decoding.sampling import Sampling
from studio.decoding.token_bridge import Cells, DimensionWise, dimension_wise, sample_cells
from studio.models.masked_autoencoder import take_rows
from studio.models.token_bridge import PRESETS, TokenBridge
from studio.tokenizers.scalar_quantizer import ScalarQuantizer, normal_levels
from tests.parity.recordings import find, stem

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def close(ours, recorded, **tolerance):
    torch.testing.assert_close(ours, recorded, **{**CLOSE, **tolerance})


def each(form):
    """Every recording of a form; none is a failure."""
    return pytest.mark.parametrize("path", find(form), ids=stem)


@each("tokenbridge_quantizer")
def test_quantizer(path):
    info, arrays = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    cases = sorted({match[1] for name in arrays if (match := re.match(r"(.+)\.z$", name))})
    assert len(cases) == len(info["bits"])
    for case in cases:
        positions = arrays[f"{case}.reconstruction_values"]
        close(torch.tensor(normal_levels(len(positions), info["std_range"])), positions)
        quantizer = ScalarQuantizer(positions.tolist(), (info["quant_min"], info["quant_max"]), info["std_range"])
        indices = quantizer.encode(arrays[f"{case}.z"])
        assert torch.equal(indices, arrays[f"{case}.indices"])
        close(quantizer.decode(indices), arrays[f"{case}.dequant"])
        by_bins = torch.bucketize(quantizer.place(arrays[f"{case}.z"]), arrays[f"{case}.boundaries"][1:-1])
        assert not torch.equal(by_bins, indices)


class Generator:
    """A recorded network, its arrays and configuration, and the tokens that its training path is given."""

    def __init__(self, path):
        self.config = config = json.loads(path.read_text())["config"]
        self.arrays = load_file(path.with_suffix(".safetensors"))
        self.model = token_bridge_from_state_dict(
            {name.removeprefix("state."): weight for name, weight in self.arrays.items() if name.startswith("state.")},
            encoder_heads=config["encoder_num_heads"],
            decoder_heads=config["decoder_num_heads"],
            dimension_order=self["channel_order"].tolist(),
        )
        self.quantizer = ScalarQuantizer(self["state.reconstruction_values"].tolist(), (-5.0, 5.0), 3.0)
        masked = self["mask"].bool()
        self.count = int(masked[0].sum())
        self.hidden = torch.nonzero(masked)[:, 1].view(len(masked), -1)
        self.visible = torch.nonzero(~masked)[:, 1].view(len(masked), -1)

    def __getitem__(self, name):
        return self.arrays[name]


@each("tokenbridge_generator")
@torch.no_grad()
def test_network(path):
    case = Generator(path)
    model, config = case.model, case.config
    assert model.config.levels == config["quant_levels"] and model.config.head_heads == config["channel_heads"]
    assert model.config.grid_size == config["img_size"] // config["vae_stride"]
    assert model.config.num_classes == config["class_num"] and model.config.buffer_size == config["buffer_size"]
    latents = case["tokens_patchified"]
    assert torch.equal(case["latents"].flatten(2).transpose(1, 2), latents)
    indices = case.quantizer.encode(latents)
    assert torch.equal(indices, case["indices"])
    close(case.quantizer.decode(indices), case["values"])
    buffer, _ = model.embed_condition(class_labels=case["labels"])
    states = model.encode(case["values"], case.visible, buffer)
    close(states, case["encoder_out"])
    close(model.decode(states, case.visible), case["decoder_out"])
    close(model.decode(states, case.visible, case.hidden).flatten(0, 1), case["head_features"])
    targets = take_rows(indices, case.hidden).flatten(0, 1)[:, case["channel_order"]]
    close(model.head(case["head_features"], targets), case["logits"])
    assert torch.equal(case["channel_order"].argsort(), case["inv_channel_order"])
    loss = model(indices, case["values"], case["orders"], case.count, class_labels=case["labels"])
    close(loss, case["loss"].squeeze())


@each("tokenbridge_generator")
@torch.no_grad()
def test_head_samples_as_recorded(path):
    case = Generator(path)
    head, features, greedy = case.model.head, case["head_features"], case["head_greedy_tokens_samplingpath"]
    close(head(features, greedy), case["head_logits_trainpath_on_greedy_tokens"])
    close(head(features, greedy, first_step=True), case["head_logits_samplingpath"])
    assert not torch.allclose(head(features, greedy), case["head_logits_samplingpath"], atol=0.1)
    cells = sample_cells(case.model, [Cells(features[None], Sampling(temperature=0), [torch.Generator()])])[0]
    assert torch.equal(cells[0], greedy)
    said, cache = head.condition_proj(features), head.new_cache(len(features))
    before = [None, *greedy.unbind(1)]
    cached = [head.next_logits(said, previous, cache, True) for previous in before[:-1]]
    close(torch.stack(cached, dim=1), case["head_logits_samplingpath"])


@each("tokenbridge_generator")
def test_whole_runs(path):
    case = Generator(path)
    runs = {match: name for name in case.arrays if (match := re.match(r"sample_cfg([\d.]+)_(\w+)_it(\d+)$", name))}
    assert runs
    for match, name in runs.items():
        sampled = dimension_wise(
            case.model,
            case.quantizer.values(),
            {"class_labels": case["labels"]},
            generators=[torch.Generator() for _ in case["labels"]],
            sampling=Sampling(temperature=0),
            guidance_scale=float(match[1]),
            settings=DimensionWise(steps=int(match[3]), guidance_schedule=match[2]),
            order=case["sample_orders"],
        )
        side = case.model.config.grid_size
        close(case.quantizer.decode(sampled.tokens).transpose(1, 2).unflatten(2, (side, side)), case[name])


MODELS = [(path, name) for path in find("tokenbridge_official_keys") for name in json.loads(path.read_text())]


@pytest.mark.parametrize(("path", "name"), MODELS, ids=[f"{path.stem}-{name}" for path, name in MODELS])
def test_official_keys(path, name):
    entry = json.loads(path.read_text())[name]
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, (shape, _) in entry["keys"].items()}
        model = TokenBridge(**_token_bridge_config(official))
    renamed = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    assert {key.removeprefix("head."): shape for key, shape in renamed.items()} == {
        key: shape for key, (shape, _) in entry["keys"].items() if key not in _BUFFERS
    }
    assert sum(weight.numel() for weight in model.parameters()) == entry["n_params"]
    letter = {"base": "B", "large": "L", "huge": "H"}[name.split("_")[-1]]
    preset = {key: model.config[key] for key in PRESETS[letter]}
    assert preset == PRESETS[letter] and model.config.head_heads == 8
