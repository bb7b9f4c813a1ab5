"""Continuous batching: the tokens of an image do not depend on its company, nor on when it joined."""

import random

import pytest
import torch

from studio import StudioError
from studio.backends.cpu_c import NativeLlamaGen, is_available
from studio.decoding.autoregressive import Autoregressive, autoregressive
from studio.decoding.continuous import ContinuousBatch, Widths
from studio.decoding.sampling import Sampling
from studio.models.kv_cache import BatchCache

VOCABULARY = 64


def mixed_requests(pipe, count, seed=0):
    """Requests of any kind: prompts, seeds, guidance, temperatures, filters, one to four images."""
    choose = random.Random(seed)
    prompts = ["a red apple", "a green pear", "blue sky", "apple on flat background", "a"]
    return [
        {
            "condition": pipe.condition(choose.choice(prompts), num_images_per_prompt=images),
            "seeds": [choose.randrange(10**6) for _ in range(images)],
            "guidance_scale": choose.choice([1.0, 0.0, 2.0, 3.5, 7.5]),
            "guidance_schedule": choose.choice([None, "constant", "linear"]),
            "sampling": Sampling(
                choose.choice([0.0, 0.5, 1.0, 1.7]),
                choose.choice([0, 0, 5, 20]),
                choose.choice([1.0, 1.0, 0.9, 0.3]),
                choose.choice(["llamagen", "lantern"]),
            ),
        }
        for images in (choose.randint(1, 4) for _ in range(count))
    ]


def generators(request):
    return [torch.Generator().manual_seed(seed) for seed in request["seeds"]]


def alone(model, request, weights):
    """The tokens of plain decoding, for these images alone."""
    sampling, scale = request["sampling"], request["guidance_scale"]
    settings = Autoregressive(sampling.order, weights, request.get("guidance_schedule"))
    call = {"generators": generators(request), "sampling": sampling, "guidance_scale": scale, "settings": settings}
    return autoregressive(model, request["condition"], **call).tokens


def join(batch, request, **more):
    call = {name: request[name] for name in ("condition", "sampling", "guidance_scale", "guidance_schedule")}
    return batch.join(**call, generators=generators(request), **more)


@pytest.mark.parametrize(("weights", "window"), [("plain", 3), ("auto", 1), ("auto", None)])
def test_200_mixed_requests_are_those_of_calls_alone(tiny_pipeline, weights, window):
    model, choose = tiny_pipeline.transformer, random.Random(1)
    requests = mixed_requests(tiny_pipeline, 200)
    batch = ContinuousBatch(model, max_images=9, weights=weights, window=window)
    waiting, under_way, ends = list(enumerate(requests)), {}, {}
    sizes, left = [], set()
    while waiting or under_way:
        while waiting and batch.room >= len(waiting[0][1]["seeds"]) and choose.random() < 0.7:
            number, request = waiting.pop(0)
            under_way |= {image: (number, place) for place, image in enumerate(join(batch, request))}
        if under_way and choose.random() < 0.02:
            image = choose.choice(list(under_way))
            batch.leave(image)
            left.add(under_way.pop(image))
        sizes.append(len(batch.images))
        for image in batch.step():
            ends[under_way.pop(image)] = batch.tokens(image)
    assert not batch.images and batch.room == 9 and max(sizes) >= 8 and len({*sizes}) > 4
    assert len(ends) + len(left) == sum(len(request["seeds"]) for request in requests) and len(left) > 5
    for number, request in enumerate(requests):
        expected = alone(model, request, weights)
        for place, tokens in enumerate(expected):
            if (number, place) not in left:
                assert torch.equal(ends[number, place], tokens), (number, place)


def test_a_wrong_row_would_be_noticed(tiny_pipeline, monkeypatch):
    """The negative control: rows that move without their lengths, or without their keys, change tokens."""
    model, requests = tiny_pipeline.transformer, mixed_requests(tiny_pipeline, 12)
    requests = [{**each, "sampling": Sampling()} for each in requests]
    leave, wrong = BatchCache.leave, []

    def forgetful(self, row):
        self._whole[:, self.rows - 1] = 0
        leave(self, row)

    monkeypatch.setattr(BatchCache, "leave", forgetful)
    batch = ContinuousBatch(model, max_images=4, window=1)
    under_way = {}

    def step():
        for image in batch.step():
            where, place = under_way.pop(image)
            wrong.append(not torch.equal(batch.tokens(image), alone(model, requests[where], "auto")[place]))

    for number, request in enumerate(requests):
        while batch.room < len(request["seeds"]):
            step()
        step()
        under_way |= {image: (number, place) for place, image in enumerate(join(batch, request))}
    assert any(wrong)


def test_a_call_reads_all_rows_and_guesses_save_calls(tiny_pipeline, monkeypatch):
    if not is_available(tiny_pipeline.transformer):
        pytest.fail("the compiled step is missing on this machine")
    rows, extend = [], NativeLlamaGen.extend_tree

    def counted(self, tokens, *rest):
        rows.append(tuple(tokens.shape))
        return extend(self, tokens, *rest)

    monkeypatch.setattr(NativeLlamaGen, "extend_tree", counted)
    request = {**mixed_requests(tiny_pipeline, 1)[0], "guidance_scale": 2.0, "sampling": Sampling(0.0)}
    calls = []
    for window in (1, 8):
        rows.clear()
        batch = ContinuousBatch(tiny_pipeline.transformer, max_images=8, window=window)
        images = [*join(batch, request), *join(batch, {**request, "guidance_scale": 1.0})]
        while batch.images:
            batch.step()
        assert rows[0] == (3 * len(images) // 2, window)
        assert {image.guessed for image in images} == {window > 1}
        calls.append(len(rows))
    assert calls[0] == 15 > calls[1]


def test_the_fastest_width_is_found_by_real_calls():
    widths = Widths([1, 2, 3, 4, 6, 8], 8)
    cost = {2: 1.0, 3: 1.1, 4: 1.2, 6: 2.0, 1: 0.9, 8: 4.0}
    taken = []
    for _ in range(20):
        taken.append(widths.choose(4))
        widths.add(4, taken[-1], cost[taken[-1]])
    assert taken[:3] == [2, 2, 2] and {*taken[15:]} == {4} and 8 not in taken
    assert widths.choose(3) == 4 and widths.choose(16) == 1 and Widths([1, 2], 8).choose(1) == 2


def test_other_dtypes_guess_only_where_all_allow_it(tiny_pipeline):
    model = tiny_pipeline.transformer
    request = mixed_requests(tiny_pipeline, 1)[0]
    batch = ContinuousBatch(model, max_images=8, window=4)
    join(batch, request, guesses=False)
    assert batch._width() == 4
    batch._exact = False
    assert batch._width() == 1
    batch.images = [image for image in join(batch, request)]
    assert batch._width() == 4


def test_a_class_conditional_model_joins_too(tiny_class_pipeline):
    model = tiny_class_pipeline.transformer
    batch, found = ContinuousBatch(model, max_images=3), {}
    for label in (3, 7, 1):
        condition = {"class_labels": torch.tensor([label])}
        [image] = batch.join(
            condition, generators=[torch.Generator().manual_seed(label)], sampling=Sampling(), guidance_scale=2.0
        )
        found[image] = label
        assert not batch.step()
    while batch.images:
        for image in batch.step():
            label = found[image]
            request = {"condition": {"class_labels": torch.tensor([label])}, "seeds": [label], "guidance_scale": 2.0}
            assert torch.equal(batch.tokens(image), alone(model, {**request, "sampling": Sampling()}, "auto")[0])


def test_a_full_batch_refuses(tiny_pipeline):
    batch = ContinuousBatch(tiny_pipeline.transformer, max_images=1)
    request = {**mixed_requests(tiny_pipeline, 1)[0]}
    request["seeds"] = [1, 2]
    with pytest.raises(StudioError, match="room for 1"):
        join(batch, request)
    with pytest.raises(StudioError, match="max_images"):
        ContinuousBatch(tiny_pipeline.transformer, max_images=0)
    with pytest.raises(StudioError, match="window"):
        ContinuousBatch(tiny_pipeline.transformer, max_images=1, window=17)


def test_rows_that_leave_a_cache_leave_the_others_as_they_are():
    sizes = {"num_layers": 2, "num_kv_heads": 1, "max_length": 6, "head_dim": 2}
    batch = BatchCache(**sizes, rows=4)
    from studio.models.kv_cache import TreeCache

    rows = []
    for number in range(4):
        one = TreeCache(**{**sizes, "max_length": 3}, rows=1)
        one.mask_prefix(torch.tensor([[number > 1, True]]))
        one.advance(2)
        one.store[:] = number + 1
        batch.join(one)
        rows.append(number + 1)
    with pytest.raises(StudioError, match="holds 4 rows"):
        batch.join(one)
    for row, expected in ((1, [1, 4, 3]), (2, [1, 4]), (0, [4])):
        batch.leave(row)
        assert batch.rows == len(expected) == len(batch.lengths)
        assert batch.store[0, :, 0, 0, 1, 0].tolist() == expected
        assert batch.bias[:, 0, 0, 0].isinf().tolist() == [each <= 2 for each in expected]
    batch.leave(0)
    assert batch.rows == 0 and batch.length == 0
