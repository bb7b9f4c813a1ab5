"""The text tokenizer of a generator: words of the captions, pieces of others, and an end that is always the same."""

import pytest
from transformers import AutoTokenizer

from studio.data.image_folder import ImageFolder
from studio.training.text import load_text, new_text
from studio.training.text_tokenizer import known_words, plan_length_of, train_text_tokenizer

TEXTS = ["a red apple", "A Red Café, on a T-shirt!", "two apples; don't"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS, 12, 4)


def words(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def spoken(tokenizer, text):
    """Tokens without their spaces, which may be tokens of their own."""
    return [token.strip() for token in words(tokenizer, text) if token.strip()]


END = ["</s>", "<plan0>", "<plan1>", "<plan2>", "<plan3>"]


def test_words_that_the_captions_use_are_one_token(tokenizer):
    assert spoken(tokenizer, "a red apple") == ["a", "red", "apple", *END]
    assert words(tokenizer, "A  RED, apple!") == words(tokenizer, "a red, apple")
    assert words(tokenizer, "café") == words(tokenizer, "CAFE") == ["cafe", *END]
    assert plan_length_of(tokenizer) == 4 and plan_length_of(train_text_tokenizer(TEXTS, 12)) == 0


def test_frequent_phrases_are_one_token_and_end_at_function_words():
    """Control: the same words where the phrase is rare."""
    often = [f"a {colour} apple, on a green background" for colour in ("red", "blue") for _ in range(20)]
    tokenizer = train_text_tokenizer(often, 16, 4)
    assert words(tokenizer, "a red apple, on a green background") == [
        "a ",
        "red apple",
        "on ",
        "a ",
        "green background",
        *END,
    ]
    assert spoken(tokenizer, "apple red") == ["apple", "red", *END]
    rare = train_text_tokenizer(["a red apple", "red", "apple"], 16, 4)
    assert spoken(rare, "a red apple") == ["a", "red", "apple", *END]


def test_other_words_are_pieces_and_nothing_is_executed_of_a_caption(tokenizer):
    assert len(words(tokenizer, "reds")) > 6 and "<unk>" not in words(tokenizer, "reds")
    assert "<unk>" in words(tokenizer, "猫")
    assert "<plan0>" not in words(tokenizer, "plan0")[:-4]


def test_what_is_too_long_keeps_its_end(tokenizer):
    ids = tokenizer("a red apple " * 20, truncation=True, max_length=12)["input_ids"]
    assert len(ids) == 12 and tokenizer.convert_ids_to_tokens(ids)[-5:] == words(tokenizer, "")


def test_it_is_read_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a red apple")["input_ids"] == tokenizer("a red apple")["input_ids"]
    assert again.model_max_length == 12 and again.padding_side == "right" and again.pad_token_id == 0


def test_known_words_are_whole_and_in_parts():
    known = known_words(TEXTS)
    assert known == sorted(known) and {"red", "apple", "apples", "t-shirt", "t", "shirt"} <= set(known)
    assert "Red" not in known


def test_a_new_text_is_as_long_as_its_captions_need(few_images, image_folder, tmp_path):
    few_images(8)
    source = ImageFolder(image_folder(captions=True), 16)
    text = new_text(source, plan_size=2, dim=32, layers=1)
    assert text.is_new and text.length == 12 + 4 and text.dim == 32 and text.vocabulary is None
    encoded = text.encode(["a red pattern 1", "blue"])
    assert encoded["input_ids"].shape == encoded["attention_mask"].shape == (2, 16)
    long, short = encoded["attention_mask"].sum(1).tolist()
    assert long > short == 1 + 1 + 4 and text.encode(["blue"], shorten=True)["input_ids"].shape == (1, 6)
    text.encoder.save_pretrained(tmp_path / "run" / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    again = load_text(tmp_path / "run", source)
    assert not again.is_new and again.plan_size == 2 and again.length == 16
