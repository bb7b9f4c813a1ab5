"""The pipeline, text- and class-conditional, at tiny size."""

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline

from studio import Autoregressive, LlamaGenPipeline, StudioError


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipe(tiny_pipeline):
    tiny_pipeline.set_progress_bar_config(disable=True)
    return tiny_pipeline


@pytest.fixture
def class_pipe(tiny_class_pipeline):
    tiny_class_pipeline.set_progress_bar_config(disable=True)
    return tiny_class_pipeline


def test_images_tokens_and_stats(pipe):
    out = pipe("a red apple", num_images_per_prompt=2, generator=streams(0, 1))
    assert [image.size for image in out.images] == [(16, 16)] * 2
    assert out.tokens.shape == (2, 16)
    assert (out.stats.target_calls, out.stats.tokens, out.stats.mean_accepted_length) == (16, 32, 1.0)
    assert set(out.stats.seconds) == {"text", "prefill", "decode", "pixels", "total"}
    assert out.stats["tokens"] == 32


def test_output_types(pipe):
    calls = {
        kind: pipe("a red apple", generator=streams(0), output_type=kind) for kind in ("pil", "np", "pt", "tokens")
    }
    assert calls["np"].images.shape == (1, 16, 16, 3)
    assert calls["pt"].images.shape == (1, 3, 16, 16)
    assert torch.equal(calls["tokens"].images, calls["pil"].tokens)
    difference = numpy.asarray(calls["pil"].images[0]) / 255 - calls["np"].images[0]
    assert abs(difference).max() < 2 / 255
    images, tokens, stats = pipe("a red apple", generator=streams(0), return_dict=False)
    assert torch.equal(tokens, calls["pil"].tokens) and stats.tokens == 16 and len(images) == 1


@pytest.mark.parametrize("interval", [-1, 3])
def test_a_batch_equals_its_single_calls(pipe, interval):
    prompts = ["a red apple", "blue sky"]
    settings = {"guidance_scale": 3.0, "top_k": 40, "cfg_interval": interval, "output_type": "tokens"}
    together = pipe(prompts, num_images_per_prompt=2, generator=streams(1, 2, 3, 4), **settings).tokens
    alone = [pipe(prompts[row // 2], generator=streams(row + 1), **settings).tokens[0] for row in range(4)]
    assert torch.equal(together, torch.stack(alone))


def test_generators(pipe):
    def sample(generator, n):
        return pipe("a red apple", num_images_per_prompt=n, generator=generator, output_type="tokens").tokens

    one, four = sample(torch.Generator().manual_seed(3), 1), sample(torch.Generator().manual_seed(3), 4)
    assert torch.equal(one[0], four[0])
    assert len({tuple(row) for row in four.tolist()}) == 4
    torch.manual_seed(5)
    first = sample(None, 2)
    torch.manual_seed(5)
    assert torch.equal(sample(None, 2), first)
    with pytest.raises(StudioError, match="2 generators"):
        sample(streams(1), 2)
    with pytest.raises(StudioError, match="torch.Generator"):
        sample(7, 1)


def test_classes(class_pipe):
    out = class_pipe(class_labels=[1, 9], generator=streams(0, 1))
    assert len(out.images) == 2
    single = class_pipe(class_labels=9, generator=streams(1))
    assert torch.equal(single.tokens[0], out.tokens[1])


def test_callback_sees_changes_and_interrupts(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        seen.append(kwargs["tokens"].shape[1])
        pipeline._interrupt = step == 4
        return {"tokens": torch.full_like(kwargs["tokens"], 7)}

    out = pipe("a red apple", generator=streams(0), callback_on_step_end=callback)
    assert seen == [1, 2, 3, 4, 5]
    assert out.tokens.tolist() == [[7] * 5]
    assert out.stats.target_calls == 5 and pipe.interrupt
    assert out.images[0].size == (16, 16)
    assert pipe("a red apple").tokens.shape == (1, 16)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_save_and_load(kind, pipe, class_pipe, tmp_path):
    original, call = (pipe, {"prompt": "a red apple"}) if kind == "text" else (class_pipe, {"class_labels": 3})
    original.save_pretrained(tmp_path)
    loaded = LlamaGenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.text_encoder is None) == (kind == "class")
    assert torch.equal(loaded(**call, generator=streams(2)).tokens, original(**call, generator=streams(2)).tokens)
    assert dict(loaded.config)["default_guidance_scale"] == original.config.default_guidance_scale


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": ["apple", ""]}, "empty"),
        ({"prompt": "a" * 2001}, "2000"),
        ({"class_labels": 1}, "class_labels"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_interval": -2}, "cfg_interval"),
        ({"cfg_interval": 3, "guidance_scale": 1.0}, "is no guidance: give another one, or leave cfg_interval out"),
        ({"cfg_interval": 3, "guidance_scale": 0.0}, "is no guidance: give another one, or leave cfg_interval out"),
        ({"temperature": 0.0, "top_k": 5}, "likeliest token is taken: leave out top_k"),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5}, "leave out top_k and top_p"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"decoding": "fast"}, "Autoregressive"),
        ({"callback_on_step_end_tensor_inputs": ("latents",)}, "latents"),
    ],
    ids=str,
)
def test_errors(pipe, wrong, message):
    with pytest.raises(StudioError, match=message):
        pipe(**{"prompt": "a red apple", **wrong})


@pytest.mark.parametrize("wrong", [None, 10, -1, 1.0, True, [], [1, 10]], ids=str)
def test_class_errors(class_pipe, wrong):
    with pytest.raises(StudioError, match="class_labels"):
        class_pipe(class_labels=wrong)


def test_a_prompt_for_a_class_model_is_refused(class_pipe):
    with pytest.raises(StudioError, match="is class-conditional"):
        class_pipe("a red apple", class_labels=1)


def test_decoding_settings(pipe):
    plain = pipe("a red apple", generator=streams(0), decoding=Autoregressive(weights="plain"))
    assert torch.equal(plain.tokens, pipe("a red apple", generator=streams(0)).tokens)


def test_where_offloaded_parts_run(pipe):
    """As in diffusers: on the device of an offloading hook, which may be on any module of a component."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    assert pipe._execution_device == torch.device("cpu") == DiffusionPipeline._execution_device.fget(pipe)
    for module in (pipe.image_tokenizer, pipe.image_tokenizer.decoder):
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    try:
        assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe) == torch.device("meta")
    finally:
        remove_hook_from_module(pipe.image_tokenizer, recurse=True)
