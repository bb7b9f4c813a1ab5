"""Guards of the layout: folders at the root that must not hide Hugging Face's packages, and who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMESPACES = ("pipelines", "tokenizers", "ui")
LEVELS = {
    "ui": 8,
    "cli": 8,
    "commands": 8,
    "bench": 7,
    "images": 6,
    "saving": 6,
    "training": 6,
    "evaluation": 6,
    "checkpoints": 5,
    "pipelines": 4,
    "reference": 4,
    "decoding": 3,
    "backends": 2,
    "tokenizers": 1,
    "models": 1,
    "pruning": 1,
    "processes": 0,
}
"""A package imports itself and packages of lower levels. `cli`: the other modules right under studio/."""
MAY_ALSO = {
    ("cli", "commands"),
    ("commands", "cli"),
    ("commands", "ui"),
    ("commands", "data"),
    ("commands", "bench"),
    ("ui", "bench"),
    ("bench", "data"),
    ("training", "data"),
    ("evaluation", "data"),
    ("training", "evaluation"),
}
FOUNDATIONS = {"checks", "errors", "files", "images"}
PUBLIC = {
    "studio",
    "studio.errors",
    *FOUNDATIONS,
    "bench",
    "checkpoints",
    "training",
    "evaluation",
    "images",
    "processes",
    "saving",
}
"""What the surfaces may use, as a user would: `studio.__all__`, and the public modules of these packages."""


def sources():
    """Every Python file that is ours, tests left out."""
    for folder in ("studio", *NAMESPACES):
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield from sorted(ROOT.glob("*.py"))


def package_of(path):
    """The part a file belongs to: a key of LEVELS, "data", or the name of a module right under studio."""
    parts = path.relative_to(ROOT).parts
    if parts[0] in NAMESPACES:
        return parts[0]
    if parts[0] != "studio":
        return "ui"
    if len(parts) > 2:
        return parts[1]
    if parts[1] == "__init__.py":
        return "studio"
    return path.stem if path.stem in {*FOUNDATIONS, "processes", "saving"} else "cli"


def target_of(module):
    """The part an absolute import `studio...` reaches."""
    parts = module.split(".")
    if len(parts) == 1:
        return "studio"
    if parts[1] in {*LEVELS, "data", *FOUNDATIONS}:
        return parts[1]
    return "cli"


def imports(path):
    """All imports as `(module, names)`, without those under `if TYPE_CHECKING`; relative ones start with a dot."""
    pending = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = "." * node.level + (node.module or "")
            if module == "studio":
                yield from ((f"studio.{name}", []) for name in names if name in LEVELS)
                names = [name for name in names if name not in LEVELS]
            if names:
                yield module, names
        pending += ast.iter_child_nodes(node)


def own_modules():
    return {folder: {path.stem for path in (ROOT / folder).glob("*.py")} for folder in NAMESPACES}


@pytest.mark.parametrize("folder", NAMESPACES)
def test_root_folders_have_no_init(folder):
    assert not list((ROOT / folder).rglob("__init__.py")), "it would hide Hugging Face's package of that name"


@pytest.mark.parametrize("folder", ["pipelines", "tokenizers"])
def test_pipelines_and_tokenizers_are_flat(folder):
    assert not [path for path in (ROOT / folder).glob("*/") if path.is_dir() and path.name != "__pycache__"]


def test_the_app_has_at_most_four_files_at_its_top():
    assert len([path for path in (ROOT / "ui").iterdir() if path.is_file()]) <= 4


def test_the_reference_code_is_for_tests_and_benchmarks_alone():
    users = {
        package_of(path) for path in sources() for module, _ in imports(path) if module.startswith("studio.reference")
    }
    assert users <= {"reference", "bench"}, "reference=True of a method stands beside the method"


def test_tests_have_no_init():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_hugging_face_packages_are_found_from_the_root():
    code = "from tokenizers import Tokenizer; from transformers import T5EncoderModel"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*sources()], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute_and_point_down(path):
    here, ours = package_of(path), own_modules()
    for module, names in imports(path):
        where = f"{path.relative_to(ROOT)}: {module}"
        top, *rest = module.split(".")
        assert top, f"{where}: relative import"
        assert top not in {"pipelines", "ui"}, f"{where}: say studio.{module}"
        assert top != "tokenizers" or not {*rest, *names} & ours["tokenizers"], f"{where}: say studio.{module}"
        if top != "studio" or here == "studio":
            continue
        target = target_of(module)
        if target in {here, *FOUNDATIONS, "studio"}:
            continue
        assert here not in {*FOUNDATIONS, "data"}, f"{where}: {here} imports nothing of ours"
        if (here, target) not in MAY_ALSO:
            assert target != "data", f"{where}: data is for training, evaluation, benchmarks and the command line"
            assert LEVELS[target] < LEVELS[here], f"{where}: {here} must not import {target}"


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if package_of(path) in {"ui", "cli", "commands"}],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_surfaces_use_only_the_public_api(path):
    import studio

    here = package_of(path)
    for module, names in imports(path):
        if module.split(".")[0] != "studio" or module == "studio.errors":
            continue
        where = f"{path.relative_to(ROOT)}: {module}"
        if module == "studio":
            assert set(names) <= set(studio.__all__), f"{where}: {names} are not all public"
            continue
        target = target_of(module)
        assert target == here or (here, target) in MAY_ALSO or target in PUBLIC, f"{where} is not public"
        if target != here:
            private = [name for name in (*module.split("."), *names) if name.startswith("_")]
            assert not private, f"{where}: {private} is private"


def test_public_names_resolve():
    import studio

    for name in studio.__all__:
        assert getattr(studio, name) is not None
    assert set(studio.__all__) == {*studio._EXPORTS, "__version__"}


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in sources() if path.parent != ROOT}
    names = {
        ".".join(path.parts) if path.parts[0] == "studio" else ".".join(("studio", *path.parts)) for path in folders
    }
    assert names == set(settings["packages"])
    assert {name: path for name, path in settings["package-dir"].items() if name != "studio"} == {
        ".".join(("studio", *path.parts)): path.as_posix() for path in folders if path.parts[0] != "studio"
    }


def test_versions_of_gradio_agree():
    listed = re.findall(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(listed) == 1 and listed[0].startswith("6.")
    assert "gradio>=6.31,<7" in project["dependencies"]
