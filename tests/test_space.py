"""`studio space`: what a Space holds, and that it runs with nothing but its requirements."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from gradio_client import Client
from PIL import Image

from studio import StudioError, cli, space
from studio.checkpoints.bundled import bundled_folder

ROOT = Path(__file__).parent.parent
SECONDS = 60


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A Space with the bundled model; do not change its files."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    space.build_space(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a command in an empty folder; return `(exit code, JSON document)`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*map(str, arguments), "--json"])
        return stopped.value.code, json.loads(capfd.readouterr().out)

    return call


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_front_matter_says_what_hugging_face_asks(built):
    header = front_matter(built)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert header["sdk"] == "gradio" and header["sdk_version"] == pinned["gradio"]
    assert (built / header["app_file"]).is_file() and header["license"] == "apache-2.0"
    assert header["title"] == "Studio" and header["models"] == [] and len(header["short_description"]) <= 60
    assert isinstance(header["python_version"], str) and header["python_version"].startswith("3.")


def test_requirements_are_pinned_and_nothing_is_installed_from_the_folder(built):
    lines = (built / "requirements.txt").read_text().splitlines()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines and set(lines) <= set(pinned) and len(lines) == len(set(lines)) >= 10


def test_the_package_is_whole_under_its_import_names(built):
    for folder, target in {"studio": "studio", **{name: f"studio/{name}" for name in space.OUTSIDE}}.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".c", ".h", ".css", ".png", ".toml"}:
                assert (built / target / path.relative_to(ROOT / folder)).is_file(), path
    weights = sorted(path.name for path in (built / "studio/checkpoints/bundled").iterdir() if path.is_dir())
    assert {"emoji-ar", "emoji-vq"} <= set(weights) and "emoji-judge" not in weights
    assert not list(built.rglob("__pycache__")) and not list(built.rglob("*.zip"))


def test_the_app_leaves_host_and_port_to_gradio(built):
    text = (built / "app.py").read_text()
    assert "server_port" not in text and "server_name" not in text and "7860" not in text


def test_a_model_folder_is_copied_and_a_hub_id_is_named(tmp_path, tiny_folder):
    space.build_space(tmp_path / "a", model=str(tiny_folder), title='Mine: "tiny"')
    assert (tmp_path / "a/model/model_index.json").is_file() and 'MODEL = "model"' in (
        tmp_path / "a/app.py"
    ).read_text()
    assert front_matter(tmp_path / "a")["title"] == 'Mine: "tiny"'
    space.build_space(tmp_path / "b", model="owner/name")
    assert front_matter(tmp_path / "b")["models"] == ["owner/name"]
    assert 'MODEL = "owner/name"' in (tmp_path / "b/app.py").read_text()


def test_an_empty_folder_is_filled_and_another_is_left_alone(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, document = run("space", "build", "empty")
    assert code == 0 and document["files"] == sum(path.is_file() for path in (tmp_path / "empty").rglob("*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    code, document = run("space", "build", "full")
    assert code == 2 and "not empty" in document["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_neighbour_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "space.part").mkdir()
    (tmp_path / "space.part/notes.txt").write_text("mine")
    space.build_space(tmp_path / "space")
    assert (tmp_path / "space.part/notes.txt").read_text() == "mine"


def test_the_current_folder_is_refused(run, tmp_path):
    code, document = run("space", "build", ".")
    assert code == 2 and "current folder" in document["error"] and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StudioError, match="No space left"):
        space.build_space(tmp_path / "space")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["emoji-vq", "emoji-judge", "emoji-ra", "no such"])
def test_what_cannot_draw_is_refused(tmp_path, model):
    with pytest.raises(StudioError, match="emoji-ar"):
        space.build_space(tmp_path / "space", model=model)
    assert not list(tmp_path.iterdir())


def test_a_model_of_classes_keeps_their_names(tmp_path, tiny_class_folder):
    space.build_space(tmp_path / "space", model=str(tiny_class_folder))
    labels = json.loads((tmp_path / "space/model/model_index.json").read_text())["id2label"]
    assert labels["3"] == "golden retriever"


def test_without_constraints_a_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "ROOT", tmp_path)
    with pytest.raises(StudioError, match="checkout"):
        space.build_space(tmp_path / "space")


def test_a_dry_run_lists_what_would_be_pushed(run, tmp_path, built):
    code, document = run("space", "push", "owner/studio", "--dry-run")
    sizes = {str(path.relative_to(built)): path.stat().st_size for path in built.rglob("*") if path.is_file()}
    assert code == 0 and document["url"] is None
    assert {file["path"]: file["bytes"] for file in document["files"]} == sizes
    assert document["bytes"] == sum(sizes.values()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["studio", "a/b/c", "owner/na me", ""])
def test_a_wrong_name_is_refused(run, name):
    code, document = run("space", "push", name, "--dry-run")
    assert code == 2 and "owner/name" in document["error"]


def test_a_push_without_network_says_so(run):
    code, document = run("space", "push", "owner/studio")
    assert code == 2 and "owner/studio could not be uploaded" in document["error"]


def bare_python():
    """A Python that sees the installed libraries, not this project: `-S` leaves out its editable install."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    return [sys.executable, "-S"], {**variables, "PYTHONPATH": os.pathsep.join(sorted(libraries))}


def test_the_bare_python_sees_no_studio(tmp_path):
    """The control of the next test."""
    python, environment = bare_python()
    code = "import gradio, importlib.util as u; print(u.find_spec('studio'))"
    done = subprocess.run([*python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr


def test_it_runs_alone_and_samples(built, tmp_path):
    python, environment = bare_python()
    draw_a_image(built, python, environment, tmp_path)


@pytest.mark.slow
def test_it_runs_in_a_clean_environment(built, tmp_path):
    """Installs its requirements and nothing else; this needs a package index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "-r", built / "requirements.txt"]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    draw_a_image(built, [python], environment, tmp_path)


def draw_a_image(folder, python, environment, scratch):
    """Start the Space as Hugging Face does, and use it as a program would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**environment, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment |= {"GRADIO_TEMP_DIR": str(scratch / "gradio"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with open(scratch / "log", "w+") as log:
        app = subprocess.Popen([*python, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            wait_for_answer(app, f"http://127.0.0.1:{port}/", scratch / "log")
            client = Client(f"http://127.0.0.1:{port}/", verbose=False, download_files=str(scratch / "downloads"))
            images, details = client.predict("a red apple", 1, 7, api_name="/generate")
        finally:
            app.send_signal(signal.SIGINT)
            app.kill()
            app.wait()
    side = json.loads((bundled_folder("emoji-vq") / "config.json").read_text())["sample_size"]
    assert Image.open(images[0]["image"]).size == (side, side)
    assert details["seeds"] == [7] and details["model"] == "emoji-ar"


def wait_for_answer(app, url, log):
    """Wait for the first page. The seconds that count are those of the app's own work, whatever else runs here."""
    deadline = time.monotonic() + 10 * SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as page:
                assert page.status == 200
            break
        except OSError:
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    spent = psutil.Process(app.pid).cpu_times()
    assert spent.user + spent.system < SECONDS
