"""Published drafters become folders; what is none is refused."""

import pytest
import torch
from safetensors.torch import save_file

from studio import StudioError
from studio.checkpoints.drafter import convert_drafter
from studio.models.drafter import Drafter


def authors_state(dim=64, layers=2, vocab=32, hidden=96):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (vocab, dim), "fc.weight": (dim, 2 * dim), "fc.bias": (dim,)}
    for layer in range(layers):
        name = f"layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (dim, dim) for part in "qkvo"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (hidden, dim) for part in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (dim, hidden), f"{name}post_attention_layernorm.weight": (dim,)}
        if layer:
            shapes[f"{name}input_layernorm.weight"] = (dim,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_folder_with_the_same_weights(tmp_path):
    state = authors_state()
    save_file({**state, "lm_head.weight": torch.ones(32, 64)}, tmp_path / "drafter.safetensors")
    folder = convert_drafter(tmp_path / "drafter.safetensors", tmp_path / "out", grid_size=4, prefix_length=5)
    drafter = Drafter.from_pretrained(folder)
    assert (drafter.config.num_layers, drafter.config.ffn_dim, drafter.config.prefix_length) == (2, 96, 5)
    q, k, v = (state[f"layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(drafter.layers[1].attention.wqkv.weight, torch.cat((q, k, v)))
    assert torch.equal(drafter.fc.bias, state["fc.bias"])
    assert drafter(torch.zeros(1, 7, dtype=torch.long), torch.randn(1, 7, 64)).shape == (1, 7, 64)


@pytest.mark.parametrize("missing", ["fc.weight", "layers.0.self_attn.v_proj.weight", "embed_tokens.weight"])
def test_what_is_no_drafter_is_refused(missing, tmp_path):
    state = authors_state()
    del state[missing]
    save_file(state, tmp_path / "drafter.safetensors")
    with pytest.raises(StudioError):
        convert_drafter(tmp_path / "drafter.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
