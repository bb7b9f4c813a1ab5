"""`studio.load` takes what is whole and refuses the rest in one sentence."""

import dataclasses
import json
import shutil

import pytest
import torch

import studio
from studio import StudioError
from studio.checkpoints import bundled
from studio.checkpoints.measured import fingerprint


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny pipeline that may be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def sample(pipe):
    return pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="tokens").tokens


def test_a_saved_pipeline_samples_the_same(tiny_pipeline, tiny_folder):
    assert torch.equal(sample(studio.load(tiny_folder, device="cpu")), sample(tiny_pipeline))


def test_a_saved_class_pipeline_loads(tiny_class_folder):
    pipe = studio.load(str(tiny_class_folder), device="cpu")
    assert pipe(class_labels=1, num_images_per_prompt=2).images[1].size == (16, 16)


def test_a_tokenizer_folder_gives_a_tokenizer(tiny_folder, tiny_vq):
    tokenizer = studio.load(tiny_folder / "image_tokenizer", device="cpu")
    assert isinstance(tokenizer, studio.VQTokenizer) and not tokenizer.training
    assert torch.equal(tokenizer.codebook, tiny_vq.codebook)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(tiny_folder, dtype):
    assert studio.load(tiny_folder, device="cpu", dtype=dtype).transformer.dtype == torch.bfloat16


def test_float32_is_the_default_on_a_cpu(tiny_folder):
    assert studio.load(tiny_folder, device="cpu").transformer.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"dtype": "int3"}, {"device": "quantum"}, {"device": "cuda:77"}])
def test_unknown_dtype_or_device_is_refused(tiny_folder, arguments):
    with pytest.raises(StudioError):
        studio.load(tiny_folder, **arguments)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(StudioError, match=r"did you mean emoji-ar\?.*emoji-vq, "):
        studio.load("emojiar")


def test_a_hub_id_without_a_network_is_one_sentence():
    with pytest.raises(StudioError, match="HF_HUB_OFFLINE"):
        studio.load("nobody/nothing")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(StudioError, match="not a checkpoint"):
        studio.load(tmp_path)


def test_another_architecture_is_refused(model):
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    with pytest.raises(StudioError, match="UNet2DModel"):
        studio.load(model)


def test_a_part_of_a_pipeline_is_named(tiny_folder):
    with pytest.raises(StudioError, match="LlamaGen.from_pretrained"):
        studio.load(tiny_folder / "transformer")


def test_another_pipeline_is_refused(model):
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(StudioError, match="StableDiffusionPipeline"):
        studio.load(model)


def test_a_configuration_that_is_no_json_is_refused(model):
    (model / "transformer" / "config.json").write_text("{")
    with pytest.raises(StudioError, match="config.json"):
        studio.load(model)


@pytest.mark.parametrize("part", ["transformer", "image_tokenizer", "text_encoder"])
def test_cut_weights_are_refused(model, part):
    [weights] = (model / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StudioError, match=part):
        studio.load(model)


@pytest.mark.parametrize("part", ["transformer", "image_tokenizer", "text_encoder"])
def test_lost_weights_are_refused(model, part):
    from safetensors.torch import load_file, save_file

    [weights] = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(StudioError, match=part):
        studio.load(model)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_no_pickle_is_loaded(model, part, monkeypatch):
    import torch
    from safetensors.torch import load_file

    [weights] = (model / part).glob("*.safetensors")
    name = {"transformer": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[part]
    torch.save(load_file(weights), model / part / name)
    weights.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    with pytest.raises(StudioError, match="cannot be read"):
        studio.load(model)


def test_weights_of_another_size_are_refused(model):
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    with pytest.raises(StudioError, match="transformer"):
        studio.load(model)


def test_a_tokenizer_with_other_codes_is_refused(model):
    tokenizer = studio.VQTokenizer(**{**dict(studio.load(model / "image_tokenizer").config), "codebook_size": 32})
    tokenizer.save_pretrained(model / "image_tokenizer")
    with pytest.raises(StudioError, match="fit together"):
        studio.load(model)


@pytest.fixture
def release(model, tmp_path, monkeypatch):
    """The copy of the tiny pipeline as if it were the bundled emoji-ar."""
    (tmp_path / "bundled").mkdir()
    folder = model.rename(tmp_path / "bundled" / "emoji-ar")
    monkeypatch.setattr(bundled, "ROOT", folder.parent)
    monkeypatch.setattr(bundled, "CHECKSUMS", folder.parent / "checksums.json")
    bundled.write_checksums()
    return folder


def test_a_bundled_model_loads_by_name(release):
    assert isinstance(studio.load("emoji-ar"), studio.LlamaGenPipeline)


@pytest.mark.parametrize("by", ["name", "folder"])
def test_one_changed_byte_of_a_bundled_model_is_noticed(release, by):
    weights = next((release / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StudioError, match="checksum"):
        studio.load("emoji-ar" if by == "name" else release)


def test_a_missing_file_of_a_bundled_model_is_noticed(release):
    (release / "model_index.json").unlink()
    with pytest.raises(StudioError, match="missing"):
        studio.load("emoji-ar")


def test_a_bundled_model_without_weights_says_how_to_get_them(release):
    with pytest.raises(StudioError, match="studio train --preset emoji-vq"):
        studio.load("emoji-vq")


def test_the_known_words_come_with_the_pipeline(release, tmp_path):
    (release / "concepts.json").write_text(json.dumps({"words": ["red", "apple"], "concepts": ["red apple"]}))
    bundled.write_checksums()
    pipe = studio.load("emoji-ar")
    assert pipe.vocabulary == (["red", "apple"], ["red apple"])
    pipe.save_pretrained(tmp_path / "saved")
    assert studio.load(tmp_path / "saved").vocabulary == pipe.vocabulary


def test_a_bundled_pipeline_without_a_text_encoder_has_that_of_a_model_it_shares(release, monkeypatch):
    release, other = release.rename(release.with_name("emoji-mar")), release.with_name("emoji-other")
    shutil.copytree(release, other, ignore=shutil.ignore_patterns("text_encoder", "tokenizer", "concepts.json"))
    (release / "concepts.json").write_text(json.dumps({"words": ["red"], "concepts": ["red apple"]}))
    monkeypatch.setitem(bundled.BUNDLED, "emoji-other", bundled.Bundled("pipeline", "", shares=("emoji-mar",)))
    bundled.write_checksums()
    ours, others = studio.load("emoji-mar", device="cpu"), studio.load("emoji-other", device="cpu")
    assert others.vocabulary == ours.vocabulary == (["red"], ["red apple"])
    assert torch.equal(others.encode_prompt("red")[0], ours.encode_prompt("red")[0])
    shutil.copytree(other, release.parent.parent / "copy")
    with pytest.raises(StudioError, match="text_encoder"):
        studio.load(release.parent.parent / "copy", device="cpu")


def test_a_bundled_token_bridge_without_weights_of_a_tokenizer_has_those_of_emoji_kl(
    release, monkeypatch, tiny_bridge_pipeline
):
    folder, expected = release.with_name("emoji-bridge"), tiny_bridge_pipeline.image_tokenizer
    tiny_bridge_pipeline.save_pretrained(folder)
    expected.continuous.save_pretrained(release.with_name("emoji-kl"))
    (folder / "image_tokenizer" / "diffusion_pytorch_model.safetensors").unlink()
    for name, kind in (("emoji-kl", "tokenizer"), ("emoji-bridge", "pipeline")):
        monkeypatch.setitem(bundled.BUNDLED, name, bundled.Bundled(kind, ""))
    bundled.write_checksums()
    pipe = studio.load("emoji-bridge", device="cpu")
    ours = pipe.image_tokenizer
    assert ours.level_values.equal(expected.level_values) and ours.config.levels == expected.config.levels
    assert ours.config.dimension_order == expected.config.dimension_order
    tokens = torch.randint(ours.config.levels, (1, 3, 3, ours.dimensions))
    torch.testing.assert_close(ours.decode(tokens), expected.decode(tokens))
    shutil.copytree(folder, release.parent.parent / "copy")
    with pytest.raises(StudioError, match="image_tokenizer"):
        studio.load(release.parent.parent / "copy", device="cpu")


def test_fingerprints_are_of_all_weights_that_sample(release, monkeypatch):
    alone = bundled.Bundled("pipeline", "")
    monkeypatch.setitem(bundled.BUNDLED, "emoji-ar", alone)
    of_one = fingerprint("emoji-ar")
    shutil.copytree(release / "image_tokenizer", release.with_name("emoji-vq"))
    bundled.write_checksums()
    monkeypatch.setitem(bundled.BUNDLED, "emoji-ar", dataclasses.replace(alone, shares=("emoji-vq",)))
    assert fingerprint("emoji-ar") != of_one == fingerprint(release)
