"""TokenBridge's pipeline with tiny real parts: calls, saving, what is refused; and the converter that makes one."""

import pytest
import torch

import studio
from studio import Autoregressive, DimensionWise, StudioError, TokenBridgePipeline
from studio.checkpoints.token_bridge import convert_token_bridge
from studio.tokenizers.kl import KLTokenizer
from tests.decoding.tiny_token_bridge import AUTOENCODER, tiny_bridge_tokenizer
from tests.decoding.tiny_token_bridge import tiny_token_bridge as tiny_network


def pipeline(**more):
    """Samples 6 px images: 3x3 cells of four numbers, five levels each."""
    pipe = TokenBridgePipeline(tiny_bridge_tokenizer(), tiny_network(**more), default_num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_classes_become_images():
    pipe = pipeline()
    out = pipe(class_labels=[0, 2], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), guidance_scale=2.0)
    assert [image.size for image in out.images] == [(6, 6)] * 4
    assert out.tokens.shape == (4, 9, 4) and out.tokens.min() >= 0 and out.tokens.max() < 5
    assert out.stats.target_calls == 4 and out.stats.tokens == 4 * 36 and out.stats.mean_accepted_length == 9 / 4
    scale, sampling, settings = pipe.check_call(class_labels=2, guidance_scale=0)
    assert (scale, sampling.temperature, settings.steps) == (1.0, 1.0, 4)
    single = pipe(class_labels=2, generator=seeded(2), guidance_scale=2.0, output_type="tokens").tokens[0]
    assert torch.equal(single, out.tokens[2])
    array = pipe(class_labels=1, output_type="np", decoding=DimensionWise(steps=2))
    assert array.images.shape == (1, 6, 6, 3) and array.stats.target_calls == 2


def test_saved_and_loaded(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    loaded = studio.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, TokenBridgePipeline) and loaded.config.default_num_inference_steps == 4
    sampled = [each(class_labels=1, generator=seeded(5), output_type="tokens").tokens for each in (pipe, loaded)]
    assert torch.equal(*sampled)


def test_a_callback_sees_steps_and_stops():
    pipe, seen = pipeline(), []

    def stop(pipe, index, number, given):
        seen.append(int((given["tokens"] >= 0).all(dim=2).sum()))
        pipe._interrupt = index == 1

    out = pipe(class_labels=0, callback_on_step_end=stop)
    assert len(seen) == 2 and 0 < seen[0] < seen[1] < 9
    assert out.stats.tokens == 4 * seen[1] and int((out.tokens < 0).sum()) == 36 - 4 * seen[1]
    assert out.images[0].size == (6, 6)


def test_words_become_images(tiny_pipeline):
    pipe = pipeline(num_classes=None, caption_dim=16, caption_length=8)
    pipe.register_modules(text_encoder=tiny_pipeline.text_encoder, tokenizer=tiny_pipeline.tokenizer)
    sampled = pipe("a red apple", num_images_per_prompt=2, generator=seeded(0, 1), guidance_scale=5.0)
    assert sampled.tokens.shape == (2, 9, 4) and sampled.images[1].size == (6, 6)
    with torch.no_grad():
        one, other = (
            pipe.transformer.embed_condition(**pipe.condition(words, None, 1))[0]
            for words in ("a red apple", "blue sky")
        )
    assert (one - other).abs().max() > 0.1
    with pytest.raises(StudioError, match="no class_labels"):
        pipe("a red apple", class_labels=1)


def test_refused():
    pipe = pipeline()
    for options, words in (
        ({"class_labels": 3}, "0 to 2"),
        ({"prompt": "a pear"}, "is class-conditional"),
        ({"class_labels": 0, "decoding": Autoregressive()}, "DimensionWise"),
        ({"class_labels": 0, "decoding": DimensionWise(steps=10)}, "9 tokens"),
        ({"class_labels": 0, "temperature": -1.0}, "temperature"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
    ):
        for call in (pipe, pipe.check_call):
            with pytest.raises(StudioError, match=words):
                call(**options)
    other = TokenBridgePipeline(pipe.image_tokenizer.with_levels(8), pipe.transformer)
    with pytest.raises(StudioError, match="levels 8, the transformer 5"):
        other(class_labels=0)


def test_the_authors_file_becomes_a_pipeline(tmp_path):
    model = tiny_network(encoder_heads=1, decoder_heads=1, dimension_order=None)
    state = {name.removeprefix("head."): weight for name, weight in model.state_dict().items()}
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.5, 2.5])
    state |= {"reconstruction_values": levels, "boundaries": torch.zeros(6), "channel_mask": torch.ones(4, 4)}
    torch.save({"model_ema": state, "model": {}}, tmp_path / "checkpoint-last.pth")
    KLTokenizer(AUTOENCODER, sample_size=6).network.save_pretrained(tmp_path / "kl")
    folder = convert_token_bridge(tmp_path / "checkpoint-last.pth", tmp_path / "out", tmp_path / "kl")
    pipe = studio.load(folder, device="cpu")
    torch.testing.assert_close(pipe.image_tokenizer.level_values, levels * 5 / 3)
    assert all(torch.equal(pipe.transformer.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert pipe.config.default_num_inference_steps == 9 and pipe.image_tokenizer.config.sample_size == 6
    other = tmp_path / "other"
    KLTokenizer({**AUTOENCODER, "latent_channels": 8}).network.save_pretrained(other)
    with pytest.raises(StudioError, match="do not belong together"):
        convert_token_bridge(tmp_path / "checkpoint-last.pth", tmp_path / "more", other)
    torch.save({"model_ema": {"some.weight": levels}}, tmp_path / "other.pth")
    with pytest.raises(StudioError, match="not the checkpoint of a TokenBridge"):
        convert_token_bridge(tmp_path / "other.pth", tmp_path / "more", tmp_path / "kl")
    assert not (tmp_path / "more").exists()
