"""Trees through every view of a model: greedy tokens are those of plain decoding; the drafter is the model's own."""

import pytest
import torch

from studio import LlamaGen, Speculative, StudioError
from studio.decoding.autoregressive import Autoregressive, autoregressive
from studio.decoding.eagle import AutoDrafts, DrafterDrafts
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import speculative
from studio.decoding.trees import default_tree
from studio.models.drafter import Drafter

GREEDY = {"sampling": Sampling(temperature=0), "guidance_scale": 3.0, "cfg_interval": 9}
CONDITION = {
    "captions": torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)),
    "caption_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool(),
}


def streams():
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaGen(
        vocab_size=32, dim=32, num_layers=2, num_heads=2, grid_size=4, caption_dim=16, caption_length=5,
        prefix_rope="identity", plan_size=2,
    )  # fmt: skip
    torch.nn.init.normal_(model.output.weight, std=0.5)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.3)
    torch.nn.init.normal_(model.plan_embeddings.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def drafter(model):
    torch.manual_seed(1)
    drafter = Drafter.for_target(model).eval()
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return drafter


@pytest.mark.parametrize("weights", ["auto", "plain", "native", "float32"])
@pytest.mark.parametrize("drafted", [False, True], ids=["recycled", "drafted"])
def test_greedy_tokens_are_those_of_plain_decoding(model, drafter, weights, drafted):
    plain = autoregressive(model, CONDITION, generators=streams(), settings=Autoregressive(weights="plain"), **GREEDY)
    sampled = speculative(
        model, CONDITION, generators=streams(), settings=Speculative(drafts=AutoDrafts(), weights=weights),
        drafter=drafter if drafted else None, **GREEDY,
    )  # fmt: skip
    assert torch.equal(sampled.tokens, plain.tokens)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_models_own_drafter_is_taken_in_the_devices_tree(model, drafter, sampled):
    call = {"generators": streams(), "guidance_scale": 2.0}
    own = speculative(model, CONDITION, settings=Speculative(drafts=AutoDrafts(sampled)), drafter=drafter, **call)
    tree = default_tree(torch.device("cpu"), sampled)
    call["generators"] = streams()
    named = speculative(model, CONDITION, settings=Speculative(drafts=DrafterDrafts(drafter, tree)), **call)
    assert torch.equal(own.tokens, named.tokens) and own.target_calls == named.target_calls


def test_unknown_weights_are_refused():
    with pytest.raises(StudioError, match="weights is one of"):
        Speculative(weights="int4")
