"""Names and shapes of every published file, against our classes at full size on the meta device."""

import json

import pytest
import torch

from studio.checkpoints.llamagen import _gpt_config, _vq_config
from studio.models.llamagen import LlamaGen
from studio.tokenizers.vq import VQTokenizer
from tests.parity.recordings import find

MODELS = [
    (path, name, entry)
    for path in find("llamagen_official_keys")
    for name, entry in json.loads(path.read_text()).items()
    if isinstance(entry, dict) and "keys" in entry
]


def all_layers(shapes, layers):
    """Lists that name only some layers stand for all of them, which are alike."""
    first = {key: shape for key, shape in shapes.items() if key.startswith("layers.0.")}
    repeated = {
        key.replace("layers.0.", f"layers.{layer}.", 1): shape
        for key, shape in first.items()
        for layer in range(layers)
    }
    return {**repeated, **shapes}


@pytest.mark.parametrize(("path", "name", "entry"), MODELS, ids=[f"{path.stem}-{name}" for path, name, _ in MODELS])
def test_keys_and_shapes(path, name, entry):
    ignored = {"quantize.codebook_used", "freqs_cis"}
    shapes = all_layers(
        {key: tuple(shape) for key, shape in entry["keys"].items() if key not in ignored}, entry.get("n_layer", 0)
    )
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, shape in shapes.items()}
        if name.startswith("VQ"):
            model = VQTokenizer(**_vq_config(official))
        else:
            config = _gpt_config(official)
            assert config["num_heads"] == entry["n_head"]
            model = LlamaGen(**config)
            assert model.head_dim == entry["head_dim"]
            assert (model.config.dim, model.config.num_layers) == (entry["dim"], entry["n_layer"])
    ours = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert ours == shapes
    if "params" in entry:
        assert sum(weight.numel() for weight in model.parameters()) == entry["params"]
