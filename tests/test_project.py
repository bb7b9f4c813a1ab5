"""Files around the package agree: extras, constraints, versions, and one check for every place that checks."""

import re
import tomllib
from pathlib import Path

import studio

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_dev_holds_every_other_extra_but_ray():
    extras = PROJECT["optional-dependencies"]
    [own] = [line for line in extras["dev"] if line.startswith(PROJECT["name"] + "[")]
    assert set(re.search(r"\[(.*)\]", own)[1].split(",")) == set(extras) - {"dev", "ray"}


def test_constraints_pin_every_dependency_and_name_no_index():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in wanted} - {PROJECT["name"]}
    assert not names - pinned
    assert "torch==2.13.0" in lines


def test_the_check_runs_lint_and_types_before_the_tests():
    assert re.search(r"^make lint$.*^make test$", read(".ci/run"), re.M | re.S)
    lint = re.search(r"^lint:.*?\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    assert "ruff check" in lint and "ruff format --check" in lint and "types" in lint
    assert "run: .ci/run" in read(".github/workflows/check.yml")


def test_versions_agree():
    assert f"\n## {studio.__version__}" in read("CHANGELOG.md")
    assert f"\nversion: {studio.__version__}\n" in read("CITATION.cff")
