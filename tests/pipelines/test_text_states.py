"""States of prompts: of real tokens only, kept for their next use, and never those of other weights."""

import pytest
import torch

from studio import backends
from studio.pipelines.text_states import TextStates

PROMPTS = [[3, 4, 5, 1], [6, 1], [7, 8, 9, 1]]


@pytest.fixture
def encoder(tiny_pipeline):
    """The encoder of the tiny pipeline, whose weights a test may change."""
    encoder = tiny_pipeline.text_encoder
    kept = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    yield encoder
    encoder.load_state_dict(kept)


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that were encoded, in order."""
    from studio.pipelines import text_states

    calls, encode = [], text_states._encode

    def counted(encoder, prompts, device):
        calls.extend(prompts)
        return encode(encoder, prompts, device)

    monkeypatch.setattr(text_states, "_encode", counted)
    return calls


def test_states_are_those_of_the_padded_call(encoder):
    found = TextStates()(encoder, PROMPTS, torch.device("cpu"))
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    with torch.no_grad():
        padded = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, states in enumerate(found):
        torch.testing.assert_close(states, padded[row, : len(states)], atol=1e-5, rtol=1e-5)


def test_a_prompt_is_encoded_once_while_it_is_among_the_last(encoder, encoded):
    states, device = TextStates(prompts=2), torch.device("cpu")
    first = states(encoder, PROMPTS[:2], device)
    again = states(encoder, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], device)
    assert len(encoded) == 2 and all(torch.equal(again[i], first[i % 2]) for i in range(3))
    states(encoder, PROMPTS[2:], device)  # in place of the second, which was used before the first
    states(encoder, PROMPTS[:1], device)
    assert len(encoded) == 3
    states(encoder, PROMPTS[1:2], device)
    assert len(encoded) == 4


@pytest.mark.parametrize("change", ["in place", "data", "replaced"])
def test_changed_weights_give_new_states(encoder, encoded, change):
    states, device = TextStates(), torch.device("cpu")
    before = states(encoder, PROMPTS[:1], device)[0]
    norm = encoder.encoder.final_layer_norm
    if change == "in place":
        with torch.no_grad():
            norm.weight.mul_(2)
    elif change == "data":
        norm.weight.data.mul_(2)
    else:
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    torch.testing.assert_close(states(encoder, PROMPTS[:1], device)[0], 2 * before)
    assert len(encoded) == 2


def test_an_encoder_in_training_keeps_nothing(encoder, encoded):
    states, device = TextStates(), torch.device("cpu")
    encoder.train()
    try:
        states(encoder, PROMPTS[:1], device), states(encoder, PROMPTS[:1], device)
    finally:
        encoder.eval()
    assert len(encoded) == 2


def test_the_pipeline_gives_zeros_at_padding_and_does_not_depend_on_the_batch(tiny_pipeline, monkeypatch):
    prompts = ["a red apple", "a green pear on a blue sky"]
    captions, mask = tiny_pipeline.encode_prompt(prompts)
    assert captions.shape == (2, 8, 16) and mask.sum(dim=1).tolist() == [3, 7]
    assert (captions[~mask] == 0).all() and (captions[mask] != 0).any(dim=1).all()
    monkeypatch.setattr(backends, "select_text", lambda encoder: None)
    for row, prompt in enumerate(prompts):
        monkeypatch.setattr("studio.pipelines.base.text_states", TextStates())
        alone, its_mask = tiny_pipeline.encode_prompt(prompt)
        assert torch.equal(its_mask[0], mask[row])
        torch.testing.assert_close(alone[0], captions[row], atol=1e-5, rtol=1e-5)
