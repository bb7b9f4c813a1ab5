"""The saved state: read back as it was, whole or not there, and never executed."""

import json
import pickle
import shutil
import sys

import pytest
import torch

from studio.checkpoints.bundled import sha256
from studio.errors import StudioError
from studio.training import state
from studio.training.state import has_state, load_state, save_state


def save(out, step, size=3):
    tensors = {
        "model.safetensors": {"a.weight": torch.full((size,), float(step)), "count": torch.tensor(step)},
        "optimizers.safetensors": {"0/step/a.weight": torch.tensor(1.5)},
    }
    save_state(out, step, tensors, {"loss": 0.1 + step, "seconds": 2.0})


def assert_is(loaded, step):
    assert loaded[0] == step and loaded[2] == {"loss": 0.1 + step, "seconds": 2.0}
    model = loaded[1]["model.safetensors"]
    assert model["a.weight"].tolist() == [step] * 3 and model["count"].item() == step
    assert loaded[1]["optimizers.safetensors"]["0/step/a.weight"].item() == 1.5


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_it_is_read_back_and_the_last_two_are_kept(tmp_path):
    assert not has_state(tmp_path) and load_state(tmp_path) is None and load_state(tmp_path / "none") is None
    for step in (1, 2, 10):
        save(tmp_path, step)
        assert_is(load_state(tmp_path), step)
    assert names(tmp_path) == ["state-000000002", "state-000000010"] and has_state(tmp_path)


def test_there_are_safetensors_and_json_without_paths(tmp_path):
    save(tmp_path, 1)
    files = list((tmp_path / "state-000000001").iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes() and b"studio." not in file.read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_the_state_before_a_damaged_one_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "state-000000002" / name
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    file.unlink() if damage == "missing" else file.write_bytes(data if damage == "flipped" else data[:-3])
    assert_is(load_state(tmp_path), 1)


def test_no_bit_of_the_index_can_flip_silently(tmp_path):
    """A flip in every byte in turn: what is loaded is the state before, or equal to what was saved."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "state-000000002" / "state.json"
    whole, passed_over = file.read_bytes(), 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        loaded = load_state(tmp_path)
        assert_is(loaded, loaded[0])
        passed_over += loaded[0] == 1
    assert passed_over > len(whole) / 2


def test_all_damaged_is_one_sentence(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"state-{step:09d}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(StudioError, match="Every saved state in .* is damaged: start anew with another --out."):
        load_state(tmp_path)


@pytest.mark.parametrize("index", ["[]", "null", "{}", '{"format": 1, "files": []}', "[" * 100_000])
def test_an_index_of_another_form_is_damaged(tmp_path, index):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "state-000000002" / "state.json").write_text(index)
    assert_is(load_state(tmp_path), 1)


def test_a_state_of_another_format_is_told(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(state, "FORMAT", 2)
    with pytest.raises(StudioError, match=r"another version of Studio \(format 1\)"):
        load_state(tmp_path)


def test_an_index_without_its_own_checksum_is_read(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "state-000000001" / "state.json"
    index = json.loads(file.read_text())
    del index["checksum"]
    file.write_text(json.dumps(index))
    assert_is(load_state(tmp_path), 1)


def test_damaged_later_states_make_room(tmp_path):
    """They would otherwise count among the last two that are kept."""
    for step in (1, 8, 9):
        save(tmp_path, step)
    for step in (8, 9):
        (tmp_path / f"state-{step:09d}" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert names(tmp_path) == ["state-000000003"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["state-000000003", "state-000000004"]


def test_a_damaged_state_is_written_again_and_a_whole_one_is_not(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "state-000000001" / "model.safetensors"
    before = file.stat().st_mtime_ns
    save(tmp_path, 1)
    assert file.stat().st_mtime_ns == before
    file.write_bytes(b"")
    save(tmp_path, 1)
    assert_is(load_state(tmp_path), 1)


class Killed(BaseException):
    """Nothing of the program runs after it, as after SIGKILL."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_at_any_moment_of_a_swap_loses_nothing(tmp_path, monkeypatch, again):
    """In front of every call that changes the disk, in turn; a save that is not killed is the control."""
    new, moments = (2 if not again else 1), 0
    calls = [(state.os, "fsync"), (state.Path, "rename"), (state.Path, "mkdir"), (state.shutil, "rmtree"),
             (state, "save_file"), (state.Path, "write_text")]  # fmt: skip
    while True:
        out = tmp_path / str(moments)
        save(out, 0)
        save(out, 1)
        left = [moments]

        def counted(real, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in calls:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                save(out, new)
                survived = True
            except Killed:
                survived = False
        loaded = load_state(out)
        assert loaded[0] in (1, new)
        assert_is(loaded, loaded[0])
        save(out, new + 1)
        assert_is(load_state(out), new + 1)
        assert "state.part" not in names(out)
        if survived:
            break
        moments += 1
    assert moments > 8 or again


def test_a_full_disk_is_one_sentence_and_keeps_the_state_before(tmp_path, full_disk):
    save(tmp_path, 1)
    with full_disk(20_000), pytest.raises(StudioError, match="state cannot be written to .*: free some space") as error:
        save(tmp_path, 2, size=100_000)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["state-000000001"]
    assert_is(load_state(tmp_path), 1)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_what_an_attacker_leaves_is_not_executed(tmp_path, monkeypatch):
    """A pickle under every name that some trainer reads, and a module beside it; loading the pickle is the control."""
    marker, attack = tmp_path / "executed", pickle.dumps(Hostile(tmp_path / "executed"))
    out = tmp_path / "run"
    save(out, 1)
    save(out, 2)
    newest = out / "state-000000002"
    for name in ("model.safetensors", "pytorch_model.bin", "custom_checkpoint_0.pkl", "optimizer.bin", "random.pkl"):
        (newest / name).write_bytes(attack)
    (newest / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    index = json.loads((newest / "state.json").read_text())
    index["files"] = {**index["files"], "model.safetensors": sha256(newest / "model.safetensors")}
    index["values"] |= {"__class__": "evil_module.Evil", "_target_": "evil_module.Evil"}
    del index["checksum"]
    (newest / "state.json").write_text(json.dumps(index))
    monkeypatch.chdir(newest)
    assert_is(load_state(out), 1)
    assert not marker.exists() and "evil_module" not in sys.modules
    pickle.loads(attack).close()
    assert marker.exists()


def test_a_state_names_no_files_elsewhere(tmp_path):
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    folder = tmp_path / "run" / "state-000000002"
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    for name in (str(tmp_path / "outside.safetensors"), "../../outside.safetensors"):
        index = json.loads((folder / "state.json").read_text())
        index["files"][name] = sha256(tmp_path / "outside.safetensors")
        index.pop("checksum", None)
        (folder / "state.json").write_text(json.dumps(index))
        assert_is(load_state(tmp_path / "run"), 1)
