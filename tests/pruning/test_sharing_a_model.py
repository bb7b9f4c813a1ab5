"""One model, many users: wrappers, deep copies, and blocks of several threads and tasks at once."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from studio.pruning.api import prune, prune_inputs
from tests.pruning import tiny_models
from tests.pruning.tiny_families import ROWS, answer, tiny


def logits_when_pruned(model, inputs, keep):
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=keep)
    return model(**pruned).logits


@pytest.mark.parametrize(
    "given",
    ["the compiled model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("the model inside", "in place"))],
)
def test_a_compiled_model_is_pruned_in_the_block_alone(given):
    torch._dynamo.reset()
    model, inputs = tiny_models.Llava15().model, tiny("llava").prompt()
    plain, short = model(**inputs).logits, logits_when_pruned(model, inputs, 0.25)
    if given == "in place":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    for _ in range(2):
        with prune(model if given == "the model inside" else compiled, "divprune", keep=0.25) as record:
            torch.testing.assert_close(compiled(**inputs).logits, short)
            assert record.info.tokens_after == [9]
            assert compiled.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        torch.testing.assert_close(compiled(**inputs).logits, plain)
        torch.testing.assert_close(model(**inputs).logits, plain)
    assert not {"forward", "generate"} & set(model.__dict__)


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank update in its place, as PEFT injects it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


class Tuner(torch.nn.Module):
    """`LoraModel`: changes the layers of a model in place; what it lacks is the model's."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for module in [*model.modules()]:
            for name in ("q_proj", "k_proj"):
                if isinstance(getattr(module, name, None), torch.nn.Linear):
                    setattr(module, name, Adapter(getattr(module, name)))

    def forward(self, *arguments, **keywords):
        return self.model.forward(*arguments, **keywords)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Peft(torch.nn.Module):
    """`PeftModelForCausalLM`: calls through its tuner."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *arguments, **keywords):
        return self.base_model(*arguments, **keywords)

    def generate(self, *arguments, **keywords):
        return self.base_model.generate(*arguments, **keywords)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


@pytest.mark.parametrize("method", ["divprune", "hired"])
def test_adapters(method):
    torch.manual_seed(0)
    wrapped, inputs = Peft(tiny_models.Llava15().model), tiny("llava").prompt()
    plain = wrapped(**inputs).logits
    pruned, info = prune_inputs(wrapped, inputs, method, keep=0.25)
    short = wrapped(**pruned).logits
    with prune(wrapped, method, keep=0.25) as record:
        assert torch.equal(wrapped(**inputs).logits, short)
        assert torch.equal(wrapped.get_base_model()(**inputs).logits, short)
        assert wrapped.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert record.info.tokens_after == info.tokens_after == [9]
    assert torch.equal(wrapped(**inputs).logits, plain)


def test_a_deep_copy_made_inside_is_whole_and_independent():
    made, inputs = tiny_models.Llava15(), tiny("llava").prompt()
    model, plain = made.model, answer(made.model, inputs)
    with prune(model, "divprune", keep=0.25) as record:
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        same = answer(twin, inputs)
        assert record.info is None
        assert twin.forward.__self__ is twin and twin.generate.__self__ is twin
    assert torch.equal(same.sequences, plain.sequences) and torch.equal(same.logits[0], plain.logits[0])
    assert torch.equal(answer(twin, inputs).logits[0], plain.logits[0])
    with prune(twin, "divprune", keep=0.25) as record:
        answer(twin, inputs)
    assert record.info.tokens_after == [9]


def test_blocks_of_threads_overlap_in_any_order():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    expected = {keep: logits_when_pruned(model, inputs, keep) for keep in (0.25, 0.5)}
    plain, gates = model(**inputs).logits, [threading.Event() for _ in range(4)]
    found = {}

    def first():
        with torch.no_grad(), prune(model, "divprune", keep=0.25):
            gates[0].set(), gates[1].wait(20)
            found["first"] = model(**inputs).logits
        gates[2].set()

    def second():
        gates[0].wait(20)
        with torch.no_grad(), prune(model, "divprune", keep=0.5):
            gates[1].set(), gates[2].wait(20)
            found["second"] = model(**inputs).logits

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    gates[1].wait(20)
    assert torch.equal(model(**inputs).logits, plain), "a thread without a block"
    for thread in threads:
        thread.join()
    assert torch.equal(found["first"], expected[0.25]) and torch.equal(found["second"], expected[0.5])
    assert torch.equal(model(**inputs).logits, plain) and "forward" not in model.__dict__


def test_blocks_of_tasks_overlap():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    expected = {keep: logits_when_pruned(model, inputs, keep) for keep in (0.25, 0.5, 0.75)}
    plain = model(**inputs).logits

    async def ask(keep, wait):
        with prune(model, "divprune", keep=keep):
            await asyncio.sleep(wait)
            return model(**inputs).logits

    async def after(block_is_over):
        await block_is_over.wait()
        return model(**inputs).logits

    async def all_at_once():
        tasks = [asyncio.create_task(ask(keep, wait)) for keep, wait in ((0.25, 0.04), (0.5, 0.02), (0.75, 0.0))]
        await asyncio.sleep(0.01)
        between, over = model(**inputs).logits, asyncio.Event()
        with prune(model, "divprune", keep=0.5):
            heir = asyncio.create_task(after(over))
            await asyncio.sleep(0)
        over.set()
        return between, await heir, await asyncio.gather(*tasks)

    between, later, found = asyncio.run(all_at_once())
    assert torch.equal(between, plain), "a task without a block"
    assert torch.equal(later, plain), "a task that outlives the block it was made in"
    assert all(map(torch.equal, found, expected.values()))
    assert "forward" not in model.__dict__


def test_a_thread_with_the_context_of_a_block_is_inside():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    with prune(model, "divprune", keep=0.25) as record:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: model(**inputs),))
        thread.start(), thread.join()
    assert record.info.tokens_after == [9]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["hired", "globalcom2"])
def test_threads_score_their_own_image(family, method):
    made, numbers = tiny(family), (0, 1, 2)
    prompts = [made.prompt(((number,),)) for number in numbers]
    expected = [prune_inputs(made.model, prompt, method, keep=0.3)[1].kept[0] for prompt in prompts]
    together = threading.Barrier(len(numbers))

    def kept(number):
        found = []
        for _ in range(10):
            together.wait(120)
            with torch.no_grad():
                found.append(prune_inputs(made.model, prompts[number], method, keep=0.3)[1].kept[0])
        return found

    with ThreadPoolExecutor(len(numbers)) as pool:
        for number, found in enumerate(pool.map(kept, numbers)):
            assert all(torch.equal(places, expected[number]) for places in found), number


def test_features_in_place_of_ids_are_refused():
    from studio.errors import StudioError

    model, inputs = tiny("llava").model, tiny("llava").prompt(ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with prune(model, "divprune", keep=0.25), pytest.raises(StudioError, match="input_ids"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_a_call_between_the_two_notes_of_a_hook_is_left_alone():
    """torch notes a hook before it notes that the hook takes keywords: what another thread calls then brings none."""
    from studio.pruning.blocks import with_keywords

    seen = []
    before, after = (with_keywords(lambda *given: seen.append(len(given)), given) for given in (2, 3))
    layer = torch.nn.Linear(2, 2)
    for hook, register in ((before, layer.register_forward_pre_hook), (after, layer.register_forward_hook)):
        handle = register(hook)  # as noted so far
        layer(torch.zeros(1, 2))
        handle.remove()
    assert seen == []
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, with_kwargs=True)
    layer(torch.zeros(1, 2))
    assert seen == [3, 4]
