"""Files of RQ-VAE and RQ-Transformer become folders; others are refused."""

import pytest
import torch
import torch.nn.functional as F

from studio import StudioError
from studio.checkpoints.loading import load
from studio.checkpoints.residual import convert_rq_transformer, convert_rq_vae
from studio.models.rq_transformer import RQTransformer
from studio.pipelines.rq_transformer import RQTransformerPipeline
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


@pytest.fixture
def fitting():
    """A tokenizer of 4x4 cells of two levels, and the sizes of a network for its codes."""
    torch.manual_seed(0)
    tokenizer = RVQTokenizer(
        base_channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(0,), z_channels=8, feature_dim=4,
        depth=2, codebook_size=16, sample_size=8,
    )  # fmt: skip
    sizes = {"grid": (4, 4), "depth": 2, "vocab_size": 16, "code_dim": 4, "dim": 64}
    sizes |= {f"{part}_{what}": 1 for part in ("spatial", "depth") for what in ("layers", "heads")}
    return tokenizer.eval(), sizes


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("classes", [1, 5])
def test_both_make_a_pipeline(fitting, converted, classes, tmp_path):
    tokenizer, sizes = fitting
    model, source = RQTransformer(num_classes=classes, **sizes).eval(), tmp_path / "tokenizer"
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    if converted:
        tokenizer.save_pretrained(source)
    else:
        torch.save({"state_dict": published(tokenizer)}, source)
    pipe = load(convert_rq_transformer(tmp_path / "model.pt", tmp_path / "out", source), device="cpu")
    sampled, whole = (
        each(class_labels=0, generator=torch.Generator().manual_seed(0))
        for each in (pipe, RQTransformerPipeline(tokenizer, model))
    )
    assert torch.equal(sampled.tokens, whole.tokens) and sampled.images[0].tobytes() == whole.images[0].tobytes()
    assert pipe.config.default_guidance_scale == 1 and sampled.images[0].size == (8, 8)


def test_parts_that_make_no_pipeline(fitting, tmp_path):
    tokenizer, sizes = fitting
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, condition in (
        ("texts", {"caption_words": 9, "caption_length": 4}),
        ("deeper", {"num_classes": 5, "depth": 3}),
    ):
        model = RQTransformer(**{**sizes, **condition})
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{name}.pt")
    with pytest.raises(StudioError, match="words of its own.*give no tokenizer"):
        convert_rq_transformer(tmp_path / "texts.pt", tmp_path / "out", tmp_path / "tokenizer")
    with pytest.raises(StudioError, match="levels 2, the transformer 3"):
        convert_rq_transformer(tmp_path / "deeper.pt", tmp_path / "out", tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()
    alone = RQTransformer.from_pretrained(convert_rq_transformer(tmp_path / "texts.pt", tmp_path / "out"))
    assert (alone.config.caption_words, alone.config.caption_length) == (9, 4)


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
