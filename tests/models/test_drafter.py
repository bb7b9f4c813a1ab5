"""Token embeddings of a drafter: its own, or a copy of its model's that is not saved."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from studio import LlamaGen, LlamaGenPipeline, Speculative, StudioError, backends
from studio.decoding.eagle import DrafterDrafts
from studio.models.drafter import Drafter


@pytest.fixture
def target(tiny_class_pipeline):
    return tiny_class_pipeline.transformer


def loaded(drafter, folder):
    drafter.save_pretrained(folder)
    return Drafter.from_pretrained(folder).eval()


def test_the_copy_is_not_stored_and_read_again(target, tmp_path):
    torch.manual_seed(0)
    drafter = Drafter.for_target(target).eval()
    again = loaded(drafter, tmp_path)
    assert not any("tokens" in name for name in load_file(next(tmp_path.glob("*.safetensors"))))
    with pytest.raises(StudioError, match="read_embeddings"):
        backends.select_drafter(again)
    again.read_embeddings(target)
    assert torch.equal(again.token_embeddings, target.tok_embeddings.weight)
    tokens, states = torch.randint(64, (2, 5)), torch.randn(2, 5, 32)
    assert torch.equal(again(tokens, states), drafter(tokens, states))


def test_a_pipeline_gives_its_drafter_the_embeddings(tiny_class_pipeline, target, tmp_path):
    drafter = loaded(Drafter.for_target(target), tmp_path)
    pipe = LlamaGenPipeline(tiny_class_pipeline.image_tokenizer, target, drafter=drafter)
    assert torch.equal(drafter.token_embeddings, target.tok_embeddings.weight)
    decoding = Speculative(drafts=DrafterDrafts(drafter))
    assert pipe(class_labels=1, decoding=decoding, output_type="tokens").tokens.shape == (1, 16)


@torch.no_grad()
def test_a_backend_is_rebuilt_when_other_embeddings_are_read(target):
    drafter, other = Drafter.for_target(target).eval(), copy.deepcopy(target)
    torch.nn.init.normal_(other.tok_embeddings.weight)
    places = {"positions": torch.zeros(2, 1, dtype=torch.long), "visible": torch.ones(2, 1, 1, dtype=torch.bool)}

    def guess(network):
        tokens, states = torch.tensor([[3], [4]]), torch.ones(2, 1, 32)
        return network.extend_tree(tokens, states, network.new_tree_cache(2, 1), **places)

    before = guess(backends.select_drafter(drafter))
    drafter.read_embeddings(other)
    after = guess(backends.select_drafter(drafter))
    torch.testing.assert_close(after, guess(drafter), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_table_of_its_own_is_stored_and_kept(target, tmp_path):
    sizes = {"vocab_size": 64, "dim": 32, "num_heads": 2, "grid_size": 4, "prefix_length": target.prefix_length}
    drafter = loaded(Drafter(**sizes), tmp_path)
    before = drafter.token_embeddings.clone()
    drafter.read_embeddings(target)
    assert torch.equal(drafter.token_embeddings, before) and "embed_tokens.weight" in drafter.state_dict()
    assert backends.select_drafter(drafter, "plain") is drafter


def test_a_model_of_other_sizes_is_refused(target):
    other = LlamaGen(vocab_size=48, dim=32, num_layers=1, num_heads=2, grid_size=4, num_classes=10)
    with pytest.raises(StudioError, match="vocab_size"):
        Drafter.for_target(target).read_embeddings(other)
