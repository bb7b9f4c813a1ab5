"""Files of RQ-VAE and RQ-Transformer become folders; others are refused."""

import pytest
import torch
import torch.nn.functional as F

from studio import StudioError
from studio.checkpoints.residual import convert_rq_transformer, convert_rq_vae
from studio.models.rq_transformer import RQTransformer
from studio.tokenizers.rvq import RVQTokenizer


def published(model):
    """An `RVQTokenizer`'s weights as the authors store them."""
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("quantizer.")}
    for level, table in enumerate(model.codebooks):
        prefix = f"quantizer.codebooks.{level}."
        state[prefix + "weight"] = F.pad(table, (0, 0, 0, 1))
        state[prefix + "cluster_size_ema"], state[prefix + "embed_ema"] = torch.zeros(len(table)), table.clone()
    return state


@pytest.fixture(params=[{}, {"shared_codebook": False, "codebook_size": (16, 8), "feature_dim": 1, "cell": (2, 2)}])
def tokenizer(request):
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multipliers": (1, 2), "res_blocks": 1, "attention_levels": (0,)}
    sizes |= {"z_channels": 8, "feature_dim": 4, "depth": 2, "codebook_size": 16}
    return RVQTokenizer(**sizes | request.param).eval()


@pytest.mark.parametrize("place", ["state_dict", "state_dict_ema"])
def test_rq_vae(tokenizer, place, tmp_path):
    torch.save({"state_dict": {"other": torch.zeros(1)}, place: published(tokenizer)}, tmp_path / "file.pt")
    loaded = RVQTokenizer.from_pretrained(convert_rq_vae(tmp_path / "file.pt", tmp_path / "out"))
    assert loaded.config.shared_codebook == tokenizer.config.shared_codebook
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded(images)[0], tokenizer(images)[0])


def test_rq_transformer(tmp_path):
    model = RQTransformer(dim=64, spatial_layers=1, depth_layers=1, spatial_heads=1, depth_heads=1, vocab_size=9,
                          code_dim=4, num_classes=5)  # fmt: skip
    torch.save({"state_dict": model.state_dict()}, tmp_path / "file.pt")
    loaded = RQTransformer.from_pretrained(convert_rq_transformer(tmp_path / "file.pt", tmp_path / "out"))
    assert loaded.vocab_sizes == (9,) * 4
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_refuses_other_files(tokenizer, tmp_path):
    state = published(tokenizer)
    state["quantizer.codebooks.0.weight"][-1] = 1
    torch.save({"state_dict": state}, tmp_path / "padding.pt")
    with pytest.raises(StudioError, match="no padding"):
        convert_rq_vae(tmp_path / "padding.pt", tmp_path / "out")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    for convert in (convert_rq_vae, convert_rq_transformer):
        with pytest.raises(StudioError, match="it has no"):
            convert(tmp_path / "other.pt", tmp_path / "out")
        with pytest.raises(StudioError, match="not a file"):
            convert(tmp_path / "none.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
