"""Where a reader is told to look: the right patches, and the attention that the model really has."""

import numpy as np
import pytest
import torch
from PIL import Image

from studio.data.scenes import CELL, Question, draw_scene
from studio.evaluation.reading import pack_questions, packed_logits
from studio.training import attention_supervision
from studio.training.attention_supervision import AttentionLoss, cells_of_patches, what_shows
from studio.training.reader_network import PATCH


@torch.no_grad()
@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 2)])
def test_the_patches_of_a_cell_are_those_that_change_with_it(tiny_reader, tiles):
    model, processor = tiny_reader
    image = draw_scene(np.random.default_rng(0), tiles).image
    cells = cells_of_patches(tiles, PATCH)

    def features(pixels):
        inputs = processor.image_processor([Image.fromarray(pixels)], return_tensors="pt")
        return torch.cat(list(model.model.get_image_features(**inputs, return_dict=True).pooler_output))

    before = features(image)
    assert len(before) == len(cells)
    for cell in range(4 * tiles[0] * tiles[1]):
        row, column = divmod(cell, 2 * tiles[1])
        changed = image.copy()
        changed[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] ^= 255
        change = (features(changed) - before).norm(dim=1)
        by_cell = [float(change[cells == other].mean()) for other in range(4 * tiles[0] * tiles[1])]
        assert by_cell[cell] == max(by_cell)
        assert (cells == cell).sum() == (CELL // PATCH) ** 2


def test_what_no_token_shows_is_shown_by_the_first_and_numbers_are_shared_with_it():
    asked = [("place", (1,)), ("presence", ()), ("count", (0, 2)), ("count", (3,)), ("presence", (0, 2))]
    questions = [Question(kind, "?", "", cells) for kind, cells in asked]
    shown, on_first = what_shows([questions], torch.tensor([-1, 0, 1, 1, 2]))
    nowhere, both = [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]
    assert shown.int().tolist() == [[[0, 0, 1, 1, 0], nowhere, both, nowhere, both]]
    assert on_first[0].tolist() == pytest.approx([0, 1, 1 / 3, 1, 0])


def test_the_loss_is_that_of_the_attention_that_the_model_has(tiny_reader, monkeypatch):
    """Eager attention returns its weights; over the image alone they are those that the loss is about."""
    model, processor = tiny_reader
    monkeypatch.setattr(attention_supervision, "_SHARE", 1.0)
    language_model = model.model.language_model
    scenes = [draw_scene(np.random.default_rng(seed), (1, 1), questions=6) for seed in range(2)]
    packed = pack_questions(processor.tokenizer, [[(q.text, q.answer) for q in scene.questions] for scene in scenes])
    cells = cells_of_patches((1, 1), PATCH)
    shown, on_first = what_shows([scene.questions for scene in scenes], cells)
    assert {0.0, 1.0} < set(on_first.flatten().tolist())
    torch.manual_seed(0)
    features = torch.randn(2, len(cells), model.config.get_text_config().hidden_size)
    seen = {}
    language_model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), AttentionLoss(language_model) as looking:
            hook = looking.attention.register_forward_hook(lambda module, args, output: seen.update(weights=output[1]))
            packed_logits(model, features, 1 + torch.arange(len(cells)), 1 + len(cells), packed)
            mine = looking(1 + len(cells) + packed.ends(6), shown, on_first)
    finally:
        hook.remove()
        language_model.set_attn_implementation("sdpa")
    assert not looking.attention._forward_pre_hooks
    wanted = []
    for row in range(2):
        for question, end in enumerate(packed.ends(6)[row].tolist()):
            assert packed.ids[row, end] == processor.tokenizer.convert_tokens_to_ids("?")
            to_image = seen["weights"][row, :, 1 + len(cells) + end, : 1 + len(cells)]
            distribution, share = to_image / to_image.sum(-1, keepdim=True), on_first[row, question]
            on_it = (distribution[:, 1:] * shown[row, question]).sum(-1)
            wanted.append(-(share * distribution[:, 0].log() + (1 - share) * on_it.log().clamp(min=-99)))
    torch.testing.assert_close(mine, torch.stack(wanted).mean(), atol=1e-4, rtol=1e-4)
