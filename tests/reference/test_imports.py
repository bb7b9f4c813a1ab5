"""Plain loops and the authors' own rules are there to compare with: only benchmarks and tests import them."""

import ast

import pytest

MAY = ("studio/reference/", "studio/bench/")


def importers(repository, module):
    """Files of the package, outside `MAY`, that import a module or something below it."""
    found = []
    for folder in ("studio", "pipelines", "tokenizers", "ui"):
        for path in sorted((repository / folder).rglob("*.py")):
            name = path.relative_to(repository).as_posix()
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            if not name.startswith(MAY) and any(f"{each}.".startswith(f"{module}.") for each in modules):
                found.append(name)
    return found


def test_nothing_else_imports_the_references(repository):
    assert importers(repository, "studio.reference") == []


@pytest.mark.parametrize("module", ["studio.decoding.lantern", "studio.decoding.registry"])
def test_what_is_imported_is_seen(repository, module):
    assert importers(repository, module)
