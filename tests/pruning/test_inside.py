"""Pruning behind a layer of the language model: what later layers see is what they see of a prompt whose dropped tokens
are masked from there on."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from studio.errors import StudioError
from studio.pruning.adapters import family_of
from studio.pruning.api import prune, prune_inputs
from studio.pruning.columns import ShortLayer
from studio.pruning.kv_cache import compress
from studio.pruning.shortening import Settings, shorten
from tests.pruning.tiny_families import FAMILIES, ROWS, answer, layers, tiny
from tests.pruning.tiny_models import TEXT, LlavaNext

WINDOWED = ("aya_vision", "cohere2_vision", "gemma3", "gemma4")
DEEP = ("qwen3_vl", "qwen3_vl_moe")
GATED = ("minicpmv4_6",)
FIRST = ("llava", "llava_onevision", "qwen2_5_vl", "internvl", "paligemma")
OTHERS = [name for name in FAMILIES if name not in (*WINDOWED, *DEEP, *GATED, *FIRST)]
families = pytest.mark.parametrize("family", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])


def masked_from(model, number, dropped):
    """Hooks on an eager model that hide dropped (B, L) columns from layer `number` on."""

    def hook(layer, arguments, keywords):
        mask = keywords["attention_mask"].clone()
        mask.masked_fill_(dropped[:, None, None, : mask.shape[-1]], torch.finfo(mask.dtype).min)
        return arguments, {**keywords, "attention_mask": mask}

    return [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers(model)[number:]]


def dropped_columns(model, inputs, info, new):
    image = inputs["input_ids"] == model.config.image_token_id
    dropped = torch.zeros(len(image), image.shape[1] + new, dtype=torch.bool)
    for row, (places, kept) in enumerate(zip(image, info.kept)):
        columns = places.nonzero().flatten()
        gone = torch.ones(len(columns), dtype=torch.bool)
        gone[kept] = False
        dropped[row, columns[gone]] = True
    return dropped


@families
@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_later_layers_see_what_is_not_masked(family, method):
    model, inputs, new = tiny(family, "eager").model, tiny(family).prompt(ROWS), 5
    length = inputs["input_ids"].shape[1]
    with prune(model, method, keep=0.2, after_layer=1) as record:
        short = answer(model, inputs, tokens=new)
    info = record.info
    assert info.tokens_after == [max(1, round(0.2 * tokens)) for tokens in info.tokens_before]
    hooks = masked_from(model, 1, dropped_columns(model, inputs, info, new))
    try:
        masked = answer(model, inputs, tokens=new)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(short.sequences, masked.sequences)
    for ours, theirs in zip(short.logits, masked.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    whole, cut = short.past_key_values.layers
    assert whole.keys.shape[2] == length + new - 1 and cut.get_seq_length() == length + new - 1
    real = inputs["attention_mask"].sum(1) - torch.tensor(info.tokens_before) + torch.tensor(info.tokens_after)
    assert cut.keys.shape[2] == int(real.max()) + new - 1
    assert cut.keys.untyped_storage().nbytes() == cut.keys.nbytes < whole.keys.nbytes


@families
def test_backends_agree_and_keeping_all_changes_nothing(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    plain = answer(model, inputs)
    with prune(model, "fastv", keep=1.0, after_layer=1):
        same = answer(model, inputs)
    assert torch.equal(plain.sequences, same.sequences) and all(map(torch.equal, plain.logits, same.logits))
    with prune(model, "fastv", keep=0.3, after_layer=1) as record:
        short, kept = answer(model, inputs), record.info.kept
    with prune(tiny(family, "eager").model, "fastv", keep=0.3, after_layer=1) as record:
        eager = answer(tiny(family, "eager").model, inputs)
    assert all(map(torch.equal, kept, record.info.kept))
    for ours, theirs in zip(short.logits, eager.logits):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def answered_twice_cut(made, inputs, info, new):
    """VScan by hand: a prompt of the tokens that the first cut merges, whose cut tokens are hidden in layer 1."""
    settings = Settings("vscan", 0.2**0.5, "original", "row", False, torch.Generator(), {})
    pruned, first = shorten(family_of(made.model, "vscan"), inputs, settings)
    before, left = [first.tokens_before[:1], first.tokens_before[1:]], []
    for row, images in enumerate(([0], [1, 2])):
        offsets = [sum(before[row][:number]) for number in range(len(images))]
        places = torch.cat([first.kept[image] + offset for image, offset in zip(images, offsets)])
        assert torch.isin(info.kept[row], places).all()
        left.append(torch.isin(places, info.kept[row]).nonzero().flatten())
    hooks = masked_from(made.model, 1, dropped_columns(made.model, pruned, replace(info, kept=left), new))
    try:
        return answer(made.model, pruned, tokens=new)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_vscan_cuts_twice(family):
    made, new = tiny(family, "eager"), 4
    inputs = made.prompt(((0,), (1, 2)))
    with prune(made.model, "vscan", keep=0.2) as record:
        short = answer(made.model, inputs, tokens=new)
    info = record.info
    assert info.tokens_after == [round(0.2 * tokens) for tokens in info.tokens_before] and info.seconds["encode"] > 0
    whole = (inputs["input_ids"] == made.model.config.image_token_id).sum(1).tolist()
    assert info.tokens_before == whole
    masked = answered_twice_cut(made, inputs, info, new)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(short.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(short.sequences[:, length:], masked.sequences[:, -new:])
    for ours, theirs in zip(short.logits, masked.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    first, second = (layer.keys.shape[2] for layer in short.past_key_values.layers)
    assert second < first < length
    with prune(made.model, "vscan", keep=0.2) as record:
        logits = made.model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits, short.logits[0])
    with pytest.raises(StudioError, match="needs a fraction"), prune(made.model, "vscan", keep=5):
        pass
    with pytest.raises(StudioError, match="use a block"):
        prune_inputs(made.model, inputs, "vscan")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["fastv", "vscan"])
def test_a_batch_equals_its_rows(method, beams):
    rows, options = ((0,), (1, 2), (2,)), dict(num_beams=beams, num_return_sequences=beams)
    made = tiny("llava_next")
    whole = made.prompt(rows)
    with prune(made.model, method, keep=0.2, after_layer=1):
        batch = answer(made.model, whole, **options).sequences[:, whole["input_ids"].shape[1] :]
        for row, together in enumerate(batch.view(len(rows), beams, -1)):
            real, alone = whole["attention_mask"][row].bool(), made.prompt((rows[row],))
            alone |= {name: whole[name][row, real][None] for name in ("input_ids", "attention_mask")}
            out = answer(made.model, alone, **options).sequences[:, int(real.sum()) :]
            assert torch.equal(out, together)


def test_scores_are_the_last_row_of_attention():
    made = tiny("llava", "eager")
    inputs = made.prompt()
    weights = made.model(**inputs, output_attentions=True).attentions[0][0, :, -1].mean(0)
    image = (inputs["input_ids"][0] == made.model.config.image_token_id).nonzero().flatten()
    with prune(made.model, "fastv", keep=9, after_layer=1) as record:
        made.model(**inputs)
    assert torch.equal(record.info.kept[0], weights[image].topk(9).indices.sort().values)


def deep(attention="sdpa"):
    """LLaVA-NeXT with five layers."""
    from tests.pruning import tiny_models

    return LlavaNext(attention, text={**tiny_models.TEXT, "num_hidden_layers": 5})


def test_a_pyramid_has_shorter_and_shorter_caches():
    made = deep("eager")
    inputs = made.prompt()
    length, tokens = inputs["input_ids"].shape[1], int((inputs["input_ids"] == 99).sum())
    attention = made.model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    image = (inputs["input_ids"][0] == 99).nonzero().flatten()
    with prune(made.model, "pyramiddrop", keep=0.125) as record:
        out = answer(made.model, inputs, tokens=3)
        held = [layer.keys.shape[2] - 2 - (length - tokens) for layer in out.past_key_values.layers]
    assert held == [tokens, round(tokens * 0.5), round(tokens * 0.25), round(tokens * 0.125), round(tokens * 0.125)]
    assert record.info.tokens_after == [held[-1]]
    with prune(made.model, "pyramiddrop", keep=0.5, after_layer=1) as record:
        made.model(**inputs)
    expected = attention[image].topk(round(tokens * 0.5)).indices.sort().values
    assert torch.equal(record.info.kept[0], expected), "the row of the layer behind the cut"


def test_the_conversation_goes_on_inside_the_block():
    made = deep()
    inputs, question = made.prompt(((0,), (1,))), torch.tensor([[5, 6, 7], [8, 9, 4]])
    with prune(made.model, "fastv", keep=0.2, after_layer=2) as record:
        first = answer(made.model, inputs)
        ids = torch.cat((first.sequences, question), dim=1)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)), dim=1)
        at_once = made.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False
        )
        again = answer(made.model, inputs)
        step = torch.cat((first.sequences[:, -1:], question), dim=1)
        for place in range(4):
            seen = mask[:, : inputs["input_ids"].shape[1] + 4 + place]
            logits = made.model(
                input_ids=step[:, place : place + 1],
                attention_mask=seen,
                position_ids=(seen.sum(1) - 1)[:, None],
                past_key_values=again.past_key_values,
            ).logits
    assert record.info.tokens_after[0] < record.info.tokens_before[0]
    assert all(isinstance(layer, ShortLayer) for layer in first.past_key_values.layers[2:])
    assert torch.equal(at_once[:, ids.shape[1]], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("family", [*WINDOWED, *DEEP, *GATED])
def test_families_that_cannot_be_cut_inside(family):
    reason = "window" if family in WINDOWED else "first 2 layers" if family in DEEP else "queries of minicpmv4_6"
    with pytest.raises(StudioError, match=reason):
        with prune(tiny(family).model, "fastv", after_layer=1):
            pass
    assert "forward" not in tiny(family).model.__dict__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="fastv", after_layer=0), "from 1 to 1"),
        (dict(method="fastv", after_layer=2), "from 1 to 1"),
        (dict(method="fastv", after_layer=(1, 1)), "ascending"),
        (dict(method="fastv", after_layer=1.5), "from 1 to 1"),
        (dict(method="fastv", after_layer=True), "from 1 to 1"),
        (dict(method="fastv", after_layer="1"), "from 1 to 1"),
        (dict(method="hired", after_layer=1), "vision tower"),
        (dict(method="other", after_layer=1), "fastv, pyramiddrop"),
        (dict(method="fastv", after_layer=1, keep=2.0), "fraction"),
        (dict(method="fastv", after_layer=1, positions="compact"), "no positions"),
        (dict(method="divprune", after_layer=1, tau=3), "no tau"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(StudioError, match=message), prune(tiny("llava").model, **settings):
        pass


@pytest.mark.parametrize("layer", [np.int64(1), [1], (np.int32(1),)], ids=repr)
def test_numpy_numbers_and_lists_are_layers(layer):
    made = tiny("llava")
    with prune(made.model, "fastv", keep=0.3, after_layer=layer):
        found = made.model.generate(**made.prompt(), max_new_tokens=2)
    with prune(made.model, "fastv", keep=0.3, after_layer=1):
        assert found.tolist() == made.model.generate(**made.prompt(), max_new_tokens=2).tolist()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(use_cache=False), "needs a cache"),
        (dict(cache_implementation="static"), "cache_implementation"),
        (dict(prefill_chunk_size=8), "prefill_chunk_size"),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
        (dict(assistant_early_exit=1), "assistant_early_exit"),
        (dict(assistant_model=LlamaForCausalLM(LlamaConfig(**TEXT))), "assistant_model"),
        (dict(generation_config=GenerationConfig(prompt_lookup_num_tokens=3)), "prompt_lookup_num_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", ["fastv", "vscan", "snapkv"])
def test_refused_calls(method, more, message):
    made = tiny("llava")
    block = compress(made.model, method) if method == "snapkv" else prune(made.model, method, keep=0.3, after_layer=1)
    with block, pytest.raises(StudioError, match=message):
        made.model.generate(**made.prompt(), max_new_tokens=2, **more)
    with pytest.raises(StudioError, match="studio.prune"):
        prune_inputs(made.model, made.prompt(), "fastv")


def test_drafts_in_the_configuration_of_the_model_are_refused(monkeypatch):
    made = tiny("llava")
    monkeypatch.setattr(made.model.generation_config, "prompt_lookup_num_tokens", 3)
    with prune(made.model, "fastv", keep=0.3, after_layer=1), pytest.raises(StudioError, match="assisted generation"):
        made.model.generate(**made.prompt(), max_new_tokens=2)
    monkeypatch.setattr(made.model.generation_config, "prompt_lookup_num_tokens", None)
    monkeypatch.setattr(made.model.generation_config, "use_mtp", False)
    with prune(made.model, "fastv", keep=0.3, after_layer=1) as record:
        made.model.generate(**made.prompt(), max_new_tokens=2)
    assert record.info.tokens_after == [11]


def test_a_cut_layer_keeps_its_prompt():
    """Tokens behind it may go."""
    made = tiny("llava")
    inputs, token = made.prompt(), torch.tensor([[7]])
    length = inputs["input_ids"].shape[1]
    with prune(made.model, "fastv", keep=0.3, after_layer=1):
        cache = made.model(**inputs).past_key_values
        expected = made.model(input_ids=token, past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(made.model(input_ids=token, past_key_values=cache).logits, expected)
        with pytest.raises(StudioError, match="remove at most 1"):
            cache.layers[1].crop(-2)
        assert cache.layers[1].get_seq_length() == length + 1


@pytest.mark.parametrize("method", ["fastv", "snapkv"])
def test_what_leaves_no_cache_to_cut_is_refused(method, monkeypatch):
    made = LlavaNext()
    inputs = made.prompt()
    block = compress(made.model, method) if method == "snapkv" else prune(made.model, method, after_layer=1)
    with block as record:
        monkeypatch.setattr(made.model.config.get_text_config(), "use_cache", False)
        with pytest.raises(StudioError, match="needs a cache: leave out use_cache=False"):
            made.model(**inputs)
        monkeypatch.setattr(made.model.config.get_text_config(), "use_cache", True)
        made.model.train().gradient_checkpointing_enable()
        with torch.enable_grad(), pytest.raises(StudioError, match="and gradient checkpointing"):
            made.model(**inputs)
        assert record.info is None


@pytest.mark.parametrize("method", ["fastv", "vscan", "snapkv"])
def test_a_cache_that_cannot_grow_is_refused(method):
    """One that can is filled."""
    made = tiny("llava")
    inputs, text = made.prompt(), made.model.config.get_text_config()
    block = compress(made.model, method) if method == "snapkv" else prune(made.model, method, after_layer=1)
    with block:
        expected = answer(made.model, inputs)
        for cache in (DynamicCache(), DynamicCache(config=text)):
            found = answer(made.model, inputs, past_key_values=cache)
            assert torch.equal(found.sequences, expected.sequences)
            assert found.past_key_values is cache and isinstance(cache.layers[1], ShortLayer)
        with pytest.raises(StudioError, match="needs a cache that grows: leave out past_key_values"):
            answer(made.model, inputs, past_key_values=StaticCache(text, max_cache_len=200))


@pytest.mark.parametrize("method", ["fastv", "snapkv"])
def test_the_base_model_alone(method):
    """States are those of the whole model in the block, also when this one generates."""
    made = tiny("llava_next")
    inputs, base = made.prompt(), made.model.model

    def block(model):
        return compress(model, method, 0.3) if method == "snapkv" else prune(model, method, 0.3, after_layer=1)

    with block(made.model) as whole:
        expected, said = made.model(**inputs).logits, answer(made.model, inputs)
    with block(base) as record:
        assert torch.equal(made.model.lm_head(base(**inputs).last_hidden_state), expected)
        assert record.info.tokens_after == whole.info.tokens_after
        assert torch.equal(answer(made.model, inputs).sequences, said.sequences)
    assert not {"forward", "generate"} & {*base.__dict__, *made.model.__dict__}


def test_labels_are_refused():
    made = tiny("llava")
    with prune(made.model, "fastv", keep=0.3, after_layer=1), pytest.raises(StudioError, match="Labels"):
        made.model(**made.prompt(labels=True))


def test_threads_with_cuts_of_their_own():
    made = tiny("llava_next")
    prompts = {keep: made.prompt(((number,),)) for number, keep in enumerate((0.2, 0.5, 0.8))}

    def ask(keep):
        with torch.no_grad(), prune(made.model, "fastv", keep=keep, after_layer=1) as record:
            return answer(made.model, prompts[keep]).sequences, record.info.tokens_after

    alone = [ask(keep) for keep in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for (found, tokens), (expected, wanted) in zip(pool.map(ask, prompts), alone, strict=True):
                assert torch.equal(found, expected) and tokens == wanted
