"""What families know: layouts, scores as the tower's own attention has them, and pairs that are refused."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig

from studio.errors import StudioError
from studio.pruning.adapters import FAMILIES, family_of
from studio.pruning.api import prune, prune_inputs
from studio.pruning.layout import Layout
from tests.pruning import tiny_models
from tests.pruning.tiny_families import tiny

TOLERANCE = dict(atol=1e-6, rtol=1e-5)


def read(family, names, numbers=(0, 1, 2)):
    """The family's scores and layouts for some images in one prompt, the encoder's output, and the inputs."""
    inputs = tiny(family, "eager").prompt((numbers,))
    found = family_of(tiny(family, "eager").model, "hired")
    skipped = ("input_ids", "attention_mask", "mm_token_type_ids")
    given = {name: value for name, value in inputs.items() if name not in skipped}
    with found.tap(names, inputs) as tap:
        encoded = found.base.get_image_features(**given)
    features = found.features(encoded, inputs)
    return found.scores(tap, inputs, len(features)), found.layouts(features, inputs), encoded, inputs


def eager_weights(monkeypatch, family):
    """Attention after softmax of every call in the vision tower, in order."""
    model, seen = tiny(family, "eager").model, []
    tower = model.model.visual if "qwen" in family else model.model.vision_tower
    module = sys.modules[next(type(m).__module__ for m in tower.modules() if hasattr(m, "num_heads"))]
    original = module.eager_attention_forward

    def recording(*arguments, **keywords):
        out, weights = original(*arguments, **keywords)
        seen.append(weights)
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", recording)
    return seen


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_scores_of_cls(monkeypatch, family):
    seen = eager_weights(monkeypatch, family)
    scores, layouts, _, _ = read(family, ("first", "last", "logits"))
    first, last, top = (layer[:, :, 0].sum(1)[:, 1:].split([x.partitions for x in layouts]) for layer in seen[-3:])
    for image, score in enumerate(scores):
        torch.testing.assert_close(score.first, first[image], **TOLERANCE)
        torch.testing.assert_close(score.last, last[image], **TOLERANCE)
        assert score.logits.shape == top[image].shape


def test_the_layer_of_the_features(monkeypatch):
    seen = eager_weights(monkeypatch, "llava")
    inputs = tiny("llava", "eager").prompt()
    found = family_of(tiny("llava", "eager").model, "hired")
    for layer, index in ((-2, 1), (-1, 2), (3, 2), (1, 0), (0, 0), ([0, 2], 1)):
        seen.clear()
        with found.tap(("last",), {**inputs, "vision_feature_layer": layer}) as tap:
            found.base.vision_tower(inputs["pixel_values"])
        torch.testing.assert_close(found.scores(tap, inputs, 1)[0].last, seen[index][:, :, 0].sum(1)[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize(("layer", "names", "tokens"), [
    (-2, (), [37, 37, 1]), (-2, ("first", "last"), [37, 37, 1]), (-2, ("logits",), [37, 37, 37]),
    (-1, (), [37, 37, 37]), (1, (), [37, 1, 1]), (1, ("shallow",), [37, 37, 37]), ([1, 2], (), [37, 37, 1]),
])  # fmt: skip
def test_layers_that_nothing_reads_get_one_token(layer, names, tokens):
    """The features are those of the whole tower, bit for bit; another thread's call is left alone."""
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    tower, found = model.model.vision_tower, family_of(model, "hired")
    given = {"pixel_values": inputs["pixel_values"], "vision_feature_layer": layer}
    whole = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    seen = []
    with found.tap(names, {**inputs, **given}), ThreadPoolExecutor(1) as other:
        handles = [
            block.mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
            for block in tower.encoder.layers
        ]
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        assert seen == tokens
        elsewhere = other.submit(torch.no_grad()(tower), inputs["pixel_values"], output_hidden_states=True).result()
    for handle in handles:
        handle.remove()
    for read in [layer] if isinstance(layer, int) else layer:
        assert torch.equal(states[read], whole[read])
    assert all(torch.equal(*pair) for pair in zip(elsewhere.hidden_states, whole))


def test_scores_without_cls(monkeypatch):
    seen = eager_weights(monkeypatch, "llava_onevision")
    scores, layouts, _, _ = read("llava_onevision", ("first", "last", "logits"), numbers=(0,))
    assert layouts[0].partitions == 5
    torch.testing.assert_close(scores[0].first, seen[-3].mean((1, 2)), **TOLERANCE)
    torch.testing.assert_close(scores[0].last, seen[-1].mean((1, 2)), **TOLERANCE)
    assert scores[0].logits.shape == (5, 36)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_scores_of_qwen(monkeypatch, family):
    seen = eager_weights(monkeypatch, family)
    tower, merged = tiny(family, "eager").model.model.visual, []
    hook = tower.merger.register_forward_hook(lambda module, arguments, output: merged.append(output))
    scores, layouts, encoded, inputs = read(family, ("last",))
    hook.remove()
    tokens = [len(layout) for layout in layouts]
    full = [weights for weights in seen if weights.shape[-1] in inputs["image_grid_thw"].prod(-1).tolist()]
    of_layer = full[:3] if family == "qwen2_5_vl" else full[-3:]
    received = torch.cat([weights[0].mean((0, 1)) for weights in of_layer]).view(-1, 4).sum(1)
    order = torch.cdist(torch.cat(encoded.pooler_output), merged[0]).argmin(1)
    assert len(order.unique()) == len(order)
    for score, expected in zip(scores, received[order].split(tokens)):
        torch.testing.assert_close(score.last[0], expected, **TOLERANCE)
        torch.testing.assert_close(score.last.sum(), torch.tensor(1.0))


def test_layout_of_llava_next():
    made = tiny("llava_next")
    _, info = prune_inputs(made.model, made.prompt(((0, 1, 2, 3),)), "divprune", keep=0.5)
    for number, layout in enumerate(info.layouts):
        height, width = made.size(number)
        grid = {0: (2, 2), 1: (1, 2), 2: (2, 2), 3: (1, 3)}[number]
        assert layout.grid == grid
        assert torch.equal(layout.ids, Layout.anyres(6, grid, (height, width)).ids)


def test_a_image_of_one_partition_ends_in_a_newline():
    made = tiny("llava_onevision")
    _, info = prune_inputs(made.model, made.prompt(((0, 1),)), "hired", keep=0.5)
    for layout in info.layouts:
        assert layout.grid is None and layout.newlines.tolist() == [36] and layout.size == (6, 6)


@pytest.mark.parametrize("method", ["divprune", "random", "uniform"])
def test_a_shrunk_canvas(method):
    made = tiny_models.LlavaOnevision(aspect="anyres_max_1")
    inputs = made.prompt(((0,),))
    _, info = prune_inputs(made.model, inputs, method, keep=0.4)
    layout = info.layouts[0]
    assert len(layout) == 36 + 6 * 7 and len(layout.newlines) == 6 and layout.grid is None
    assert info.tokens_after == [round(0.4 * len(layout))]
    with pytest.raises(StudioError, match="shrank"):
        prune_inputs(made.model, inputs, "hired", keep=0.4)


@pytest.mark.parametrize(("family", "sizes"), [("internvl", [9, 27, 45]), ("smolvlm", [45])])
def test_thumbnails_that_come_last(family, sizes):
    made = tiny(family)
    inputs = made.prompt(((0, 1, 2),) if family == "internvl" else ((0,),))
    _, info = prune_inputs(made.model, inputs, "uniform", keep=0.5)
    assert [len(layout) for layout in info.layouts] == sizes
    assert (info.layouts[-1].partition[-9:] == 0).all() and info.layouts[-1].size == (3, 3)


def test_siglip_in_llava():
    vision = SiglipVisionConfig(**tiny_models.CLIP, vision_use_head=False)
    made = tiny_models.Llava15(vision=vision)
    made.model.config.vision_feature_select_strategy = "full"
    _, info = prune_inputs(made.model, made.prompt(), "hired", keep=0.25)
    assert info.tokens_after == [9]


def test_a_tower_that_scores_are_not_read_from():
    made = tiny_models.Llava15()
    made.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(StudioError, match="CLS token"):
        prune_inputs(made.model, made.prompt(), "hired")
    made.model.model.vision_tower.config.model_type = "pixtral"
    with pytest.raises(StudioError, match="pixtral"):
        prune_inputs(made.model, made.prompt(), "globalcom2")


@pytest.mark.parametrize("method", ["hired", "globalcom2"])
@pytest.mark.parametrize(("family", "reason"), [("internvl", "worse than chance"), ("smolvlm", "grid of its crops")])
def test_refused_pairs_give_the_reason(family, reason, method):
    model = tiny(family).model
    with pytest.raises(StudioError, match=reason), prune(model, method):
        pass
    assert "forward" not in model.__dict__


def test_refused_models():
    text = LlamaForCausalLM(LlamaConfig(**tiny_models.TEXT))
    for model in (text, object()):
        with pytest.raises(StudioError, match="reads no images"), prune(model, "divprune"):
            pass
    other = tiny_models.Llava15().model
    other.config.model_type = "new_vl"
    with pytest.raises(StudioError, match="new_vl models cannot be pruned yet: use one of aria, .*llava_next"):
        prune_inputs(other, {}, "divprune")


def on_no_memory(name, **config):
    with torch.device("meta"):
        made = getattr(transformers, f"{name}Config")(**config)
        kinds = (f"{name}ForConditionalGeneration", f"{name}ForCausalLM")
        return next(getattr(transformers, kind) for kind in kinds if hasattr(transformers, kind))(made)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("Mllama", {}, "cross-attention"),
        ("Phi4Multimodal", None, "features of images in place of pixels"),
        ("Qwen3_5", {}, "linear attention layers carry a state"),
        ("Lfm2Vl", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "conv layers carry a state"),
        ("MiniCPMV4_6", {"model_type": "qwen3_5_text"}, "linear attention layers carry a state"),
    ],
)
def test_families_that_cannot_say_why(name, text, reason):
    layers = len((text or {}).get("layer_types", "1234"))
    config = {} if text is None else {"text_config": {"num_hidden_layers": layers, **text}}
    with pytest.raises(StudioError, match=reason):
        prune_inputs(on_no_memory(name, **config), {}, "divprune")


@pytest.mark.parametrize("family", ["mistral3", "gemma4", "minicpmv4_6"])
def test_grids_in_the_proportions_of_the_image(family):
    made = tiny(family)
    _, info = prune_inputs(made.model, made.prompt(((0, 1, 2),)), "uniform", keep=0.5)
    units = {"mistral3": 8, "gemma4": 2, "minicpmv4_6": 4}[family]
    sizes = [made.size(number) if family == "mistral3" else made.grid(number) for number in range(3)]
    assert [layout.size for layout in info.layouts] == [(height // units, width // units) for height, width in sizes]


def test_every_family_is_a_model_of_transformers():
    for name in FAMILIES:
        assert name in transformers.CONFIG_MAPPING


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="other"), "divprune, hired"),
        (dict(keep=0.0), "fraction"),
        (dict(keep=1.5), "fraction"),
        (dict(keep=0), "at least 1"),
        (dict(keep="half"), "number of tokens"),
        (dict(positions="gaps"), "original, compact"),
        (dict(newline="all"), "newline is one of"),
        (dict(method="hired", newline="compete"), "compete"),
        (dict(method="random", reference=True), "no authors"),
        (dict(alpha=0.5), "divprune takes centred, not alpha"),
        (dict(method="uniform", alpha=0.5), "has no settings"),
        (dict(method="hired", tau=3), "takes alpha, cells"),
        (dict(method="hired", reference=True, keep=7), "fraction"),
    ],
)
def test_refused_settings(settings, message):
    made = tiny("llava")
    with pytest.raises(StudioError, match=message):
        prune_inputs(made.model, made.prompt(), **{"method": "divprune", **settings})
    if "keep" not in settings or "reference" not in settings:
        with pytest.raises(StudioError, match=message), prune(made.model, **{"method": "divprune", **settings}):
            pass


def test_refused_inputs():
    made = tiny("llava")
    model, inputs = made.model, made.prompt()
    cache = model(**inputs, use_cache=True).past_key_values
    for more, message in (
        (dict(input_ids=None), "input_ids"),
        (dict(pixel_values_videos=torch.zeros(1)), "videos"),
        (dict(past_key_values=cache), "first prompt"),
        (dict(input_ids=inputs["input_ids"][:, 8:], attention_mask=None), "image tokens"),
        (dict(attention_mask=inputs["attention_mask"][:, 1:]), "attention_mask"),
    ):
        with pytest.raises(StudioError, match=message):
            prune_inputs(model, {**inputs, **more}, "divprune")
    internvl = tiny("internvl")
    short = internvl.prompt()
    short = {**short, "input_ids": short["input_ids"][:, 8:], "attention_mask": None}
    with pytest.raises(StudioError, match="image tokens"):
        prune_inputs(internvl.model, short, "divprune")


def test_no_cache_and_gaps_do_not_go_together():
    made = tiny("llava")
    inputs = made.prompt()
    with prune(made.model, "divprune", keep=0.3):
        with pytest.raises(StudioError, match="compact"):
            made.model.generate(**inputs, max_new_tokens=2, use_cache=False)
        cached = made.model.generate(**inputs, max_new_tokens=2)
    with prune(made.model, "divprune", keep=0.3, positions="compact"):
        plain = made.model.generate(**inputs, max_new_tokens=2, use_cache=False)
        assert torch.equal(plain, made.model.generate(**inputs, max_new_tokens=2))
    assert cached.shape == plain.shape


def test_without_an_attention_mask():
    for family in ("llava", "qwen2_5_vl"):
        made = tiny(family)
        inputs = made.prompt()
        bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with prune(made.model, "divprune", keep=0.3):
            torch.testing.assert_close(made.model(**bare).logits, made.model(**inputs).logits)
        assert "attention_mask" in prune_inputs(made.model, bare, "divprune", keep=0.3)[0]
        assert "attention_mask" not in prune_inputs(made.model, bare, "divprune", keep=1.0)[0]
