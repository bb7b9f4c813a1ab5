"""VAR's student: weights from its teacher, attention, saving."""

import pytest
import torch

from studio import StudioError
from studio.models.distilled_var import DistilledVAR
from studio.models.var import VAR, bounds_of, level_of

SIZES = {"vocab_size": 24, "code_dim": 4, "depth": 2, "dim": 32, "num_heads": 2, "num_classes": 6}
SCALES = (1, 2, 3)
LABELS = torch.tensor([1, 5, 0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return VAR(**SIZES, scales=SCALES).eval()


@pytest.fixture(scope="module")
def student(teacher):
    torch.manual_seed(1)
    return DistilledVAR.from_teacher(teacher, split=2).eval()


def test_positions():
    assert bounds_of(SCALES) == (0, 1, 5, 14)
    assert level_of(SCALES).tolist() == [0] + [1] * 4 + [2] * 9


def test_starts_from_the_teacher(teacher, student):
    taken, given = student.state_dict(), teacher.state_dict()
    for name, weight in given.items():
        if name not in ("lvl_embed.weight", "pos_1LC"):
            assert torch.equal(taken[name], weight), name
    assert torch.equal(taken["lvl_embed.weight"][[0, 2, 3]], given["lvl_embed.weight"])
    assert torch.equal(taken["pos_1LC"][:, [0, *range(2, 15)]], given["pos_1LC"])
    assert student.config.split == 2


@torch.no_grad()
def test_a_position_sees_itself_and_coarser_scales(student):
    x, position = random(3, 14, 4), 3
    before = student(x, 1, LABELS)
    x[:, position] += 1
    for old, new in zip(before, student(x, 1, LABELS)):
        changed = (old != new).any(dim=-1).all(dim=0)
        assert changed.nonzero()[:, 0].tolist() == [position, *range(5, 14)]


@torch.no_grad()
def test_a_shorter_call_equals_the_start_of_a_long_one(student):
    x = random(3, 14, 4)
    for long, short in zip(student(x, 1, LABELS), student(x[:, :5], 1, LABELS)):
        torch.testing.assert_close(long[:, :5], short)


@torch.no_grad()
def test_rows_may_know_different_numbers_of_scales(student):
    x, known = random(3, 14, 4), torch.tensor([0, 1, 3])
    together = student(x, known, LABELS)
    for row, count in enumerate(known.tolist()):
        for whole, single in zip(together, student(x[row : row + 1], count, LABELS[row : row + 1])):
            torch.testing.assert_close(whole[row : row + 1], single)
    assert not torch.equal(student(x, 0, LABELS)[1], student(x, 1, LABELS)[1])


@torch.no_grad()
def test_is_saved_and_loaded(student, tmp_path):
    student.save_pretrained(tmp_path)
    x, loaded = random(3, 14, 4), DistilledVAR.from_pretrained(tmp_path)
    assert loaded.bounds == student.bounds
    for saved, again in zip(student(x, 1, LABELS), loaded(x, 1, LABELS)):
        assert torch.equal(saved, again)


def test_the_teacher_drops_classes_in_training_only(teacher):
    x = random(3, 13, 4)
    assert torch.equal(teacher(x, LABELS), teacher(x, LABELS))
    dropped = teacher(x, LABELS, torch.tensor([True, False, True]))
    assert torch.equal(dropped[1], teacher(x, LABELS)[1]) and not torch.equal(dropped[0], teacher(x, LABELS)[0])


@pytest.mark.parametrize("model", [VAR, DistilledVAR])
def test_refuses_heads_that_do_not_fit(model):
    with pytest.raises(StudioError, match="heads"):
        model(**{**SIZES, "num_heads": 5}, scales=SCALES)
