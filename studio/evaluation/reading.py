"""Many questions about one image in one forward pass of a vision-language model.

The tokens of an image are nearly all the cost, so they are read once: behind them stand the questions with their
answers, each of which sees the image and itself, at the positions it would have alone. What comes out for a question
is what the model says when it is asked nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.pruning.quecc import Compressor

IGNORED = -100


@dataclass(frozen=True, eq=False)
class PackedQuestions:
    """Questions and answers of B images, L tokens each.

    Args:
        ids: (B, L) text tokens, padded at the end.
        question: (B, L) number of the question a token belongs to, -1 for padding.
        place: (B, L) place within its question.
        targets: (B, L) the token that should follow where that is part of an answer, else -100.
    """

    ids: torch.Tensor
    question: torch.Tensor
    place: torch.Tensor
    targets: torch.Tensor

    def ends(self, questions: int) -> torch.Tensor:
        """(B, questions) the index in its row of each question's last token; the answer follows."""
        begins = (self.targets != IGNORED) & (self.targets.roll(1, dims=1) == IGNORED)
        return begins.nonzero()[:, 1].view(-1, questions)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.__dict__)

    def to(self, device: torch.device) -> "PackedQuestions":
        return PackedQuestions(**{name: part.to(device) for name, part in self.tensors().items()})


def pack_questions(tokenizer: PreTrainedTokenizerBase, images: Sequence[Sequence[tuple[str, str]]]) -> PackedQuestions:
    """Pack lists of (question, answer) texts, one list for each image; answers end with the tokenizer's eos."""
    rows = []
    for questions in images:
        row = []
        for number, (question, answer) in enumerate(questions):
            asked = tokenizer(question, add_special_tokens=False)["input_ids"]
            answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = [*asked, *answered[:-1]]
            targets = [IGNORED] * (len(asked) - 1) + answered
            row += [(token, number, place, targets[place]) for place, token in enumerate(tokens)]
        rows.append(row)
    longest = max(map(len, rows))
    padding = (tokenizer.pad_token_id, -1, 0, IGNORED)
    packed = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return PackedQuestions(*(part.contiguous() for part in packed.unbind(-1)))


def packed_logits(
    model: PreTrainedModel, features: torch.Tensor, positions: torch.Tensor, next_position: int, packed: PackedQuestions
) -> torch.Tensor:
    """Logits (B, L, V) of all text tokens; the arguments are those of `packed_states`."""
    return model.lm_head(packed_states(model, features, positions, next_position, packed))


def packed_states(
    model: PreTrainedModel, features: torch.Tensor, positions: torch.Tensor, next_position: int, packed: PackedQuestions
) -> torch.Tensor:
    """States (B, L, D) of all text tokens, behind the language model's last norm.

    Args:
        model: a LLaVA-like model of transformers whose prompt is bos, image, question.
        features: (B, T, D) what the language model receives for each image.
        positions: (T,) position of each feature; bos has position 0.
        next_position: position of the first token of each question.
        packed: the questions.
    """
    embed = model.get_input_embeddings()
    batch, image = len(features), features.shape[1] + 1
    bos = torch.full((batch, 1), model.config.get_text_config().bos_token_id, device=features.device)
    asked = embed(packed.ids)
    x = torch.cat((embed(bos), features.to(asked.dtype), asked), dim=1)
    before = torch.cat((positions.new_zeros(1), positions)).expand(batch, -1)
    places = torch.cat((before, next_position + packed.place), dim=1)
    owner = torch.cat((packed.question.new_full((batch, image), -2), packed.question), dim=1)
    mask = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -2)
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
    hidden = model.model.language_model(
        inputs_embeds=x, attention_mask=mask[:, None], position_ids=places, use_cache=False
    ).last_hidden_state
    return hidden[:, image:]


def question_states(model: PreTrainedModel, packed: PackedQuestions, questions: int) -> torch.Tensor:
    """(B, questions, D) the last state of each question, as text alone behind bos."""
    nothing = torch.zeros(len(packed.ids), 0, model.config.get_text_config().hidden_size, device=packed.ids.device)
    states = packed_states(model, nothing, packed.ids.new_zeros(0), 1, packed)
    ends = packed.ends(questions)
    return states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))


def compressed_logits(
    model: PreTrainedModel, compressor: Compressor, patches: torch.Tensor, tokens: int, packed: PackedQuestions
) -> torch.Tensor:
    """Logits (B * Q, L, V) of Q questions about each of B images, each read as a few tokens made for that question.

    Args:
        model: the LLaVA-NeXT that the compressor was made for.
        compressor: of the images.
        patches: (B, N, C), from `Compressor.read`.
        tokens: that an image becomes.
        packed: B * Q rows of one question each, an image's one after the other.
    """
    with torch.no_grad():
        asked = question_states(model, packed, 1).unflatten(0, (len(patches), -1))[:, :, 0]
    features = compressor(patches, asked, tokens).flatten(0, 1)
    positions = 1 + compressor.places(tokens).to(features.device)
    return packed_logits(model, features, positions, 1 + compressor.prompt_tokens, packed)


def exact_answers(logits: torch.Tensor, packed: PackedQuestions) -> list[torch.Tensor]:
    """For each image, whether greedy decoding would give each whole answer: (questions,) bool.

    Greedy decoding gives an answer if and only if its every token, eos too, is the likeliest behind the right ones.
    """
    right = (logits.argmax(dim=-1) == packed.targets) | (packed.targets == IGNORED)
    return [
        torch.stack([hits[question == number].all() for number in range(int(question.max()) + 1)])
        for hits, question in zip(right, packed.question)
    ]
