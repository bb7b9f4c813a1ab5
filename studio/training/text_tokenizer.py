"""The text tokenizer of a generator: whole words where the captions use them, pieces of words otherwise."""

import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from studio.checkpoints.vocabulary import words_of

VOCABULARY = 4096
_PLAN = re.compile(r"<plan\d+>")


def known_words(texts: list[str]) -> list[str]:
    """Every word of the texts in lower case, hyphenated words also in parts, sorted."""
    whole = {word for text in texts for word in words_of(text)}
    return sorted(whole | {part for word in whole for part in re.split(r"['’-]", word)})


def train_text_tokenizer(texts: list[str], max_length: int, plan_length: int = 0) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer over lower-case words without punctuation.

    Each text ends with `</s>` and `plan_length` tokens `<plan0>`, `<plan1>`, ... that mean nothing by themselves: a
    text encoder can write there.

    Args:
        texts: from which the vocabulary is learned.
        max_length: longest text in tokens, everything included.
        plan_length: tokens behind `</s>`.

    Returns:
        A tokenizer that pads on the right with `<pad>`, number 0.
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
    tokenizer.train_from_iterator(texts, trainer)
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


def plan_length_of(tokenizer) -> int:
    """How many plan tokens end each text of a tokenizer."""
    return sum(bool(_PLAN.fullmatch(token)) for token in tokenizer.get_vocab())
