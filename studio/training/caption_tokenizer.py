"""The text tokenizer of the bundled generators: whole words where the captions use them, pieces of words otherwise."""

import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from studio.checkpoints.vocabulary import words_of
from studio.data.archive import STYLES, load_concepts
from studio.data.backgrounds import NAMES
from studio.data.captions import full_caption, names

VOCABULARY = 4096


def caption_texts():
    """Every name and tag of every concept, and captions with every style and background."""
    texts = [text for concept, known in zip(load_concepts(), names(), strict=True) for text in (*known, *concept.tags)]
    for concept in load_concepts():
        style, background = concept.index % len(STYLES), concept.index % len(NAMES)
        texts.append(full_caption(concept.index, style, background))
    return texts


def known_words():
    """Every word of the captions in lower case, hyphenated words also in parts, sorted."""
    whole = {word for text in caption_texts() for word in words_of(text)}
    return sorted(whole | {part for word in whole for part in re.split(r"['’-]", word)})


def train_caption_tokenizer(max_length, plan_length=0):
    """A byte-pair tokenizer over lower-case words without punctuation.

    Each text ends with `</s>` and `plan_length` tokens `<plan0>`, `<plan1>`, ... that mean nothing by themselves: a
    text encoder can write there.

    Args:
        max_length: longest text in tokens, everything included.
        plan_length: tokens behind `</s>`.

    Returns:
        A `PreTrainedTokenizerFast` that pads on the right with `<pad>`, number 0.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]|_"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plan = [f"<plan{i}>" for i in range(plan_length)]
    special = ["<pad>", "</s>", "<unk>", *plan]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(caption_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(("$A", "</s>", *plan)),
        special_tokens=[(token, special.index(token)) for token in ("</s>", *plan)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )
