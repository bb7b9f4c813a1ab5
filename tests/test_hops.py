"""The table of papers in docs/README.md: each names a file that cites the paper and holds the function."""

import ast
import re

import pytest

ROW = re.compile(r"^\| (.+?) \| (\d{4}\.\d{5}) \| `(.+?)` \| `(.+?)` \|$", re.MULTILINE)
HEAD = "| Paper | arXiv | File | Function |\n|---|---|---|---|\n"


def table(repository):
    """The lines of the table."""
    text = (repository / "docs" / "README.md").read_text(encoding="utf-8")
    return text.partition(HEAD)[2].partition("\n\n")[0].splitlines()


def rows(repository):
    return ROW.findall("\n".join(table(repository)))


def functions(source):
    """Names of all functions of a module, those of classes as Class.method."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def missing(repository, paper, number, file, function):
    """What a row says that is not so."""
    path = repository / file
    if not path.is_file():
        return f"{file} is not there"
    source = path.read_text(encoding="utf-8")
    if f"arXiv:{number}" not in (ast.get_docstring(ast.parse(source)) or ""):
        return f"the docstring of {file} does not cite {number} of {paper}"
    return None if function in functions(source) else f"{file} has no function {function}"


def test_every_paper_has_its_file_and_function(repository):
    found = rows(repository)
    assert len(found) == len(table(repository)) >= 20  # none is written so that it is not checked
    assert [problem for row in found if (problem := missing(repository, *row))] == []


@pytest.mark.parametrize("wrong", [{2: "studio/decoding/none.py"}, {1: "2410.03356"}, {3: "Relaxation.draw"}], ids=str)
def test_a_wrong_row_is_seen(repository, wrong):
    row = [wrong.get(place, value) for place, value in enumerate(rows(repository)[0])]
    assert missing(repository, *row)
