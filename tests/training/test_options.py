"""Options: a preset, a TOML file and flags, later ones winning; what cannot be used is refused by name."""

import re

import numpy as np
import pytest

from studio.errors import StudioError
from studio.training import KINDS, Finder
from studio.training.options import Options, checked_setting, merge, preset_names, read_preset, read_toml


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "options.toml").write_text(text, encoding="utf-8")
        return tmp_path / "options.toml"

    return write


def test_later_sources_win_and_what_is_none_says_nothing(toml):
    file = read_toml(toml('kind = "kl"\nsize = 64\nbatch_size = 4\n[model]\nlatent_channels = 8\n'))
    options = merge({"kind": "vq", "size": 16, "seed": 5, "model": {"a": 1}}, file, {"size": 32, "batch_size": None})
    assert options == Options("kl", size=32, seed=5, batch_size=4, model={"a": 1, "latent_channels": 8})


def test_the_later_of_steps_and_minutes_says_how_long():
    assert merge({"kind": "vq", "minutes": 5}, {"steps": 3}).minutes is None
    assert merge({"kind": "vq", "steps": 5}, {"minutes": 3}).steps is None
    with pytest.raises(StudioError, match="not with both"):
        merge({"kind": "vq", "steps": 5, "minutes": 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('kind = "vq"\nbatchsize = 3', "has no option batchsize; there are kind, data, "),
        ('kind = "vq"\na = 1\nb = 2', "has no option a, no b"),
        ("kind = vq", "cannot be read"),
        ("[model\n", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_that_says_nothing_useful_is_one_sentence(toml, text, words):
    with pytest.raises(StudioError, match=words) as error:
        read_toml(toml(text))
    assert "options.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_is_no_text(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "nowhere.toml", tmp_path / "binary.toml", tmp_path):
        with pytest.raises(StudioError, match=f"{re.escape(str(file))} cannot be read"):
            read_toml(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steps", 0, "steps must be a whole number from 1 to 1000000000, not 0"),
        ("steps", 1.5, "whole number"),
        ("steps", True, "whole number"),
        ("steps", "5", "whole number"),
        ("size", 4, "from 8 to 4096"),
        ("layers", 10**9, "from 1 to 256"),
        ("codes", 10**400, "an integer of 1329 bits"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "whole number"),
        ("minutes", 0, "minutes must be a finite number above 0"),
        ("minutes", float("nan"), "finite number"),
        ("learning_rate", float("inf"), "finite number"),
        ("learning_rate", True, "finite number"),
        ("cooldown", 1.5, "at least 0 and at most 1"),
        ("average", 1.0, "at most 0.99999"),
        ("flip", 1, "flip must be true or false"),
        ("data", 3, "data must be text"),
        ("model", [1], "model must be a table"),
        ("tokenizer", {"a": 1}, "tokenizer must be text"),
    ],
)
def test_values_of_a_wrong_type_or_size_are_refused_by_name(key, value, words):
    with pytest.raises(StudioError, match=words):
        merge({"kind": "vq", key: value})


def test_the_ends_of_ranges_are_taken():
    options = merge({"kind": "vq", "cooldown": 0, "average": 0, "warmup": 0, "seed": 2**63 - 1, "minutes": 1})
    assert options.cooldown == options.average == options.warmup == 0 and options.minutes == 1
    assert merge({"kind": "vq", "size": np.int64(64), "minutes": np.float32(2)}).size == 64


def test_a_network_of_too_many_weights_is_refused():
    merge({"kind": "llamagen", "dim": 4096, "layers": 32})
    with pytest.raises(StudioError, match="256 layers of width 16384"):
        merge({"kind": "llamagen", "dim": 16384, "layers": 256})


@pytest.mark.parametrize(
    ("name", "value", "default", "words"),
    [
        ("decoder_layers", 10**9, None, "from 1 to 256"),
        ("code_dim", 10**400, 8, "1329 bits"),
        ("code_dim", "8", 8, "whole number"),
        ("code_dim", True, 8, "whole number"),
        ("default_top_k", -1, 0, "from 0"),
        ("default_temperature", float("nan"), 1.0, "finite"),
        ("train", 3, "all", "must be text"),
    ],
)
def test_settings_of_a_table_are_checked_by_their_defaults(name, value, default, words):
    with pytest.raises(StudioError, match=words):
        checked_setting(name, value, default)


def test_unknown_options_and_kinds_are_refused():
    from studio.training import train

    with pytest.raises(StudioError, match="There is no option stepps; there are kind"):
        train(kind="vq", stepps=3)
    with pytest.raises(StudioError, match="There is no kind 'vqgan'; choose one of vq, "):
        train(kind="vqgan")
    with pytest.raises(StudioError, match="Say what to train"):
        train(steps=3)
    with pytest.raises(StudioError, match="There is no preset 'emoji'; choose one of emoji-1d, .*, family"):
        train(preset="emoji")
    with pytest.raises(StudioError, match="--preset emoji-ar trains a llamagen: leave the kind vq out"):
        train(preset="emoji-ar", kind="vq")


def test_a_name_is_a_run_beside_this_one_then_a_bundled_model_then_a_folder(tmp_path):
    find = Finder(tmp_path / "runs" / "new")
    with pytest.raises(StudioError, match="There is no model other: name a bundled one, a folder, or a run beside"):
        find("other")
    assert find("emoji-vq").name == "emoji-vq" and find(str(tmp_path)) == tmp_path
    for name in ("other", "emoji-vq"):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
        assert find(name) == (tmp_path / "runs" / name / "model").resolve()


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole(name):
    preset = merge(read_preset(name))
    assert preset.kind in KINDS and preset.minutes and preset.data == "emoji"
