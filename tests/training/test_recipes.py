"""Every kind at a tiny size: it trains, its weights load as the product loads them, and training goes on from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, T5EncoderModel

from studio.checkpoints.loading import load
from studio.data.captions import prompt_completion
from studio.errors import StudioError
from studio.evaluation.judge import Judge, load_judge
from studio.models.llama_blocks import NULL_CAPTION
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.pipelines.mar import MARPipeline
from studio.pipelines.resgen import ResGenPipeline
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pipelines.xar import XARPipeline
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.vq import VQTokenizer
from studio.training import (
    KINDS,
    diffrate,
    generator,
    kl,
    llamagen,
    loop,
    one_d_piece,
    quecc,
    reader,
    reader_network,
    resgen,
    rvq,
    train,
    vq,
)
from studio.training import options as options_module
from studio.training.options import FAMILY, merge, preset_names, read_preset

TINY = {
    "vq": {"size": 16, "grid": 4, "dim": 32, "codes": 64, "layers": 1},
    "rvq": {"size": 16, "grid": 4, "dim": 32, "codes": 64, "layers": 1, "model": {"z_channels": 32, "feature_dim": 4}},
    "kl": {"size": 16, "grid": 4, "dim": 32, "layers": 1},
    "one-d-piece": {"size": 16, "tokens": 8, "codes": 64, "dim": 64, "layers": 1, "model": {"patch_size": 4}},
    "text-encoder": {"dim": 32, "layers": 1},
    "llamagen": {"dim": 32, "layers": 1},
    "mar": {"dim": 32, "layers": 2, "model": {"head_width": 32, "head_depth": 1}},
    "token-bridge": {"dim": 32, "layers": 2, "model": {"head_width": 32, "head_depth": 1, "head_heads": 2}},
    "xar": {"dim": 32, "layers": 2},
    "resgen": {"dim": 32, "layers": 1, "model": {"components": 8, "rank": 2}},
    "rq-transformer": {"dim": 32, "layers": 1, "model": {"depth_layers": 1}},
    "drafter": {},
    "mar-drafter": {"dim": 32, "model": {"head_width": 32, "head_depth": 1}},
    "student": {"model": {"pairs": 6}},
    "reader": {},
    "tower": {},
    "quecc": {},
    "diffrate": {"model": {"flops": 0.75}},
    "judge": {"size": 32, "dim": 8},
}
RECIPES = {"vq": vq.VQRecipe, "rvq": rvq.RVQRecipe}
LOADED = {
    "vq": VQTokenizer,
    "rvq": RVQTokenizer,
    "kl": KLTokenizer,
    "one-d-piece": OneDPieceTokenizer,
    "text-encoder": T5EncoderModel,
    "llamagen": LlamaGenPipeline,
    "mar": MARPipeline,
    "token-bridge": TokenBridgePipeline,
    "xar": XARPipeline,
    "resgen": ResGenPipeline,
    "rq-transformer": RQTransformerPipeline,
    "drafter": LlamaGenPipeline,
    "mar-drafter": MARPipeline,
    "student": LlamaGenPipeline,
    "reader": VisualQuestionPipeline,
    "tower": CLIPVisionModel,
    "quecc": VisualQuestionPipeline,
    "diffrate": VisualQuestionPipeline,
    "judge": Judge,
}
NEEDS = {"drafter": "llamagen", "mar-drafter": "mar", "student": "llamagen", "quecc": "reader", "diffrate": "reader"}
TOKENIZER = {"mar": "kl", "token-bridge": "kl", "xar": "kl", "resgen": "rvq", "rq-transformer": "rvq"}
GENERATORS = ("llamagen", "mar", "token-bridge", "xar", "resgen", "rq-transformer")
BUILT = {}
"""Runs on the emoji set that others build on, by kind: each is trained once."""


@pytest.fixture
def small(monkeypatch, few_images):
    """Tiny readers, forty images, and no measuring."""
    few_images(40)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(reader_network, "TOWER", {**sizes, "num_hidden_layers": 3})
    monkeypatch.setattr(reader_network, "TEXT", sizes)
    text = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    monkeypatch.setattr("studio.training.text.TEXT", text)
    monkeypatch.setattr(reader, "TILES", ((1, 1),))
    monkeypatch.setattr(reader, "QUESTIONS", 4)
    monkeypatch.setattr(quecc, "QUESTIONS", 4)
    monkeypatch.setattr(diffrate, "QUESTIONS", 4)
    monkeypatch.setattr(loop, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr("studio.training.pair_cache.CHUNK", 4)
    monkeypatch.setattr("studio.training.student.HELD_OUT_PAIRS", 4)
    for module in (kl, rvq, resgen):
        monkeypatch.setattr(module, "MEASURED", 8)
    monkeypatch.setattr(one_d_piece, "FITTED_TO", 16)
    monkeypatch.setattr(generator, "SHOWN", 2)
    for name in KINDS:
        module, recipe = KINDS[name].split(":")
        monkeypatch.setattr(f"{module}.{recipe}.quality", lambda self, folder: {"measured": False})


def run(kind, out, *, data="emoji", steps=2, **options):
    """Train a kind at a tiny size after what it builds on; its result."""
    builds_on = {}
    if kind in GENERATORS + ("text-encoder",) and "tokenizer" not in options:
        builds_on["tokenizer"] = TOKENIZER.get(kind, "vq")
    if kind in NEEDS and "target" not in options:
        builds_on["target"] = NEEDS[kind]
    for name in builds_on.values():
        _build(name, out.parent / name)
    given = {**TINY[kind], **builds_on, **options}
    return train(kind=kind, data=str(data), out=out, steps=steps, batch_size=4, **given)


def _build(kind, folder):
    """The run of a kind, of one step, beside the others; it may be that of an earlier test."""
    if folder.exists():
        return
    if kind in BUILT:
        folder.symlink_to(BUILT[kind])
    else:
        run(kind, folder, steps=1)
        BUILT[kind] = folder


def read(kind, folder):
    if kind == "tower":
        return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    if kind == "text-encoder":
        return T5EncoderModel.from_pretrained(f"{folder}/text_encoder", dtype=torch.float32)
    return load_judge(folder, "cpu") if kind == "judge" else load(folder, device="cpu")


def network(model):
    """The part that was trained."""
    parts = (getattr(model, name, None) for name in ("student", "drafter", "compressor", "transformer", "model"))
    return next((part for part in parts if part is not None), model)


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


@pytest.mark.parametrize("kind", ["reader", "tower"])
def test_a_reader_that_knows_fewer_words_keeps_them_and_learns_the_others(kind, small, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(reader_network, "load_concepts", lambda: ())
        before = reader_network.build_processor()
    model = reader_network.build_model(len(before.tokenizer))
    for part in (before, model):
        part.save_pretrained(tmp_path / "before")
    rows = model.get_input_embeddings().weight
    found = run(kind, tmp_path / "run", steps=1, init_from=str(tmp_path / "before"), learning_rate=1e-12)
    pipe = load(found["folder"], device="cpu", dtype=torch.float32)
    words, known = pipe.processor.tokenizer.get_vocab(), before.tokenizer.get_vocab()
    assert set(known) < set(words)
    for word, number in words.items():
        row = pipe.model.get_input_embeddings().weight[number]
        expected = rows[known[word]] if word in known else row
        assert torch.allclose(row, expected, atol=1e-3), word
        assert row.norm() > 0 or word == "<pad>", word
        assert word in known or row.norm() < 0.1 * rows.norm(dim=1).mean(), word  # not among the likely answers


@pytest.mark.parametrize(
    "settings, tiles",
    [
        ({"largest": 1, "singles": 0.0}, {(1, 1)}),
        ({"largest": 2, "singles": 0.0}, {(1, 1), (1, 2), (2, 1), (2, 2)}),
        ({"singles": 1.0}, {(1, 1), (2, 2)}),
    ],
)
def test_images_that_a_reader_learns_from(settings, tiles, small, monkeypatch):
    monkeypatch.setattr(reader, "TILES", ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3)))
    recipe = reader.ReaderRecipe(merge({"kind": "reader", "model": settings}), torch.device("cpu"), Path)
    recipe.build()
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        sizes = recipe.batch(rng, 1)["image_sizes"]
        seen |= {tuple(-(-side // reader.TILE) for side in size) for size in sizes.tolist()}
    assert seen == tiles


@pytest.mark.parametrize("settings", [{"largest": 5}, {"largest": 0}, {"singles": 1.5}, {"singles": -0.1}])
def test_images_that_a_reader_cannot_learn_from(settings, small, tmp_path):
    with pytest.raises(StudioError, match=f"{next(iter(settings))} must be .* (to|at most|at least) "):
        run("reader", tmp_path / "run", steps=1, model=settings)


@pytest.mark.parametrize("kind", GENERATORS)
def test_classes_of_a_folder(kind, small, image_folder, tmp_path):
    folder = image_folder(classes=("cat", "dog", "fox"))
    result = run(kind, tmp_path / kind, data=folder)
    pipe = load(result["folder"], device="cpu")
    assert pipe.transformer.config.num_classes == 3 and not pipe.takes_text
    assert pipe.id2label == {0: "cat", 1: "dog", 2: "fox"}
    assert pipe(class_labels="Fox", output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", GENERATORS)
def test_captions_of_a_folder_bring_a_text_encoder_of_their_own(kind, small, image_folder, tmp_path):
    folder = image_folder(captions=True)
    start = run(kind, tmp_path / kind, data=folder, steps=3)
    pipe = load(start["folder"], device="cpu")
    assert pipe.takes_text and pipe("a red pattern", output_type="pt").images.shape == (1, 3, 16, 16)
    trained = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.o.weight
    assert trained.abs().max() > 0  # starts at zero


@pytest.mark.parametrize("kind", ["vq", "rvq"])
def test_a_tokenizer_of_a_folder_resumes_to_the_same_weights(kind, small, image_folder, tmp_path, monkeypatch):
    """Codebooks are averages, and dead codes are revived at random: stopped in the middle, the result is the same."""
    folder, recipe = image_folder(), RECIPES[kind]
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    whole = run(kind, tmp_path / "whole", data=folder, steps=4, accumulate=2, flip=True, crop="random")
    batch, calls = recipe.batch, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return batch(self, *args, **kwargs)

    again = {"data": folder, "steps": 4, "accumulate": 2, "flip": True, "crop": "random"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "batch", stopped)
        run(kind, tmp_path / "broken", **again)
    resumed = run(kind, tmp_path / "broken", resume=True, **again)
    before, after = (read(kind, result["folder"]).state_dict() for result in (whole, resumed))
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert resumed["loss"] == whole["loss"] and resumed["validation_loss"] == whole["validation_loss"]


def test_a_batch_of_one_image_is_enough(small, image_folder, tmp_path):
    for kind in ("vq", "rvq"):
        result = train(kind=kind, data=str(image_folder()), out=tmp_path / kind, steps=1, batch_size=1, **TINY[kind])
        assert np.isfinite(result["loss"]) and np.isfinite(result["validation_loss"]), kind


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
            _build(name, tmp_path / name)
    with pytest.raises(StudioError, match=words):
        run(kind, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_captions_and_classes_are_not_mistaken_for_each_other(small, image_folder, tmp_path):
    classes, plain = image_folder(classes=("a", "b")), image_folder(name="plain")
    _build("vq", tmp_path / "vq")
    with pytest.raises(StudioError, match="neither captions .* nor sub-folders"):
        run("llamagen", tmp_path / "run", data=plain)
    with pytest.raises(StudioError, match="no captions, which text-encoder"):
        run("text-encoder", tmp_path / "run", data=classes)
    with pytest.raises(StudioError, match="leave out --text-encoder"):
        run("llamagen", tmp_path / "run", data=classes, text_encoder="vq")
    with pytest.raises(StudioError, match="emoji set"):
        run("judge", tmp_path / "run", data=classes)


def test_lengths_are_spread_evenly():
    """20,000 lengths (seed 0): each of 8 within 5 standard deviations of its share, one in each half."""
    rng = np.random.default_rng(0)
    lengths = np.array([one_d_piece.random_lengths(2, 8, rng) for _ in range(10000)])
    assert (lengths[:, 0] <= 4).all() and (lengths[:, 1] > 4).all()
    counts = np.bincount(lengths.reshape(-1), minlength=9)[1:]
    assert (np.abs(counts - 2500) < 5 * (10000 * 0.25 * 0.75) ** 0.5).all()
    assert set(one_d_piece.random_lengths(4, 4, rng)) == {1, 2, 3, 4}


def built(kind, tmp_path, **options):
    """A recipe with its module, at a tiny size."""
    from studio.training import Finder

    if kind in GENERATORS:
        _build("vq", tmp_path / "vq")
        options["tokenizer"] = "vq"
    cls = {"llamagen": llamagen.LlamaGenRecipe, "one-d-piece": one_d_piece.OneDPieceRecipe}[kind]
    recipe = cls(merge({"kind": kind, **TINY[kind], **options}), torch.device("cpu"), Finder(tmp_path / "run"))
    torch.manual_seed(0)
    return recipe, recipe.build()


def test_a_batch_is_restored_from_several_lengths(small, tmp_path):
    recipe, module = built("one-d-piece", tmp_path)
    batch = recipe.batch(np.random.default_rng(0), 6)
    assert len(batch["lengths"]) == one_d_piece.GROUPS
    kept = []
    decode = module.tokenizer.decode_vectors
    module.tokenizer.decode_vectors = lambda part, length: kept.append((len(part), length)) or decode(part, length)
    assert module.eval()(**batch).isfinite()
    assert [length for _, length in kept] == batch["lengths"].tolist() and sum(n for n, _ in kept) == 6


def test_the_maps_of_the_codebook_are_merged_into_the_tables(small, tmp_path):
    recipe, module = built("llamagen", tmp_path)
    module.eval()
    batch = recipe.batch(np.random.default_rng(0), 4, training=False)
    torch.nn.init.normal_(module.transformer.output.weight)

    def loss(transformer):
        return llamagen.TrainableLlamaGen(transformer, recipe.text, module.codebook).eval()(**batch)

    without = loss(module.transformer)
    torch.nn.init.normal_(module.code_embedding)
    torch.nn.init.normal_(module.code_output)
    assert torch.allclose(module(**batch), loss(module.merged()), atol=1e-4)
    assert not torch.allclose(module(**batch), without, atol=1e-2)


def test_earlier_tokens_are_hidden_and_misleading_in_some_images(small, tmp_path):
    """2,000 rows (seed 0): the share of rows with marks within 5 standard deviations, any number of them; controls."""
    rng, shape = np.random.default_rng(0), (2000, 63)
    for marks in (llamagen.scattered, llamagen.stretches):
        assert not marks(shape, 0.0, rng).any()
        marked = marks(shape, 0.5, rng)
        share, filled = marked.any(axis=1).mean(), marked.mean(axis=1)
        assert abs(share - 0.5) < 5 * (0.25 / 2000) ** 0.5 + 1 / 63
        assert filled.max() > 0.9 and 0.1 < np.median(filled[filled > 0]) < 0.6
    runs = np.diff(llamagen.stretches(shape, 1.0, rng).astype(int), prepend=0, append=0, axis=1)
    assert ((runs == 1).sum(axis=1) <= 1).all()
    recipe, _ = built("llamagen", tmp_path)
    batch = recipe.batch(rng, 40)
    true, others = batch["tokens"][:, :-1], batch["tokens"].roll(1, dims=0)[:, :-1]
    wrong = batch["fed"] != true
    assert wrong.any() and not wrong.all() and torch.equal(batch["fed"][wrong], others[wrong])


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
