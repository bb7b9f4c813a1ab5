"""The text tokenizer of a generator: byte pairs that may reach over spaces.

"SuperBPE: Space Travel for Language Models" (arXiv:2503.13423): a phrase that is frequent, such as "red apple", becomes
one token, whose embedding a small text encoder learns at once, where it would have to put together what single words
mean. Merges stop at punctuation and at function words, so that phrases combine freely.
"""

import re
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from studio.checkpoints.vocabulary import words_of

VOCABULARY = 8192
LONGEST = 40
"""Characters of a token."""
FEWEST = 4
"""How often two neighbours must occur in the texts to be merged."""
_BETWEEN = r"\s*,\s*"
_FUNCTION_WORDS = r"\b(?:a|an|the|on|in|at|of|with|and)\b\s?"
_PLAN = re.compile(r"<plan\d+>")


def known_words(texts: list[str]) -> list[str]:
    """Every word of the texts in lower case, hyphenated words also in parts, sorted."""
    whole = {word for text in texts for word in words_of(text)}
    return sorted(whole | {part for word in whole for part in re.split(r"['’-]", word)})


def train_text_tokenizer(texts: list[str], max_length: int, plan_length: int = 0) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer over lower-case phrases without punctuation.

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
            normalizers.Replace(Regex(r"[^\w\s,]|_"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BETWEEN), "removed"),
            pre_tokenizers.Split(Regex(_FUNCTION_WORDS), "isolated"),
        ]
    )
    plan = [f"<plan{i}>" for i in range(plan_length)]
    special = ["<pad>", "</s>", "<unk>", *plan]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        show_progress=False,
        max_token_length=LONGEST,
        min_frequency=FEWEST,
    )
    words = [word for word in known_words(texts) for _ in range(FEWEST)]  # every word is a token, however rare
    tokenizer.train_from_iterator([*texts, *words], trainer)
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


def plan_length_of(tokenizer: Any) -> int:
    """How many plan tokens end each text of a tokenizer."""
    return sum(bool(_PLAN.fullmatch(token)) for token in tokenizer.get_vocab())
