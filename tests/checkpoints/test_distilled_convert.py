"""Released students become folders; files that are something else are refused."""

import argparse

import pytest
import torch

from studio import LlamaGen, StudioError
from studio.checkpoints.distilled import convert_distilled, student_from_state_dict
from studio.models.distilled import DistilledStudent
from studio.models.distilled_var import DistilledVAR
from studio.models.var import VAR


@pytest.fixture
def student():
    torch.manual_seed(0)
    teacher = LlamaGen(vocab_size=24, dim=64, num_layers=2, num_heads=1, num_classes=5)
    return DistilledStudent.from_teacher(teacher, torch.randn(24, 4)).eval()


def test_the_averaged_weights_become_a_folder(student, tmp_path):
    other = {name: torch.zeros_like(weight) for name, weight in student.state_dict().items()}
    content = {"model": other, "ema": student.state_dict(), "args": argparse.Namespace(seed=0)}
    torch.save(content, tmp_path / "file.pt")
    folder = convert_distilled(tmp_path / "file.pt", tmp_path / "out")
    loaded = DistilledStudent.from_pretrained(folder)
    for name, weight in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    with pytest.raises(StudioError, match="exists"):
        convert_distilled(tmp_path / "file.pt", folder)


def test_a_student_of_var_becomes_a_folder(tmp_path):
    teacher = VAR(vocab_size=24, code_dim=4, depth=1, dim=32, num_heads=2, num_classes=5)
    student = DistilledVAR.from_teacher(teacher)
    computed = {"lvl_1L": torch.zeros(1, 681), "blocks.0.attn.zero_k_bias": torch.zeros(32)}
    content = {"trainer": {"ema_parameters": student.state_dict() | computed, "var_wo_ddp": {"a": torch.zeros(1)}}}
    torch.save(content, tmp_path / "file.pt")
    loaded = DistilledVAR.from_pretrained(convert_distilled(tmp_path / "file.pt", tmp_path / "out"))
    assert loaded.bounds[-1] == 680 and loaded.config.num_heads == 2
    for name, weight in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_refuses_other_files(student, tmp_path):
    with pytest.raises(StudioError, match="not a file"):
        convert_distilled(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(StudioError, match="checkpoint"):
        convert_distilled(tmp_path / "text.pt", tmp_path / "out")
    torch.save({"state_dict": student.state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(StudioError, match="no weights under"):
        convert_distilled(tmp_path / "plain.pt", tmp_path / "out")
    state = student.state_dict()
    state.pop("n_d_embed.weight")
    with pytest.raises(StudioError, match="1 missing"):
        student_from_state_dict(state)
    with pytest.raises(StudioError, match="it has no"):
        student_from_state_dict({"head.weight": torch.zeros(2, 2)})
