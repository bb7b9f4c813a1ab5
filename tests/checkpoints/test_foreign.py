"""Model folders that somebody else made: taken as far as they are text and numbers, or refused in one sentence."""

import json
import os
import shutil
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from studio import VisualQuestionPipeline, load
from studio.checkpoints.foreign import check_pattern
from studio.errors import StudioError
from studio.pipelines import chat_template
from studio.pipelines.chat_template import render_template


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A pipeline's folder to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def reader_folder(tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


def spoil(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["image_tokenizer", "transformer", "text_encoder"])
def test_weights_that_are_no_numbers_are_refused(folder, part, number):
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name].view(-1)[-1] = number
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StudioError, match="NaN or infinite"):
        load(folder)


@pytest.mark.parametrize("name", ["transformer/config.json", "tokenizer/tokenizer.json", "tokenizer/merges.txt"])
def test_only_regular_files_are_opened(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(StudioError, match="no regular file"):
        load(folder)


def test_text_is_bounded(folder):
    with (folder / "tokenizer/tokenizer.json").open("r+") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(StudioError, match="longer than 64 MiB"):
        load(folder)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a": ' * 10**5, "9" * 5000, "[]", "\ufeff{}", ""])
def test_json_of_any_form_is_taken_or_refused(folder, text):
    (folder / "transformer/config.json").write_text(text)
    with pytest.raises(StudioError, match="configuration file"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [{"_class_name": ["a", "b"]}, {"transformer": 3}, {"tokenizer": [1, 2]}, {"text_encoder": {"a": "b"}}],
)
def test_a_damaged_index_is_refused(folder, changes):
    spoil(folder / "model_index.json", **changes)
    with pytest.raises(StudioError):
        load(folder)


@pytest.mark.parametrize("changes", [{"num_layers": 10**9}, {"vocab_size": 10**12}, {"dim": 10**30}])
def test_sizes_that_no_model_has_are_refused_before_it_is_built(folder, changes):
    began = time.monotonic()
    spoil(folder / "transformer/config.json", **changes)
    with pytest.raises(StudioError, match="damaged"):
        load(folder)
    assert time.monotonic() - began < 10


def test_code_in_a_folder_is_never_run(reader_folder, monkeypatch):
    """Nor does anything ask on the terminal whether it may be."""
    (reader_folder / "own.py").write_text(f"open({str(reader_folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    file = reader_folder / "processor_config.json"
    spoil(file, auto_map={"AutoProcessor": "own.Own"}, processor_class="Own")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(StudioError, match="processor"):
        load(reader_folder)
    assert not (reader_folder / "ran").exists()


REAL_PATTERNS = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'re|'ve|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
    r"[\(\)]+|\)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL_PATTERNS)
def test_the_expressions_of_published_tokenizers_are_taken(pattern):
    check_pattern(pattern, "it")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(?:a|a)*b", r"(\w+\s?){2,}x", r"(a)\1", "a" * 2001])
def test_expressions_that_may_not_end_are_refused(pattern, folder):
    file = folder / "tokenizer/tokenizer.json"
    spoil(file, pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    with pytest.raises(StudioError, match="may not end"):
        load(folder)


def test_a_tokenizer_that_panics_is_told(tiny_pipeline, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    class Panics:
        def __call__(self, *_, **__):
            raise panic("retry-limit-in-match over")

    monkeypatch.setattr(tiny_pipeline, "tokenizer", Panics(), raising=False)
    with pytest.raises(StudioError, match="cannot read this text"):
        tiny_pipeline.encode_prompt("a red apple")


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "does not end"),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(9) }}", "chat template"),
        ("{{ raise_exception('no') }}", "cannot render a question: no\\.$"),
        ("{{ 10 ** (10 ** 10) }}", "does not end|memory"),
        ("{{ messages[0].role }}", "chat template makes fails"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ 'a' * 10 ** 7 }}", "text without end"),
        ("{{ 'a'.ljust(10 ** 10) }}", "too much memory"),
        ("{{ 'a' | center(10 ** 10) }}", "too much memory"),
        ("{{ [1] | batch(10 ** 10, 'a') | list }}", "too much memory"),
        ("{{ '%10000000000s' % 'a' }}", "cannot render"),
        ("{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "memory"),
        ("{% set a = 'a' %}" + "{% set a = a.replace('a', 'aaaa') %}" * 20, "memory"),
        ("{{ namespace(__class__=1) }}{% set n = namespace(_a=1) %}{{ n.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render a question"),
        ("{{ ''.__class__.__mro__ }}", "cannot render a question"),
        ("{% if %}", "cannot render a question"),
    ],
)
def test_chat_templates_end(tiny_reader, template, word, monkeypatch):
    model, processor = tiny_reader
    monkeypatch.setattr(processor, "chat_template", template)
    began = time.monotonic()
    with pytest.raises(StudioError, match=word):
        VisualQuestionPipeline(model, processor)(Image.new("RGB", (32, 32)), "what is this")
    assert time.monotonic() - began < 20


SEVERAL = """{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {% for c in m.content %}
{% if c.type == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}{% if loop.first %}{% continue %}{% endif %}
{% endfor %}{% endfor %}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}
  {% generation %}{{ messages | tojson }}{% endgeneration %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""


@pytest.mark.parametrize("template", [SEVERAL, {"default": "{{ messages[0].role }}", "other": ""}])
def test_prompts_are_those_of_transformers(tiny_reader, template, monkeypatch):
    _, processor = tiny_reader
    monkeypatch.setattr(processor, "chat_template", template)
    content = [{"type": "image"}, {"type": "text", "text": " what is this, “ä” 🍎? "}]
    turn = [{"role": "user", "content": content}]
    expected = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert render_template(processor, turn) == expected and expected


def test_a_renderer_that_was_killed_is_started_again(tiny_reader, monkeypatch):
    _, processor = tiny_reader
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0] }}")
    assert render_template(processor, ["a"]) == "a"
    chat_template._renderer._process.kill()
    chat_template._renderer._process.wait()
    assert render_template(processor, ["b"]) == "b"


def test_chat_templates_are_bounded(tiny_reader, monkeypatch):
    model, processor = tiny_reader
    monkeypatch.setattr(processor, "chat_template", "a" * 70_000)
    with pytest.raises(StudioError, match="65536 characters"):
        VisualQuestionPipeline(model, processor)


@pytest.mark.parametrize("name", [None, 3, "a" * 5000, "a\0b", "\ud800", "~nobody-here/model", b"\xff"])
def test_names_of_no_model_are_refused(name):
    with pytest.raises(StudioError):
        load(name)


@pytest.mark.parametrize(
    "given", [{"device": 3.5}, {"device": "\ud800"}, {"dtype": ["float32"]}, {"dtype": torch.int8}]
)
def test_devices_and_dtypes_of_no_kind_are_refused(tiny_folder, given):
    with pytest.raises(StudioError):
        load(tiny_folder, **given)
