"""Prompt words that a model does not know."""

import json
from types import SimpleNamespace

import pytest

from studio import StudioError
from studio.checkpoints.vocabulary import prompt_warning, read_vocabulary, unknown_words

WORDS = ["a", "red", "apple", "green", "cat", "face"]
CONCEPTS = ["red apple", "green apple", "cat face", "cat"]


def test_known_words_in_any_case_are_fine():
    assert unknown_words("A red Apple, green!", WORDS, CONCEPTS) == []


def test_an_unknown_word_comes_with_similar_concepts():
    [(word, nearest)] = unknown_words("a red aple", WORDS, CONCEPTS)
    assert word == "aple" and nearest[0] in {"red apple", "green apple"}


def test_a_part_of_a_label_finds_it():
    assert unknown_words("app", WORDS, CONCEPTS)[0][1][:2] == ["red apple", "green apple"]


def test_a_word_like_nothing_has_no_neighbours_and_is_named_once():
    assert unknown_words("zzz zzz", WORDS, CONCEPTS) == [("zzz", [])]


def test_warning_names_the_words():
    pipe = SimpleNamespace(vocabulary=(WORDS, CONCEPTS))
    assert "'kat' (nearest: cat" in prompt_warning(pipe, "a red kat")
    assert prompt_warning(pipe, "a red cat") is None
    assert prompt_warning(SimpleNamespace(vocabulary=None), "anything") is None
    assert prompt_warning(pipe, None) is None


def test_a_warning_stays_short():
    pipe = SimpleNamespace(vocabulary=(WORDS, CONCEPTS))
    words = [letter * 400 for letter in "qwzyvjkh"]
    warning = prompt_warning(pipe, " ".join(words))
    assert all(f"{word[:31]}…" in warning for word in words[:5]) and "3 more;" in warning and len(warning) < 300


def test_a_damaged_file_is_refused(tmp_path):
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "concepts.json").write_text(json.dumps({"words": 3}))
    with pytest.raises(StudioError, match="damaged"):
        read_vocabulary(tmp_path)
