"""Every kind at a tiny size: it trains, its weights load as the product loads them, and training goes on from them."""

import numpy as np
import pytest
import torch
from transformers import T5EncoderModel

from studio.checkpoints.loading import load
from studio.data.captions import prompt_completion
from studio.errors import StudioError
from studio.models.llama_blocks import NULL_CAPTION
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.training import (
    KINDS,
)
from studio.training import options as options_module
from studio.training.options import FAMILY, merge, preset_names, read_preset
from tests.training.tiny_recipes import GENERATORS, LOADED, TINY, build, network, read, run


@pytest.mark.parametrize("kind", KINDS)
def test_trains_exports_and_goes_on(kind, small, tmp_path):
    result = run(kind, tmp_path / kind)
    assert result["steps"] == 2 and np.isfinite(result["loss"]) and np.isfinite(result["validation_loss"])
    model = read(kind, result["folder"])
    assert isinstance(model, LOADED[kind])
    if kind in GENERATORS:
        assert model.config.prompt_completion == prompt_completion() and "red apple" in model.vocabulary[1]
    sheet = tmp_path / kind / "samples" / "000002.png"
    assert sheet.is_file() == (kind not in ("drafter", "mar-drafter", "judge", "tower", "reader", "quecc", "diffrate"))
    start = {"init_from": kind, "learning_rate": 1e-12}
    further = run(kind, tmp_path / "further", steps=1, **start)
    before, after = (network(part).state_dict() for part in (model, read(kind, further["folder"])))
    for key in before:
        assert torch.allclose(before[key], after[key], atol=5e-2), key


def test_a_token_bridge_goes_on_from_a_mar(small, tmp_path):
    mar = network(read("mar", run("mar", tmp_path / "mar")["folder"])).state_dict()
    found = run("token-bridge", tmp_path / "bridge", steps=1, init_from="mar", learning_rate=1e-12)
    bridge = network(read("token-bridge", found["folder"])).state_dict()
    mar["output_pos_embed"] = mar.pop("diffusion_pos_embed_learned")
    shared = [key for key in mar if not key.startswith("diffloss.")]
    assert len(shared) > 40 and all(torch.allclose(mar[key], bridge[key], atol=5e-2) for key in shared)
    fresh = run("token-bridge", tmp_path / "fresh", steps=1, learning_rate=1e-12)
    other = network(read("token-bridge", fresh["folder"])).state_dict()  # negative control
    assert not all(torch.allclose(mar[key], other[key], atol=5e-2) for key in shared)
    with pytest.raises(StudioError, match="of the same sizes"):
        run("token-bridge", tmp_path / "large", steps=1, init_from="mar", dim=64, model={"heads": 1})
    with pytest.raises(StudioError, match="encoder_heads 1, not 2"):
        run("token-bridge", tmp_path / "heads", steps=1, init_from="mar", model={"heads": 2})
    text, own = (f"{tmp_path / name}/model/text_encoder" for name in ("mar", "bridge"))
    before, after = (T5EncoderModel.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (text, own))
    assert all(torch.allclose(before[key], after[key], atol=5e-2) for key in before)  # it was trained along


@pytest.mark.parametrize("kind", ["llamagen", "resgen"])
def test_goes_on_over_another_text_encoder(kind, small, tmp_path):
    """Its captions may have another length: the null caption is then the run's own, all else goes on."""
    before = network(read(kind, run(kind, tmp_path / "before")["folder"]))
    length = before.config.caption_length + 3
    longer = type(before).from_config({**before.config, "caption_length": length})
    weights = before.state_dict()
    [name] = [key for key in weights if key.endswith(NULL_CAPTION)]
    longer.load_state_dict(weights | {name: torch.ones(length, weights[name].shape[1])})
    longer.save_pretrained(tmp_path / "before" / "model" / "transformer")
    found = run(kind, tmp_path / "on", steps=1, init_from="before", learning_rate=1e-12)
    after = network(read(kind, found["folder"])).state_dict()
    assert after[name].shape == weights.pop(name).shape and not (after[name] == 1).all()
    assert all(torch.allclose(value, after[key], atol=5e-2) for key, value in weights.items())


def test_a_text_encoder_that_is_given_stays_as_it_is(small, tmp_path):
    taught = read("text-encoder", run("text-encoder", tmp_path / "words")["folder"]).state_dict()
    pipe = load(run("llamagen", tmp_path / "run", text_encoder="words")["folder"], device="cpu")
    for key, weight in pipe.text_encoder.state_dict().items():
        assert torch.equal(weight, taught[key]), key


def test_kl_and_rvq_start_from_the_blocks_of_a_vq(small, tmp_path):
    run("vq", tmp_path / "vq", model={"z_channels": 32}, layers=1, steps=1)
    for kind in ("kl", "rvq"):
        assert run(kind, tmp_path / kind, init_from="vq", steps=1)["steps"] == 1


def test_the_ablation_of_resgen_has_a_softmax_and_other_weights_are_refused(small, tmp_path):
    run("resgen", tmp_path / "mixture", steps=1)
    softmax = {"model": {"prediction": "levels"}, "layers": 1, "dim": 32}
    assert run("resgen", tmp_path / "softmax", steps=1, **softmax)["steps"] == 1
    with pytest.raises(StudioError, match="no weights of such a resgen"):
        run("resgen", tmp_path / "other", steps=1, init_from="mixture", **softmax)
    with pytest.raises(StudioError, match="not RQTransformer"):
        run("rq-transformer", tmp_path / "rq", steps=1, init_from="mixture")


def test_a_generator_over_rows_samples_any_length(small, tmp_path):
    run("one-d-piece", tmp_path / "row", steps=1)
    pipe = load(run("llamagen", tmp_path / "run", tokenizer="row", steps=1)["folder"], device="cpu")
    assert isinstance(pipe.image_tokenizer, OneDPieceTokenizer) and pipe.transformer.config.row_length == 8
    assert pipe("a red apple", num_tokens=2).tokens.shape == (1, 2)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("vq", {"tokenizer": "x"}, "does not take --tokenizer"),
        ("vq", {"grid": 5}, "power of two"),
        ("vq", {"model": {"depth": 3}}, r"\[model\] of vq has no depth"),
        ("llamagen", {"tokenizer": "kl"}, "trained on the tokens of a VQTokenizer or OneDPieceTokenizer"),
        ("llamagen", {"tokenizer": "vq", "size": 32}, "reads images of 16 px, not 32"),
        ("llamagen", {"tokenizer": "nowhere"}, "There is no model nowhere"),
        ("mar", {"tokenizer": None}, "needs an image tokenizer"),
        ("drafter", {"target": None}, "name it with --target"),
        ("student", {"target": "vq"}, "is for a LlamaGenPipeline"),
        ("quecc", {"target": None}, "name it with --target"),
        ("quecc", {"target": "vq"}, "for a reader such as emoji-vlm"),
        ("diffrate", {"target": None}, "A diffrate is trained for a reader"),
        ("diffrate", {"target": "vq"}, "for a reader such as emoji-vlm"),
        ("diffrate", {"target": "reader", "tokens": 4}, "does not take --tokens"),
        ("diffrate", {"target": "reader", "model": {"flops": 0.5}}, "flops must be a finite number above 0.5"),
        ("diffrate", {"target": "reader", "model": {"flops": 1.5}}, "flops must be a finite number above 0.5"),
        ("diffrate", {"target": "reader", "model": {"rank": "size"}}, "rank is one of attention, likeness"),
        ("quecc", {"target": "reader", "tokens": 25}, "become 1, 4, 9, 16, 36, 64, 144, 576 tokens, not 25"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(kind, options, words, small, tmp_path):
    for name in ("vq", "kl", "reader"):
        if name in options.values():
            build(name, tmp_path / name)
    with pytest.raises(StudioError, match=words):
        run(kind, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_family_is_the_presets_and_builds_on_itself():
    assert set(FAMILY) == set(preset_names())
    made = set()
    for name in FAMILY:
        preset = merge(read_preset(name))
        assert preset.minutes and preset.kind in KINDS
        for needed in (preset.tokenizer, preset.text_encoder, preset.target, preset.init_from):
            assert needed is None or needed in made, (name, needed)
        made.add(name)


def test_a_family_trains_and_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "FAMILY", ("one", "two"))
    presets = {"one": {**TINY["vq"], "kind": "vq", "minutes": 1}, "two": {"kind": "llamagen", "minutes": 3}}
    presets["two"] |= {**TINY["llamagen"], "tokenizer": "one"}
    monkeypatch.setattr(options_module, "read_preset", lambda name: {**presets[name], "batch_size": 4})
    from studio.training import train_family

    results = train_family(minutes=0.004, out=tmp_path)
    assert list(results) == ["one", "two"] and results["two"]["steps"] >= 1
    assert train_family(minutes=0.004, out=tmp_path, resume=True) == {}
    with pytest.raises(StudioError, match="decide steps"):
        train_family(minutes=1, out=tmp_path / "other", steps=3)
