"""Every recipe at a tiny size: it runs, its weights load as the product loads them, and training goes on from them."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, T5EncoderModel

from studio.checkpoints.loading import load
from studio.data.captions import open_choices
from studio.errors import StudioError
from studio.evaluation.judge import Judge, load_judge
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.pipelines.mar import MARPipeline
from studio.pipelines.resgen import ResGenPipeline
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.vq import VQTokenizer
from studio.training import (
    captioned_tokens,
    emoji_1d,
    emoji_1d_ar,
    emoji_ar,
    emoji_bridge,
    emoji_distilled,
    emoji_drafter,
    emoji_judge,
    emoji_kl,
    emoji_mar,
    emoji_mar_draft,
    emoji_resgen,
    emoji_resgen_softmax,
    emoji_rq_ar,
    emoji_rvq,
    emoji_tower,
    emoji_vlm,
    emoji_vq,
    emoji_words,
    from_codes,
    from_words,
    pair_cache,
    reader,
    token_cache,
)
from studio.training.caption_tokenizer import known_words, train_caption_tokenizer
from studio.training.recipe import Defaults
from studio.training.recipes import RECIPES, run


@pytest.fixture
def small(monkeypatch, few_pictures, tiny_folder, tiny_mar_folder, tiny_resgen_folder, tiny_row_folder):
    """Tiny networks, forty pictures, and no measuring."""
    few_pictures(40)
    monkeypatch.setitem(emoji_vq.CONFIG, "base_channels", 32)
    monkeypatch.setitem(emoji_vq.CONFIG, "codebook_size", 64)
    monkeypatch.setitem(emoji_kl.AUTOENCODER, "block_out_channels", [32, 32])
    monkeypatch.setattr(emoji_kl, "MEASURED", 8)
    tiny = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    for recipe in (emoji_ar, emoji_1d_ar):
        monkeypatch.setattr(recipe, "TRANSFORMER", {**recipe.TRANSFORMER, **tiny})
    monkeypatch.setattr(emoji_1d_ar, "IMAGE_TOKENIZER", str(tiny_row_folder / "image_tokenizer"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(emoji_words.EmojiWords, "defaults", Defaults(steps=1, batch_size=4, learning_rate=8e-3))
    monkeypatch.setattr(emoji_words, "FITTED_CAPTIONS", 64)
    monkeypatch.setattr(reader, "TOWER", sizes)
    monkeypatch.setattr(reader, "TEXT", sizes)
    monkeypatch.setattr(emoji_vlm, "TILES", ((1, 1), (1, 2)))
    monkeypatch.setattr(emoji_distilled, "TEACHER", str(tiny_folder))
    monkeypatch.setattr(emoji_distilled, "PAIRS", 6)
    monkeypatch.setattr(emoji_distilled, "NUM_LAYERS", 1)
    monkeypatch.setattr(pair_cache, "CHUNK", 4)
    monkeypatch.setattr(emoji_drafter, "TARGET", str(tiny_folder))
    monkeypatch.setattr(emoji_mar, "IMAGE_TOKENIZER", str(tiny_mar_folder / "image_tokenizer"))
    monkeypatch.setattr(from_words, "TEXT", str(tiny_folder))
    monkeypatch.setattr(emoji_mar_draft, "TARGET", str(tiny_mar_folder))
    tiny_mar = {
        f"{half}_{name}": size
        for half in ("encoder", "decoder")
        for name, size in (("dim", 32), ("depth", 1), ("heads", 2))
    }
    for recipe in (emoji_mar.EmojiMAR, emoji_mar_draft.EmojiMARDraft, emoji_bridge.EmojiBridge):
        monkeypatch.setattr(recipe, "sizes", {**recipe.sizes, **tiny_mar, "head_width": 32, "head_depth": 1})
    monkeypatch.setitem(emoji_bridge.EmojiBridge.sizes, "head_heads", 2)
    tiny_rvq = {"base_channels": 32, "res_blocks": 1, "z_channels": 32, "feature_dim": 4, "codebook_size": 64}
    monkeypatch.setattr(emoji_rvq, "CONFIG", {**emoji_rvq.CONFIG, **tiny_rvq})
    monkeypatch.setattr(emoji_rvq, "MEASURED", 8)
    monkeypatch.setattr(from_codes, "IMAGE_TOKENIZER", str(tiny_resgen_folder / "image_tokenizer"))
    monkeypatch.setattr(emoji_resgen, "SIZES", {"dim": 32, "num_layers": 1, "num_heads": 2})
    monkeypatch.setattr(emoji_resgen, "MIXTURE", {"components": 8, "rank": 2})
    tiny_rq = {f"{part}_{what}": size for part in ("spatial", "depth") for what, size in (("layers", 1), ("heads", 2))}
    monkeypatch.setattr(emoji_rq_ar, "SIZES", {**emoji_rq_ar.SIZES, "dim": 32, **tiny_rq})
    tiny_row = {"num_tokens": 8, "codebook_size": 64, "pixel_base_channels": 8}
    for part in ("encoder", "decoder"):
        tiny_row |= {f"{part}_width": 32, f"{part}_layers": 1, f"{part}_heads": 2}
    monkeypatch.setattr(emoji_1d, "CONFIG", {**emoji_1d.CONFIG, **tiny_row})
    for recipe in (
        emoji_1d.Emoji1D, emoji_1d_ar.Emoji1DAR, emoji_bridge.EmojiBridge,
        emoji_ar.EmojiAR, emoji_distilled.EmojiDistilled, emoji_drafter.EmojiDrafter, emoji_judge.EmojiJudge,
        emoji_kl.EmojiKL, emoji_mar.EmojiMAR, emoji_mar_draft.EmojiMARDraft, emoji_tower.EmojiTower,
        emoji_resgen.EmojiResGen, emoji_resgen_softmax.EmojiResGenSoftmax, emoji_rq_ar.EmojiRQAR,
        emoji_rvq.EmojiRVQ, emoji_vlm.EmojiVLM, emoji_vq.EmojiVQ, emoji_words.EmojiWords,
    ):  # fmt: skip
        monkeypatch.setattr(recipe, "quality", lambda self, folder: {"measured": False})


KINDS = {
    "emoji-1d": OneDPieceTokenizer,
    "emoji-1d-ar": LlamaGenPipeline,
    "emoji-ar": LlamaGenPipeline,
    "emoji-bridge": TokenBridgePipeline,
    "emoji-distilled": LlamaGenPipeline,
    "emoji-drafter": LlamaGenPipeline,
    "emoji-judge": Judge,
    "emoji-kl": KLTokenizer,
    "emoji-mar": MARPipeline,
    "emoji-mar-draft": MARPipeline,
    "emoji-resgen": ResGenPipeline,
    "emoji-resgen-softmax": ResGenPipeline,
    "emoji-rq-ar": RQTransformerPipeline,
    "emoji-rvq": RVQTokenizer,
    "emoji-tower": CLIPVisionModel,
    "emoji-vlm": VisualQuestionPipeline,
    "emoji-vq": VQTokenizer,
    "emoji-words": T5EncoderModel,
}

FROM_WORDS = {
    "emoji-1d-ar", "emoji-ar", "emoji-bridge", "emoji-mar", "emoji-resgen", "emoji-resgen-softmax", "emoji-rq-ar",
}  # fmt: skip


def read(name, folder):
    if name == "emoji-tower":
        return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    if name == "emoji-words":
        return T5EncoderModel.from_pretrained(f"{folder}/text_encoder", dtype=torch.float32)
    return load_judge(folder, "cpu") if name == "emoji-judge" else load(folder, device="cpu")


def network(model):
    """The part that was trained."""
    parts = (getattr(model, name, None) for name in ("student", "drafter", "transformer", "model"))
    return next((part for part in parts if part is not None), model)


@pytest.mark.parametrize("name", RECIPES)
def test_trains_exports_and_goes_on(name, small, tmp_path):
    result = run(name, out=tmp_path / "run", steps=2, batch_size=4)
    assert result["steps"] == 2 and result["loss"] > 0
    model = read(name, result["folder"])
    assert isinstance(model, KINDS[name])
    if name in FROM_WORDS:
        assert model.config.open_choices == open_choices()
    start = {"init_from": result["folder"], "learning_rate": 1e-12}
    further = run(name, out=tmp_path / "further", steps=1, batch_size=4, **start)
    before, after = (network(part).state_dict() for part in (model, read(name, further["folder"])))
    for key in before:
        assert torch.allclose(before[key], after[key], atol=5e-2), key


def test_another_recipe_s_weights_are_refused_in_one_sentence(small, tmp_path):
    start = run("emoji-resgen", out=tmp_path / "mixture", steps=1, batch_size=2)["folder"]
    for name, words in (
        ("emoji-resgen-softmax", "no weights of emoji-resgen-softmax"),
        ("emoji-rq-ar", "not RQTransformer"),
    ):
        with pytest.raises(StudioError, match=f"{start}.* {words}"):
            run(name, out=tmp_path / name, steps=1, batch_size=2, init_from=start)


def test_lengths_are_drawn_evenly():
    """20,000 draws (seed 0): each of 8 lengths within 5 standard deviations of its share, one in each half."""
    rng = np.random.default_rng(0)
    drawn = np.array([emoji_1d.random_lengths(2, 8, rng) for _ in range(10000)])
    assert (drawn[:, 0] <= 4).all() and (drawn[:, 1] > 4).all()
    counts = np.bincount(drawn.reshape(-1), minlength=9)[1:]
    assert (np.abs(counts - 2500) < 5 * (10000 * 0.25 * 0.75) ** 0.5).all()
    assert set(emoji_1d.random_lengths(4, 4, rng)) == {1, 2, 3, 4}


def test_a_batch_is_restored_from_as_many_lengths_as_drawn(small):
    recipe = emoji_1d.Emoji1D()
    module = recipe.build(torch.device("cpu")).eval()
    batch = recipe.batch(np.random.default_rng(0), 6, torch.device("cpu"))
    assert len(batch["lengths"]) == emoji_1d.GROUPS
    kept = []
    decode = module.tokenizer.decode_vectors
    module.tokenizer.decode_vectors = lambda part, length: kept.append((len(part), length)) or decode(part, length)
    assert module(**batch).isfinite()
    assert [length for _, length in kept] == batch["lengths"].tolist() and sum(n for n, _ in kept) == 6


def test_the_exported_pipeline_shares_the_bundled_tokenizer_and_names_its_words(small, tmp_path):
    folder = tmp_path / "run" / "model"
    run("emoji-ar", out=tmp_path / "run", steps=1, batch_size=2)
    assert not (folder / "image_tokenizer").exists() and (folder / "README.md").is_file()
    words, concepts = load(folder, device="cpu").vocabulary
    assert {"apple", "red", "flat", "background"} <= set(words) and "red apple" in concepts


def test_a_generator_over_rows_brings_its_tokenizer_and_draws_any_length(small, tmp_path):
    pipe = load(run("emoji-1d-ar", out=tmp_path / "run", steps=1, batch_size=2)["folder"], device="cpu")
    assert isinstance(pipe.image_tokenizer, OneDPieceTokenizer) and pipe.transformer.config.row_length == 6
    assert pipe.config.open_choices and pipe("a red apple", num_tokens=2).tokens.shape == (1, 2)


def test_the_maps_of_the_codebook_are_merged_into_the_tables(small):
    recipe = emoji_ar.EmojiAR()
    module = recipe.build(torch.device("cpu")).eval()
    batch = recipe.batch(np.random.default_rng(0), 4, torch.device("cpu"))
    batch["seen"][:] = True
    torch.nn.init.normal_(module.transformer.output.weight)

    def loss(transformer):
        torch.manual_seed(0)
        plain = emoji_ar.TrainableGenerator(module.text_encoder, transformer, module.codebook)
        return plain(**batch)

    without = loss(module.transformer)
    torch.nn.init.normal_(module.code_embedding)
    torch.nn.init.normal_(module.code_output)
    torch.manual_seed(0)
    assert torch.allclose(module(**batch), loss(module.merged()), atol=1e-4)
    assert not torch.allclose(module(**batch), without, atol=1e-2)


def test_earlier_tokens_are_hidden_and_misleading_in_some_pictures(small):
    """2,000 rows (seed 0): the share of rows with marks within 5 standard deviations, any number of them; controls."""
    rng, shape = np.random.default_rng(0), (2000, 63)
    for draw in (emoji_ar.scattered, emoji_ar.stretches):
        assert not draw(shape, 0.0, rng).any()
        marked = draw(shape, 0.5, rng)
        share, filled = marked.any(axis=1).mean(), marked.mean(axis=1)
        assert abs(share - 0.5) < 5 * (0.25 / 2000) ** 0.5 + 1 / 63
        assert filled.max() > 0.9 and 0.1 < np.median(filled[filled > 0]) < 0.6
    runs = np.diff(emoji_ar.stretches(shape, 1.0, rng).astype(int), prepend=0, append=0, axis=1)
    assert ((runs == 1).sum(axis=1) <= 1).all()
    recipe = emoji_ar.EmojiAR()
    recipe.build(torch.device("cpu"))
    batch = recipe.batch(rng, 40, torch.device("cpu"))
    true, others = batch["tokens"][:, :-1], batch["tokens"].roll(1, dims=0)[:, :-1]
    wrong = batch["fed"] != true
    assert wrong.any() and not wrong.all() and torch.equal(batch["fed"][wrong], others[wrong])


def test_words_come_first_where_nothing_is_given(small, tmp_path):
    out = tmp_path / "run"
    start = run("emoji-ar", out=out, steps=3, batch_size=2)["folder"]
    words = T5EncoderModel.from_pretrained(out / "first" / "model" / "text_encoder").state_dict()
    for key, weight in load(start, device="cpu").text_encoder.state_dict().items():
        assert torch.equal(weight, words[key].float()), key
    assert "emoji-words, 1 steps of 4 before" in (out / "model" / "README.md").read_text()
    run("emoji-ar", out=tmp_path / "further", steps=3, batch_size=2, init_from=start)
    assert not (tmp_path / "further" / "first").exists()


def test_a_run_that_ended_in_its_first_part_goes_on(small, tmp_path, monkeypatch):
    def stop(self, device):
        raise KeyboardInterrupt

    whole = run("emoji-ar", out=tmp_path / "whole", steps=3, batch_size=2)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(emoji_ar.EmojiAR, "build", stop)
        run("emoji-ar", out=tmp_path / "run", steps=3, batch_size=2)
    with pytest.raises(StudioError, match="--resume"):
        run("emoji-ar", out=tmp_path / "run", steps=3, batch_size=2)
    resumed = run("emoji-ar", out=tmp_path / "run", steps=3, batch_size=2, resume=True)
    assert resumed["loss"] == whole["loss"]


def test_a_token_model_starts_from_words_alone(small, tmp_path):
    words = run("emoji-words", out=tmp_path / "words", steps=2, batch_size=4)["folder"]
    pipe = load(run("emoji-ar", out=tmp_path / "run", steps=1, batch_size=2, init_from=words)["folder"], device="cpu")
    taught = read("emoji-words", words).state_dict()
    for key, weight in pipe.text_encoder.state_dict().items():
        assert torch.equal(weight, taught[key]), key


def test_tokens_are_cached_by_weights(small, tiny_vq, tmp_path, monkeypatch):
    tiny_vq.save_pretrained(tmp_path / "vq")
    weights = tmp_path / "vq" / "diffusion_pytorch_model.safetensors"
    drawn, tokens = token_cache.training_tokens(tiny_vq, weights)
    assert drawn.shape == (40, 3) and tokens.shape == (40, 16)
    monkeypatch.setattr(token_cache, "tokens_of", None)
    assert torch.equal(token_cache.training_tokens(tiny_vq, weights)[1], tokens)
    weights.write_bytes(b"other weights")
    with pytest.raises(TypeError):
        token_cache.training_tokens(tiny_vq, weights)


def test_every_full_caption_fits_and_is_told_apart():
    from studio.data.archive import load_concepts
    from studio.data.captions import full_caption

    tokenizer = train_caption_tokenizer(captioned_tokens.CAPTION_LENGTH, captioned_tokens.PLAN_SIZE**2)
    captions = [full_caption(concept.index, 0, 5) for concept in load_concepts()]
    ids = tokenizer(captions)["input_ids"]
    assert max(map(len, ids)) <= captioned_tokens.CAPTION_LENGTH
    assert len({tuple(row) for row in ids}) == len({caption.lower() for caption in captions})
    assert tokenizer("A Red APPLE!")["input_ids"] == tokenizer("a red apple")["input_ids"]
    assert {"apple", "heart", "eyes", "heart-eyes"} <= set(known_words())


def test_a_reader_starts_from_the_tower(small, tmp_path):
    run("emoji-tower", out=tmp_path / "tower", steps=1, batch_size=2)
    start = str(tmp_path / "tower" / "model")
    run("emoji-vlm", out=tmp_path / "run", steps=1, batch_size=2, learning_rate=1e-12, init_from=start)
    tower = load(tmp_path / "run" / "model", device="cpu").model.model.vision_tower.state_dict()
    for key, weight in read("emoji-tower", start).state_dict().items():
        assert torch.allclose(tower[key], weight, atol=1e-2), key


def test_a_tower_goes_on_inside_a_reader_and_changes_nothing_else(small, tmp_path):
    run("emoji-vlm", out=tmp_path / "reader", steps=1, batch_size=2)
    start = tmp_path / "reader" / "model"
    run("emoji-tower", out=tmp_path / "run", steps=1, batch_size=2, init_from=str(start))
    before, after = (load(folder, device="cpu").model.state_dict() for folder in (start, tmp_path / "run" / "model"))
    changed = [key for key, weight in before.items() if not torch.equal(weight, after[key])]
    assert changed and all("vision_tower" in key for key in changed)
