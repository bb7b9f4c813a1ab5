"""The student: weights from its teacher, attention, known positions."""

import pytest
import torch

from studio import LlamaGen, StudioError
from studio.models.distilled import DistilledStudent

SIZES = {"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher(**changed):
    torch.manual_seed(0)
    condition = {} if "caption_dim" in changed else {"num_classes": 10}
    model = LlamaGen(**{**SIZES, **condition, **changed})
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def student(**changed):
    torch.manual_seed(1)
    model = DistilledStudent.from_teacher(teacher(**changed), random(48, 5)).eval()
    torch.nn.init.normal_(model.n_d_embed.weight)
    return model


def labels():
    return {"class_labels": torch.tensor([1, 7, 3])}


def captions():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    return {"captions": random(3, 3, 16, seed=1), "caption_mask": mask}


def test_starts_from_the_teacher():
    model, codebook = teacher(prefix_rope="identity", rope_base=500.0), random(48, 5)
    torch.nn.init.normal_(model.tok_embeddings.weight)
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(codebook @ random(5, 32, seed=3) + random(32, seed=4))
    made = DistilledStudent.from_teacher(model, codebook, split=7)
    assert (made.config.prefix_rope, made.config.rope_base, made.config.split) == ("identity", 500.0, 7)
    for name, weight in model.state_dict().items():
        if name != "tok_embeddings.weight":
            assert torch.equal(made.state_dict()[name], weight), name
    torch.testing.assert_close(made.tok_embeddings(codebook), model.tok_embeddings.weight, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_region_conditioning_reaches_each_position_of_its_cell():
    model = student(caption_dim=16, caption_length=5, plan_size=2)
    torch.nn.init.normal_(model.plan_embeddings.weight)
    for layer in model.layers:
        for weight in (layer.attention.wo.weight, layer.feed_forward.w2.weight):
            torch.nn.init.zeros_(weight)
    vectors, given = random(1, 16, 5, seed=2), random(1, 5, 16, seed=3)
    before, other = model.hidden_states(vectors, 0, captions=given)[0], given.clone()
    other[:, 2] += 1
    changed = (model.hidden_states(vectors, 0, captions=other)[0] != before).any(dim=2).view(4, 4)
    assert changed[:2, 2:].all() and changed.sum() == 4


def test_may_keep_fewer_layers():
    model = teacher(num_layers=5)
    for count, kept in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4])):
        made = DistilledStudent.from_teacher(model, random(48, 5), num_layers=count)
        assert made.config.num_layers == count
        for new, old in zip(made.layers, kept, strict=True):
            for mine, theirs in zip(new.parameters(), model.layers[old].parameters()):
                assert torch.equal(mine, theirs)
    with pytest.raises(StudioError, match="from 1 to 5"):
        DistilledStudent.from_teacher(model, random(48, 5), num_layers=6)


def test_a_position_sees_itself_and_what_is_before():
    model, x = student(), random(3, 16, 5)
    before = model(x, 4, **labels())
    x[:, 9] += 1
    for old, new in zip(before, model(x, 4, **labels())):
        assert torch.equal(old[:, :9], new[:, :9])
        assert (old[:, 9:] != new[:, 9:]).any(dim=-1).all()


def test_a_shorter_call_equals_the_start_of_a_long_one():
    model, x = student(), random(3, 16, 5)
    for long, short in zip(model(x, 4, **labels()), model(x[:, :6], 4, **labels())):
        torch.testing.assert_close(long[:, :6], short)


@pytest.mark.parametrize("condition", [labels, captions])
def test_rows_may_know_different_numbers_of_tokens(condition):
    model = student() if condition is labels else student(caption_dim=16, caption_length=3)
    x, known = random(3, 16, 5), torch.tensor([0, 5, 16])
    together = model(x, known, **condition())
    for row, count in enumerate(known.tolist()):
        own = {name: value[row : row + 1] for name, value in condition().items()}
        for whole, single in zip(together, model(x[row : row + 1], count, **own)):
            torch.testing.assert_close(whole[row : row + 1], single)
    other = model(x, torch.tensor([1, 5, 16]), **condition())
    assert not torch.equal(together[1][0], other[1][0]) and torch.equal(together[1][1:], other[1][1:])


def test_padding_of_a_caption_does_not_matter():
    model, x = student(caption_dim=16, caption_length=3), random(3, 16, 5)
    changed = captions()
    changed["captions"] = torch.where(changed["caption_mask"][:, :, None], changed["captions"], 9.0)
    for plain, padded in zip(model(x, 2, **captions()), model(x, 2, **changed)):
        torch.testing.assert_close(plain, padded)


def test_is_saved_and_loaded(tmp_path):
    model, x = student(), random(3, 16, 5)
    model.save_pretrained(tmp_path)
    loaded = DistilledStudent.from_pretrained(tmp_path)
    for saved, again in zip(model(x, 3, **labels()), loaded(x, 3, **labels())):
        assert torch.equal(saved, again)


def test_refuses_what_does_not_fit():
    with pytest.raises(StudioError, match="codes"):
        DistilledStudent.from_teacher(teacher(), random(47, 5))
    with pytest.raises(StudioError, match="split"):
        DistilledStudent(**SIZES, num_classes=3, split=17)
    with pytest.raises(StudioError, match="exactly one"):
        DistilledStudent(**SIZES)
    with pytest.raises(StudioError, match="16 tokens"):
        student()(random(3, 17, 5), 0, **labels())
    with pytest.raises(StudioError, match="class-conditional"):
        student()(random(3, 16, 5), 0, **captions())
