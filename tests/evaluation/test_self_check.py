"""`studio doctor --check`: tiny models pass, wrong weights and errors of a device fail, and the exit code says so."""

import json

import pytest

from studio import backends
from studio.bench import self_check
from studio.bench.self_check import MOST_PIXEL_ERROR, Check, summary


@pytest.fixture(scope="module")
def checks(tiny_folder, tiny_class_folder):
    """The checks of two tiny pipelines on the CPU."""
    return list(self_check.self_check("cpu", [str(tiny_folder), str(tiny_class_folder)]))


def test_every_backend_and_decoding_of_tiny_models_passes(checks, tiny_folder, tiny_class_folder):
    assert [check.problem for check in checks] == [None] * len(checks)
    for folder, text in ((tiny_folder, {"text"}), (tiny_class_folder, set())):
        for dtype, names in (("float32", ("native", "packed", "plain")), ("bfloat16", ("plain",))):
            for backend in names:
                parts = {
                    check.part
                    for check in checks
                    if (check.model, check.dtype, check.backend) == (str(folder), dtype, backend)
                }
                assert parts >= {"pixels", "ar", "jacobi", "speculative", "lantern"} | text and "exact" not in parts
    plain = [check for check in checks if (check.dtype, check.backend) == ("float32", "plain")]
    assert all(check.agreement in (None, 1) and check.error in (None, 0) for check in plain)
    native = [check for check in checks if check.backend == "native"]
    assert 0 < max(check.error for check in native if check.part == "pixels") < MOST_PIXEL_ERROR["float32"]
    assert all(check.seconds > 0 and check.memory_mb > 0 for check in checks)


def test_other_weights_of_a_backend_are_found(tiny_folder, monkeypatch):
    """Controls: logits, states and pixels that differ by more than rounding."""
    decode, states = backends.NativeDecoder.forward, backends.NativeT5.__call__
    monkeypatch.setattr(backends.NativeDecoder, "forward", lambda self, features: decode(self, features) * 1.1)
    monkeypatch.setattr(backends.NativeT5, "__call__", lambda self, ids: states(self, ids) * 1.1)
    found = {(check.part, check.backend): check for check in self_check.self_check("cpu", [str(tiny_folder)])}
    for part in ("text", "pixels"):
        assert "the error is" in found[part, "native"].problem and found[part, "packed"].problem is None


def test_an_error_of_the_device_is_a_failed_check(tiny_class_folder, monkeypatch):
    def broken(self, features):
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(backends.NativeDecoder, "forward", broken)
    found = list(self_check.self_check("cpu", [str(tiny_class_folder)]))
    problems = {check.backend: check.problem for check in found if check.part == "pixels"}
    assert problems["native"] == "no kernel image is available" and problems["packed"] is None


@pytest.mark.parametrize(("problem", "code", "words"), [(None, 0, "All 1 checks passed"), ("off", 1, "1 of 1 checks")])
def test_the_command_ends_with_one_line_and_its_code(run, monkeypatch, problem, code, words):
    check = Check("tiny", "ar", "float32", "native", 0.5, 100.0, agreement=1.0, problem=problem)
    monkeypatch.setattr(self_check, "self_check", lambda device: [check])
    got, out, _ = run("doctor", "--check", "--device", "cpu")
    assert got == code and out.strip().splitlines()[-1].startswith(words) and "tiny" in out
    got, out, _ = run("doctor", "--check", "--device", "cpu", "--json")
    report = json.loads(out)
    assert got == code and report["ok"] == (code == 0) and report["summary"].startswith(words)
    [row] = report["checks"]
    assert row["ok"] == (problem is None) and row["model"] == "tiny" and report["versions"]["torch"]


def test_a_device_without_check_is_refused(run):
    code, _, err = run("doctor", "--device", "cpu")
    assert code == 2 and "--check" in err


def test_the_last_line_counts():
    good, bad = (Check("m", "ar", "float32", "plain", problem=problem) for problem in (None, "off"))
    assert summary([good, good], "cpu", 61.2) == "All 2 checks passed on cpu, in 61 s."
    assert summary([good, bad], "cuda", 5) == "1 of 2 checks failed on cuda, in 5 s."


def test_an_error_that_is_not_a_number_is_refused():
    check = Check("m", "pixels", "float32", "plain", error=float("nan"))
    self_check._refuse_above(check, 1.0)
    assert "nan" in check.problem
