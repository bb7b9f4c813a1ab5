"""RQ-Transformer's pipeline with tiny real parts: calls, saving, callbacks, what is refused."""

import pytest
import torch

import studio
from studio import Autoregressive, RQDecoding, RQTransformer, RQTransformerPipeline, StudioError
from studio.decoding.sampling import Sampling


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_batch_is_its_single_images(tiny_rq_pipeline):
    pipe, words = tiny_rq_pipeline, ["a red apple", "blue sky on a green background"]
    call = {"guidance_scale": 2.0, "top_p": 0.9}
    out = pipe(words, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **call)
    assert [image.size for image in out.images] == [(16, 16)] * 4 and out.prompts == [words[0]] * 2 + [words[1]] * 2
    assert out.tokens.shape == (4, 16, 3) and out.tokens.min() >= 0 and out.tokens.max() < 16
    assert (out.stats.target_calls, out.stats.tokens, out.stats.mean_accepted_length) == (16, 4 * 48, 3.0)
    assert out.stats.seconds.keys() == {"text", "prefill", "decode", "pixels", "total"}
    for row, text in enumerate((words[0], words[0], words[1], words[1])):
        single = pipe(text, generator=seeded(row), output_type="tokens", **call)
        assert torch.equal(single.images[0], out.tokens[row])


def test_classes_become_images(tiny_rq_class_pipeline):
    out = tiny_rq_class_pipeline(class_labels=[0, 4], generator=seeded(0, 0))
    assert out.tokens.shape == (2, 16, 3) and not torch.equal(*out.tokens) and out.prompts is None


@pytest.mark.parametrize("option", [{"temperature": 0.2}, {"top_k": 1}, {"top_p": 0.1}, {"guidance_scale": 9.0}])
def test_every_setting_counts(tiny_rq_pipeline, option):
    plain, other = (
        tiny_rq_pipeline("a red apple", generator=seeded(0), output_type="tokens", **options).tokens
        for options in ({}, option)
    )
    assert not torch.equal(plain, other)


def test_levels_may_be_sampled_differently(tiny_rq_pipeline):
    levels = (Sampling(temperature=0), Sampling(top_k=1), Sampling())
    sampled = [
        tiny_rq_pipeline("a red apple", generator=seeded(seed), decoding=RQDecoding(levels)).tokens for seed in (0, 1)
    ]
    assert torch.equal(sampled[0][0, 0, :2], sampled[1][0, 0, :2]) and not torch.equal(*sampled)


def test_forms_of_the_output(tiny_rq_class_pipeline):
    pipe, call = tiny_rq_class_pipeline, {"class_labels": [1, 3]}
    array, tensor = (pipe(generator=seeded(0, 1), output_type=kind, **call).images for kind in ("np", "pt"))
    assert array.shape == (2, 16, 16, 3) and tensor.shape == (2, 3, 16, 16)
    images, tokens, stats = pipe(generator=seeded(0, 1), return_dict=False, **call)
    assert len(images) == 2 and tokens.shape == (2, 16, 3) and stats.target_calls == 16
    first = pipe.decode_tokens(tokens, "pt", depth=1)
    assert first.shape == tensor.shape and not torch.equal(first, tensor)


@pytest.mark.parametrize("fixture", ["tiny_rq_class_pipeline", "tiny_rq_pipeline"])
def test_saved_and_loaded(fixture, request, tmp_path):
    pipe = request.getfixturevalue(fixture)
    pipe.save_pretrained(tmp_path / "model")
    loaded = studio.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, RQTransformerPipeline)
    what = {"prompt": "a red apple"} if pipe.takes_text else {"class_labels": 1}
    sampled = [each(**what, generator=seeded(5), output_type="tokens").tokens for each in (pipe, loaded)]
    assert torch.equal(*sampled)


def test_a_callback_sees_cells_changes_codes_and_stops(tiny_rq_class_pipeline):
    pipe, seen = tiny_rq_class_pipeline, []

    def stop(pipe, index, number, given):
        seen.append(int((given["tokens"] >= 0).sum()))
        pipe._interrupt = index == 2
        return {"tokens": torch.where(given["tokens"] >= 0, 7, -1)}

    out = pipe(class_labels=0, generator=seeded(0), callback_on_step_end=stop)
    assert seen == [3, 6, 9] and (out.stats.target_calls, out.stats.tokens) == (3, 9)
    assert (out.tokens[0, :3] == 7).all() and (out.tokens[0, 3:] == -1).all() and out.images[0].size == (16, 16)


def test_sampling_goes_on_from_a_changed_cell(tiny_rq_class_pipeline):
    def change(pipe, index, number, given):
        if index == 0:
            return {"tokens": torch.where(given["tokens"] >= 0, (given["tokens"] + 1) % 16, -1)}

    plain, changed = (
        tiny_rq_class_pipeline(
            class_labels=0, generator=seeded(0), top_k=1, callback_on_step_end=callback, output_type="tokens"
        ).tokens[0]
        for callback in (None, change)
    )
    assert torch.equal(changed[0], (plain[0] + 1) % 16) and not torch.equal(changed[1:], plain[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_labels": 5}, "0 to 4"),
        ({"prompt": "a pear"}, "is class-conditional"),
        ({"class_labels": 0, "guidance_scale": 2.0}, "no null class"),
        ({"class_labels": 0, "decoding": Autoregressive()}, "RQDecoding"),
        ({"class_labels": 0, "decoding": RQDecoding((Sampling(),))}, "3 levels; RQDecoding has 1"),
        ({"class_labels": 0, "decoding": RQDecoding((Sampling(),) * 3), "top_k": 4}, "leave out top_k"),
        ({"class_labels": 0, "temperature": -1.0}, "temperature"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
    ],
    ids=str,
)
def test_refused(tiny_rq_class_pipeline, options, words):
    for call in (tiny_rq_class_pipeline, tiny_rq_class_pipeline.check_call):
        with pytest.raises(StudioError, match=words):
            call(**options)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"depth": 2}, "levels 3, the transformer 2"),
        ({"code_dim": 5}, "length 4, the transformer 5"),
        ({"grid": (2, 8)}, r"cells \[4, 4\], the transformer \[2, 8\]"),
        ({"vocab_size": (16, 16, 9)}, r"level \[16, 16, 16\], the transformer \[16, 16, 9\]"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(tiny_rvq, tmp_path, other, words):
    sizes = {"dim": 8, "spatial_layers": 1, "depth_layers": 1, "spatial_heads": 1, "depth_heads": 1, "num_classes": 2}
    model = RQTransformer(**{"grid": (4, 4), "depth": 3, "vocab_size": 16, "code_dim": 4, **sizes, **other})
    pipe = RQTransformerPipeline(tiny_rvq, model)
    with pytest.raises(StudioError, match=words):
        pipe(class_labels=0)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(StudioError, match=f"does not fit together: .*{words}"):
        studio.load(tmp_path, device="cpu")


def test_a_network_with_words_of_its_own_has_no_pipeline(tiny_rvq):
    sizes = {"dim": 8, "spatial_layers": 1, "depth_layers": 1, "spatial_heads": 1, "depth_heads": 1}
    with pytest.raises(StudioError, match="word embeddings of its own"):
        RQTransformerPipeline(tiny_rvq, RQTransformer(caption_words=9, caption_length=4, **sizes))
