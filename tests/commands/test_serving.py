"""`studio serve`: what its options become, and which are refused."""

from collections import defaultdict

import pytest

from studio.ui.server import limits, logs, models, storage, worker
from studio.ui.server import options as serving
from studio.ui.server.limits import Limits
from studio.ui.server.models import Device
from studio.ui.server.rate_limits import RateLimiter, Rates
from tests.command_results import refused


@pytest.fixture
def launched(monkeypatch):
    """What the app was launched with, in place of launching it."""
    found = []
    monkeypatch.setattr(storage, "use_private_folder", lambda: None)
    monkeypatch.setattr(worker, "_workers", [])
    monkeypatch.setattr(logs, "use_json_lines", lambda: None)
    monkeypatch.setattr(worker, "_rates", RateLimiter())
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setattr(models, "_elsewhere", defaultdict(dict))
    monkeypatch.setattr(serving, "launch", lambda *where, **how: found.append((where, how)))
    return found


def test_options_become_queues_and_limits(run, launched, tiny_folder):
    options = ["--max-waiting", 5, "--max-per-user", 2, "--max-batch", 6, "--max-images", 3, "--max-prompt", 90]
    more = ["--batching", "equal", "--api-key", "secret-key", "--allow-origin", "https://a.example"]
    more += [
        "--max-images-per-minute",
        9,
        "--max-answer",
        70,
        "--max-upload",
        7,
        "--max-pixels",
        9,
        "--dtype",
        "float32",
        "--devices",
        "cpu",
    ]
    code, _, err = run("serve", "--port", 7999, "--model", tiny_folder, *options, *more)
    assert code == 0, err
    [(where, how)] = launched
    assert where == ("127.0.0.1", 7999) and how["upload_bytes"] == 7_000_000 and how["places"] == 11
    [device_worker] = worker._workers
    assert device_worker.device == Device("cpu", "float32") and not device_worker.limits.continuous
    assert how["keys"].client_of("Bearer secret-key") == "key-1" and how["origins"] == ["https://a.example"]
    assert worker._rates.rates == Rates(images=9)
    now = limits.limits()
    assert (now.images, now.characters, now.pixels, now.answer) == (3, 90, 9_000_000, 70)
    assert now.models[tiny_folder.name] == str(tiny_folder) and "emoji-vq" in now.models
    assert list(models._elsewhere["pipelines", device_worker.device]) == [how["model"]] == [tiny_folder.name]


def test_ray_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setattr("studio.commands.serve.find_spec", lambda name: None)
    for options in (["serve", "--ray"], ["serve", "--ray", "--replicas", "auto", "--devices", "cpu"]):
        refused(run(*options), 'pip install "token-studio[ray]"')


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--max-batch", 2], "--max-images 4"),
        (["--max-waiting", 0], "--max-waiting"),
        (["--max-images", 17], "--max-images"),
        (["--max-prompt", 2001], "--max-prompt"),
        (["--max-upload", 0], "--max-upload"),
        (["--port", 70000], "--port"),
        (["--devices", "cpu,cpu"], "named twice"),
        (["--devices", "toaster"], "not there"),
        (["--dtype", "int3"], "dtype"),
        (["--model", "emoji-nothing"], "emoji-nothing"),
        (["--batching", "magic"], "--batching"),
        (["--api-key", "short"], "8 to 200"),
        (["--api-keys", "no-such-file"], "no-such-file"),
        (["--allow-origin", "example.org"], "a scheme and a host"),
        (["--replicas", 2], "--replicas is for --ray"),
        (["--ray", "--replicas", 0], "from 1 to 1000, or auto"),
        (["--ray", "--replicas", "many"], "from 1 to 1000, or auto"),
        (["--ray", "--devices", "cuda:0,cuda:1"], "Ray chooses the device"),
        (["--max-images-per-minute", 0], "--max-images-per-minute"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run, launched, options, word):
    code, out, err = run("serve", *options)
    assert code == 2 and out == "" and word in err and "Traceback" not in err
    assert not launched
