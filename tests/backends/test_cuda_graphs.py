"""Static shapes against the model's own calls: same numbers and tokens, memory used again, and no wait for the device.

Graphs need a GPU; here the same code runs without them.
"""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio import LlamaGen, backends
from studio.backends.cuda_graphs import GraphedLlamaGen, GraphedStudent, Replay
from studio.decoding.autoregressive import autoregressive
from studio.decoding.distilled import Distilled, distilled
from studio.decoding.eagle import AutoDrafts
from studio.decoding.jacobi import Jacobi, jacobi
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, speculative
from studio.models.distilled import DistilledStudent

SIZES = {"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


def model_of(**changed):
    torch.manual_seed(0)
    model = LlamaGen(**{**SIZES, **({} if "caption_dim" in changed else {"num_classes": 10}), **changed}).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def labels(batch=2):
    return {"class_labels": torch.arange(batch)}


def captions():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    return {"captions": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)), "caption_mask": mask}


def generators(batch=2):
    return [torch.Generator().manual_seed(seed) for seed in range(batch)]


CONDITIONS = {
    "classes": ({}, labels),
    "captions": ({"caption_dim": 16, "caption_length": 5}, captions),
    "regions": ({"caption_dim": 16, "caption_length": 5, "plan_size": 2}, captions),
    "grouped": ({"num_kv_heads": 1}, labels),
}


@pytest.mark.parametrize("interval", [-1, 5])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("given", CONDITIONS)
def test_plain_decoding_samples_the_same_tokens(given, scale, interval):
    sizes, condition = CONDITIONS[given]
    model, found = model_of(**sizes), {}
    for backend in ("plain", "graphs"):
        with backends.using(backend):
            call = {"generators": generators(), "sampling": Sampling(top_k=20)}
            call |= {"guidance_scale": scale, "cfg_interval": interval}
            found[backend] = autoregressive(model, condition(), **call).tokens
    assert torch.equal(found["graphs"], found["plain"])


@pytest.mark.parametrize("given", CONDITIONS)
def test_windows_and_trees_sample_the_same_tokens(given):
    sizes, condition = CONDITIONS[given]
    model, found = model_of(**sizes), {}
    codebook = torch.randn(48, 5, generator=torch.Generator().manual_seed(2))
    for backend in ("plain", "graphs"):
        with backends.using(backend):
            call = {"guidance_scale": 3.0, "sampling": Sampling()}
            guessed = jacobi(model, condition(), generators=generators(), settings=Jacobi(4), **call).tokens
            call |= {"settings": Speculative(drafts=AutoDrafts()), "codebook": codebook, "drafter": None}
            drafted = speculative(model, condition(), generators=generators(), **call).tokens
            found[backend] = guessed, drafted
    assert all(torch.equal(one, other) for one, other in zip(found["graphs"], found["plain"], strict=True))


@torch.no_grad()
def test_logits_differ_by_rounding_only_and_depend_on_the_cache():
    model = model_of()
    static, found = GraphedLlamaGen(model), {}
    prefix, _ = model.embed_condition(**labels())
    for view in (model, static):
        cache = view.new_cache(2)
        first = view.prefill(prefix, None, cache)
        found[view] = first, *[view.extend(torch.full((2, n), n), cache) for n in (1, 3, 1)]
        assert cache.length == 6
    for one, other in zip(found[model], found[static], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    cache = static.new_cache(2)
    static.prefill(prefix, None, cache)
    wrong = static.extend(torch.full((2, 1), 1), cache) - static.extend(torch.full((2, 1), 1), cache)
    assert wrong.abs().max() > 1e-3  # control: the same token at another place


@torch.no_grad()
def test_memory_and_calls_are_used_again_only_when_the_cache_is_gone():
    model = model_of()
    static = GraphedLlamaGen(model)
    first, second = static.new_cache(2), static.new_cache(2)
    assert first.store.data_ptr() != second.store.data_ptr()
    address, replays = first.store.data_ptr(), first.slot.replays
    static.prefill(model.embed_condition(**labels())[0], None, first)
    static.extend(torch.zeros(2, 1, dtype=torch.long), first)
    del first
    gc.collect()
    third = static.new_cache(2)
    assert third.store.data_ptr() == address and third.slot.replays is replays and len(replays) == 1
    assert not third.store.any() and third.length == 0


@torch.no_grad()
def test_rows_that_join_and_leave_a_batch_get_the_same_states():
    model = model_of()
    found = {}
    for view in (model, GraphedLlamaGen(model)):
        batch, states = view.new_batch_cache(3, 4), []

        def joined(first, count, view=view, batch=batch):
            prefix, _ = model.embed_condition(class_labels=torch.arange(first, first + count))
            cache = view.new_prefix_cache(count)
            view.prefill_states(prefix, None, cache)
            cache.keep_all()
            batch.join(cache)

        def extended(view=view, batch=batch):
            rows = batch.rows
            positions = torch.tensor(batch.lengths)[:, None] + torch.arange(2)
            visible = torch.ones(2, 2, dtype=torch.bool).tril().expand(rows, 2, 2)
            tokens = torch.arange(2 * rows).view(rows, 2)
            result = view.extend_tree(tokens, batch, positions, visible)
            batch.keep_all()
            return result

        joined(0, 2)
        states.append(extended())
        joined(5, 1)
        states.append(extended())
        batch.leave(0)
        states.append(extended())
        found[view] = states
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Counted(TorchDispatchMode):
    """Counts operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func._schema.name in WAITS
        return func(*args, **(kwargs or {}))


def test_plain_decoding_never_waits_for_the_device():
    model = model_of()
    with backends.using("graphs"), Counted() as counted:
        autoregressive(model, labels(), generators=generators(), guidance_scale=3.0)
    assert counted.waits == 0
    with Counted() as counted:
        int(torch.ones(()))
    assert counted.waits == 1  # control


@pytest.mark.parametrize("known", [0, 5])
@pytest.mark.parametrize("given", ["classes", "captions", "regions"])
@torch.no_grad()
def test_a_student_samples_the_same(given, known):
    sizes, condition = CONDITIONS[given]
    torch.manual_seed(1)
    more = sizes or {"num_classes": 10}
    student = DistilledStudent(**SIZES, code_dim=5, **more).eval()
    torch.nn.init.normal_(student.output.weight, std=0.3)
    vectors = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(3))
    static = GraphedStudent(student)
    for one, other in zip(
        static.hidden_states(vectors, known, **condition()), student.hidden_states(vectors, known, **condition())
    ):
        assert torch.equal(one, other)
    codebook, found = torch.randn(48, 5, generator=torch.Generator().manual_seed(2)), {}
    for backend in ("plain", "graphs"):
        with backends.using(backend):
            assert isinstance(backends.select_student(student), GraphedStudent) == (backend == "graphs")
            call = {"student": student, "codebook": codebook, "settings": Distilled(steps=2)}
            found[backend] = distilled(None, condition(), generators=generators(), **call).tokens
    assert torch.equal(found["graphs"], found["plain"])


def test_calls_are_kept_for_the_last_batch_sizes_only():
    student = DistilledStudent(**SIZES, code_dim=5, num_classes=10).eval()
    static = GraphedStudent(student)
    for batch in (*range(1, 12), 2):
        static.hidden_states(torch.zeros(batch, 16, 5), 0, **labels(batch))
    assert len(static._replays) == 8


def test_a_replay_without_a_gpu_is_the_function():
    replay = Replay(lambda x, y: (x + y,))
    for number in range(5):
        [found] = replay(torch.tensor([number]), torch.tensor([1]))
        assert found.item() == number + 1
