"""The memory of an image in models with positions on three axes: answers are those of the whole prompt."""

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from studio.pipelines.visual_question import VisualQuestionPipeline
from tests.pruning.tiny_families import answer, tiny
from tests.pruning.tiny_models import IMAGE

TAILS = {"one": [20, 21, 22], "two": [30, 31, 32, 33], "?": [40]}


class Words:
    """A processor that knows ids only."""

    chat_template = None
    image_token, image_processor = "<image>", None

    def decode(self, ids, **options):
        return " ".join(map(str, ids.tolist()))


class Reader(VisualQuestionPipeline):
    """Reads the tiny model's own prompts: an image is the number of its pixels, a question one of `TAILS`."""

    def _inputs(self, image, question):
        inputs = tiny(self.family).prompt(((image.width % 10,),), text=0)
        ids = inputs["input_ids"][0].tolist()
        end = len(ids) - ids[::-1].index(IMAGE)
        ids = torch.tensor([ids[:end] + self._tail(question)])
        made = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in made:
            made["mm_token_type_ids"] = (ids == IMAGE).int()
        return BatchFeature(made)

    def _tail(self, question):
        return [96, *TAILS[question]]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_two_memories_answer_in_turn(family):
    reader = Reader(tiny(family).model, Words())
    reader.family = family
    images = [Image.new("RGB", (10, 10)), Image.new("RGB", (11, 10))]
    expected = {}
    for image in images:
        for question in ("one", "two"):
            inputs = reader._inputs(image, question)
            sequences = answer(reader.model, inputs).sequences[:, inputs["input_ids"].shape[1] :]
            expected[image.width, question] = reader.processor.decode(sequences[0])
    assert len(set(expected.values())) > 1
    memories = {image.width: reader.remember(image, keep=1.0) for image in images}
    small = reader.remember(images[0], method="ems", keep=0.2)
    assert small.cache_bytes < memories[10].cache_bytes / 2 and small.kept_tokens < small.visual_tokens
    for question in ("one", "two", "one"):
        for width, memory in memories.items():
            assert reader.ask(memory, question, max_new_tokens=4).answer == expected[width, question]
    if family != "llava":
        assert memories[10].rope_deltas.tolist() != memories[11].rope_deltas.tolist()
    assert reader.ask(small, "two", max_new_tokens=4).answer == reader.ask(small, "two", max_new_tokens=4).answer
