"""`studio.evaluation.evaluate`: what it measures for each kind of model, and what it refuses."""

import pytest
import torch

from studio import Autoregressive, StudioError
from studio.evaluation import evaluate
from studio.evaluation.generators import evaluate_generator


def test_the_bundled_tokenizer_restores_concepts_it_has_not_seen():
    quality = evaluate("emoji-vq")
    assert set(quality) == {"psnr", "ssim", "bits_per_pixel", "resolution", "samples"}
    assert quality["samples"] == 68 * 2 * 10
    assert quality["psnr"] >= 24


def test_the_bundled_pipeline_samples_style_and_background_of_the_captions():
    """100 held-out combinations (seed 0); chance is 1 in 2, 1 in 10, and for a concept below 1 in 1,000."""
    quality = evaluate("emoji-ar", samples=100)
    assert set(quality) == {
        "judge_top1", "judge_top5", "style_accuracy", "background_accuracy", "frechet", "truth_psnr", "truth_ssim",
        "sharpness", "resolution", "samples",
    }  # fmt: skip
    assert quality["samples"] == 100
    assert quality["background_accuracy"] >= 0.95 and quality["style_accuracy"] >= 0.65
    assert quality["judge_top5"] >= quality["judge_top1"] >= 0.8


@pytest.mark.parametrize("name", ["emoji-1d-ar", "emoji-bridge", "emoji-mar", "emoji-resgen"])
def test_other_bundled_pipelines_draw_what_captions_name(name):
    """70 held-out combinations (seed 0); floors against breakage, chance is as above."""
    quality = evaluate(name, samples=70)
    assert quality["judge_top1"] >= 0.75 and quality["background_accuracy"] >= 0.9 and quality["style_accuracy"] >= 0.55


def test_continuous_tokens_and_their_levels_restore_nearly_the_same():
    """TokenBridge's 64 levels lose less than 0.3 dB of what the continuous latents restore."""
    from studio.bench.tokenizers import bench_tokenizers
    from studio.evaluation.robustness import Perturbation

    measured = bench_tokenizers(["emoji-kl"], samples=65, grid=(Perturbation(0.5, 2),))
    rows = {row["variant"]: row["psnr"] for row in measured["rows"]}
    assert rows["continuous"] >= 29 and rows["8 levels"] < rows["continuous"] - 1
    assert rows["continuous"] - 0.3 < rows["64 levels"] < rows["continuous"]


def test_an_untrained_pipeline_samples_nothing_in_particular(tiny_pipeline):
    """The negative control: random weights must not be judged right."""
    tiny_pipeline.set_progress_bar_config(disable=True)
    quality = evaluate_generator(tiny_pipeline, samples=70)
    assert quality["judge_top1"] < 0.1 and quality["background_accuracy"] < 0.5


@pytest.mark.parametrize("folder", ["tiny_softmax_folder", "tiny_rq_folder"])
def test_stacks_of_codes_are_judged(folder, request):
    quality = evaluate(request.getfixturevalue(folder), samples=70, device="cpu")
    assert quality["samples"] == 70 and quality["resolution"] == 16 and quality["judge_top1"] < 0.1


def test_too_few_samples_are_refused_before_anything_is_sampled(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(type(tiny_pipeline), "__call__", lambda *_, **__: pytest.fail("it drew"))
    with pytest.raises(StudioError, match="more than 64"):
        evaluate_generator(tiny_pipeline, samples=64)


def test_rows_of_tokens_are_judged_at_several_lengths(tiny_row_pipeline):
    """Shorter images are those that a call for as many tokens samples, and their judgement too."""
    tiny_row_pipeline.set_progress_bar_config(disable=True)
    quality = evaluate_generator(tiny_row_pipeline, samples=70)
    shorter = {f"{name}_{length}" for name in ("judge_top1", "frechet") for length in (1, 3)}
    assert set(quality) == {
        "judge_top1", "judge_top5", "style_accuracy", "background_accuracy", "frechet", "truth_psnr", "truth_ssim",
        "sharpness", "resolution", "samples",
    } | shorter  # fmt: skip

    class Shortened:
        device, image_tokenizer = tiny_row_pipeline.device, None

        def __call__(self, prompts, **call):
            return tiny_row_pipeline(prompts, num_tokens=3, **call)

    alone = evaluate_generator(Shortened(), samples=70)
    assert alone["frechet"] == pytest.approx(quality["frechet_3"], rel=1e-4) and not shorter & set(alone)
    assert abs(quality["frechet"] / quality["frechet_3"] - 1) > 1e-3


def test_the_result_does_not_depend_on_the_batch_size(tiny_pipeline):
    tiny_pipeline.set_progress_bar_config(disable=True)
    whole, parts = (evaluate_generator(tiny_pipeline, samples=70, batch_size=size) for size in (70, 32))
    assert whole["frechet"] == pytest.approx(parts["frechet"], rel=1e-3)
    assert {k: v for k, v in whole.items() if k != "frechet"} == {k: v for k, v in parts.items() if k != "frechet"}


def test_a_row_of_tokens_is_measured_at_several_lengths(tiny_one_d, tmp_path):
    """Each length is what a tokenizer would measure that knows no more tokens."""
    from studio.evaluation.tokenizers import evaluate_tokenizer

    tiny_one_d.save_pretrained(tmp_path)
    quality = evaluate(tmp_path, device="cpu")
    assert set(quality) == {
        "psnr", "ssim", "bits_per_pixel", "resolution", "samples", "psnr_1", "ssim_1", "psnr_3", "ssim_3",
    }  # fmt: skip
    assert quality["bits_per_pixel"] == 6 * 5 / 16**2

    class Shortened(torch.nn.Module):
        config, bits_per_token = tiny_one_d.config, 5

        def __init__(self):
            super().__init__()
            self.inner = tiny_one_d

        def encode(self, images):
            return self.inner.encode(images)[:, :3]

        def decode(self, tokens):
            return self.inner.decode(tokens)

    alone = evaluate_tokenizer(Shortened())
    assert alone["psnr"] == pytest.approx(quality["psnr_3"], abs=1e-4)
    assert alone["ssim"] == pytest.approx(quality["ssim_3"], abs=1e-5)
    assert quality["psnr_3"] != quality["psnr"] and "psnr_3" not in alone


@pytest.mark.parametrize("option", [{"samples": 5}, {"seed": 1}, {"tiles": (1, 1)}])
def test_options_that_change_nothing_are_refused(option):
    with pytest.raises(StudioError, match="leave out"):
        evaluate("emoji-vq", **option)


@pytest.mark.parametrize("data", [None, "emoji"])
def test_features_are_for_folders(data):
    with pytest.raises(StudioError, match="compared in the judge's features: leave out --features"):
        evaluate("emoji-vq", data=data, features="owner/name")


def test_a_judge_and_a_pipeline_read_no_scenes(tiny_folder):
    for model in ("emoji-judge", tiny_folder):
        with pytest.raises(StudioError, match="leave out --tiles"):
            evaluate(model, tiles=(1, 1))


@pytest.mark.parametrize("model", ["emoji-vq", "emoji-judge"])
def test_a_decoding_of_what_does_not_draw_is_refused(model):
    with pytest.raises(StudioError, match="decoding"):
        evaluate(model, decoding=Autoregressive())


def test_class_pipelines_are_refused(tiny_class_folder):
    with pytest.raises(StudioError, match="is conditioned on classes: give --data"):
        evaluate(tiny_class_folder)
