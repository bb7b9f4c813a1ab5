"""Files around the package agree: extras, constraints, versions, and one check for every place that checks."""

import ast
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


def public_functions(tree, where=""):
    """`(name, what has no annotation)` of a module's public functions and of the public methods of public classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{where}{node.name}.")
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
            continue
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [each.arg for each in arguments if each and each.arg not in ("self", "cls") and each.annotation is None]
        yield where + node.name, bare + (["return"] if node.returns is None and node.name != "__init__" else [])


def test_public_functions_are_annotated():
    found = {
        f"{path.relative_to(ROOT)} {name}": bare
        for folder in ("studio", "pipelines", "tokenizers", "ui")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, bare in public_functions(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(found) > 1500
    assert {name: bare for name, bare in found.items() if bare} == {}


def test_a_function_without_annotations_is_seen():
    found = dict(public_functions(ast.parse("class A:\n    def f(self, x): ...\n    def _g(self, x): ...\n")))
    assert found == {"A.f": ["x", "return"]}
