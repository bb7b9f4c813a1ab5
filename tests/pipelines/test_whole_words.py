"""Words that a tokenizer of phrases knows are read whole beside words that training never put there."""

import copy
import re

import pytest
from tokenizers import pre_tokenizers

import studio
from studio.data.captions import full_caption
from studio.data.splits import combinations
from studio.pipelines.whole_words import with_whole_words


@pytest.fixture(scope="module")
def pipe():
    return studio.load("emoji-ar", device="cpu")


def tokens(pipe, text):
    return pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "word"),
    [("a red fox", "fox"), ("a small fox", "fox"), ("a face with tears of joy on blue", "joy"),
     ("a happy melting face", "melting face"), ("a small water buffalo", "water buffalo")],
)  # fmt: skip
def test_known_words_are_whole(pipe, text, word):
    """Control: without the commas they are not."""
    assert word not in [token.strip() for token in tokens(pipe, text)]
    assert word in [token.strip() for token in tokens(pipe, with_whole_words(pipe.tokenizer, text))]


def test_the_pipeline_reads_a_prompt_so(pipe):
    plain, others = (pipe.encode_prompt(text)[0] for text in ("A red fox", "a red, fox"))
    assert plain.equal(others) and not plain.equal(pipe.encode_prompt("a red ox")[0])
    assert pipe.count_prompt_tokens("a red fox") == pipe.count_prompt_tokens("a red, fox")


def test_captions_stay_as_they_are(pipe):
    captions = {full_caption(*row) for row in combinations(held_out=True)}
    assert len(captions) > 1000
    assert all(with_whole_words(pipe.tokenizer, text) == text for text in captions)


def test_no_concept_is_broken_by_an_adjective(pipe):
    """Of 1,391 concepts behind "small"; control: without the commas hundreds have a word that is read in pieces."""

    def broken(text):
        spans = pipe.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cuts = {place for span in spans for place in span}
        words = [word for word in re.finditer(r"\w+", text) if len(tokens(pipe, word.group())) == 1]
        return any(word.start() < cut < word.end() for word in words for cut in cuts)

    texts = [f"a small {concept.lower()}" for concept in pipe.vocabulary[1]]
    assert sum(map(broken, texts)) > 300
    assert not any(broken(with_whole_words(pipe.tokenizer, text)) for text in texts)


@pytest.mark.parametrize(
    "text", ["", "a", "ox", ",", "fox, fox", "日本 fox", "x" * 500, "a red-fox's den", "fox\u0301"]
)
def test_any_text_keeps_its_words(pipe, text):
    found = with_whole_words(pipe.tokenizer, text)
    assert re.findall(r"\w+", found) == re.findall(r"\w+", text)
    assert with_whole_words(pipe.tokenizer, found) == found


def test_a_tokenizer_that_reads_commas_gets_none(pipe):
    """Control: the same tokens where commas are none."""
    reads_commas = copy.deepcopy(pipe.tokenizer)
    reads_commas.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("a ", "isolated")
    assert with_whole_words(reads_commas, "a red fox") == "a red fox"
    assert with_whole_words(pipe.tokenizer, "a red fox") == "a red, fox"
