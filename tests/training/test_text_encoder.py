"""A text encoder that predicts images from captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from studio.training.text_encoder import HEAD_FILE, PlanningTextEncoder, TextEncoderRecipe
from studio.training.text_tokenizer import train_text_tokenizer

CODEBOOK = torch.eye(4)
IMAGES = torch.tensor([range(16), range(16, 0, -1), [0] * 16]) % 4
PLAN = torch.tensor([3, 4, 5, 6])


def text_encoder(**more):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, **more}
    return T5EncoderModel(T5Config(vocab_size=10, dropout_rate=0.0, **sizes))


def planning(encoder=None, code_dim=4):
    return PlanningTextEncoder(encoder or text_encoder(), 4, 2, torch.eye(4)[:, :code_dim])


def captioned(rng, number):
    """Image i of 4 x 4 codes is called by word i + 7; behind it come the end and the plan, then one padding."""
    chosen = torch.from_numpy(rng.integers(3, size=number))
    one = torch.ones_like(chosen)
    ids = torch.cat((chosen[:, None] + 7, one[:, None], PLAN.expand(number, 4), 0 * one[:, None]), dim=1)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "tokens": IMAGES[chosen]}


def unrelated(rng, number):
    return {**captioned(rng, number), "tokens": IMAGES[torch.from_numpy(rng.integers(3, size=number))]}


def taught_loss(sampled, recipe, steps=80):
    """The mean loss over the last ten steps."""
    module, losses, made = planning(), [], recipe(TextEncoderRecipe)
    optimizers = made.optimizers(module, made.defaults.learning_rate)
    for step in range(steps):
        loss = module(**sampled(np.random.default_rng(step), 16))
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return np.mean(losses[-10:])


def test_words_learn_what_they_look_like(recipe):
    assert taught_loss(captioned, recipe) < 0.1 < 0.5 < taught_loss(captioned, recipe, steps=1)


def test_a_caption_without_meaning_teaches_nothing(recipe):
    assert taught_loss(unrelated, recipe) > 0.4


@torch.no_grad()
def test_an_encoder_with_fewer_layers_grows(few_images, recipe, tmp_path, tiny_folder):
    """New layers change nothing at first, so a text encoder of one layer starts one of three, with its head."""
    few_images(8)
    tokenizer = str(tiny_folder / "image_tokenizer")
    small, grown = (
        recipe(TextEncoderRecipe, tokenizer=tokenizer, dim=32, layers=layers, model={"plan_size": 2})
        for layers in (1, 3)
    )
    first, larger = small.build(), grown.build()
    for block in first.text_encoder.encoder.block:
        torch.nn.init.normal_(block.layer[1].DenseReluDense.wo.weight)
    small.export(first.to(torch.bfloat16).float(), tmp_path)
    text = small.text.encode(["a red apple"])
    assert not torch.allclose(larger.predict(**text), first.predict(**text), atol=1e-3)
    grown.load(larger, tmp_path)
    torch.testing.assert_close(larger.predict(**text), first.predict(**text), atol=1e-4, rtol=1e-4)
    assert set(load_file(tmp_path / HEAD_FILE)) == {"weight", "bias"}


def test_each_plan_token_predicts_its_own_region():
    module = planning(code_dim=1).eval()
    module.head.weight.data.zero_()
    module.head.bias.data.copy_(torch.arange(4.0))
    batch = captioned(np.random.default_rng(0), 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert module.predict(ids, mask)[0, :, 0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3] * 2

    class States(torch.nn.Module):
        config = text_encoder().config

        def forward(self, input_ids, attention_mask):
            states = torch.zeros(*input_ids.shape, 32)
            states[..., 0] = input_ids
            return SimpleNamespace(last_hidden_state=states)

    module = planning(States(), code_dim=1)
    module.head.weight.data.zero_()
    module.head.weight.data[:, 0] = 1
    module.head.bias.data.zero_()
    assert module.predict(ids, mask)[0, :, 0].tolist() == [3, 3, 4, 4, 3, 3, 4, 4, 5, 5, 6, 6, 5, 5, 6, 6]


def test_padding_does_not_change_the_prediction():
    module = planning().eval()
    batch = captioned(np.random.default_rng(0), 2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        assert torch.allclose(module.predict(ids, mask), module.predict(ids[:, :-1], mask[:, :-1]), atol=1e-5)


@pytest.mark.parametrize("plan", [0, 4])
def test_every_text_of_its_tokenizer_ends_with_the_plan(plan):
    tokenizer = train_text_tokenizer(["a red apple", "a green pear"], 6 + plan, plan)
    ids = tokenizer(["a red apple", "a"], padding=True)["input_ids"]
    ending = ["</s>", *(f"<plan{i}>" for i in range(plan))]
    assert tokenizer.convert_ids_to_tokens(ids[0])[-len(ending) :] == ending
    assert tokenizer.convert_ids_to_tokens([i for i in ids[1] if i])[-len(ending) :] == ending
