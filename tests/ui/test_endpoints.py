"""Every parameter of every endpoint is given odd values: the answer is a result or a sentence, and never a fault."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gradio_client import Client
from PIL import Image

from studio.ui.server.failures import UNEXPECTED

ODD = [None, True, "", " ", "\ud83c", "red \udf4e", "x" * 3000, [], ["a", 1], {}, {"a": [1]}, {"path": 1}]
ODD += [{"path": "\0"}, {"path": "\ud83c"}, -1, 0, 0.5, 1e300, 10**30, 10**400, float("nan"), float("inf")]
ODD += [{"delta": "0.1"}, {"\ud83c": 1}, {"steps": 10**9}, ["tiny: ar", "\ud83c"], ["tiny: ar", "tiny: \ud83c=1"]]
ODD += [[None, None]]
BASE = {
    "generate": ["a red apple", 1, 7, None, None, None, None, "ar", {}, "tiny", None],
    "edit": ["FILE", "a red apple", None, [0, 0, 8, 8], {}, 1, 1, 7, "tiny", None, None],
    "tokenize": ["FILE", "tiny", None, False],
    "detokenize": ["FILE", "tiny"],
    "ask": ["FILE", "what", "tiny", "divprune", 0.2, 4, None],
    "compare": ["a red apple", ["tiny: ar", "tiny: speculative"], 1, 7],
}
UNFIT = UNEXPECTED.split("(")[0]


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def base(http, tmp_path_factory):
    """The values of a good request by endpoint, with an image that was uploaded."""
    path = tmp_path_factory.mktemp("given") / "given.png"
    Image.new("RGB", (16, 16), "red").save(path)
    with path.open("rb") as file:
        [uploaded] = http.post("gradio_api/upload", files={"files": file}).json()
    file = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
    return {name: [file if value == "FILE" else value for value in values] for name, values in BASE.items()}


def answer(http, name, values):
    """What a program gets that writes its messages itself: the last event, and its data."""
    given = json.dumps({"data": values}).encode()
    asked = http.post(f"gradio_api/call/{name}", content=given, headers={"content-type": "application/json"})
    if asked.status_code != 200:
        return "refused", asked.json()["detail"]
    with http.stream("GET", f"gradio_api/call/{name}/{asked.json()['event_id']}") as found:
        lines = found.read().decode().splitlines()
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return events[-1], data[-1]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("name", BASE)
def test_odd_values_are_answered_with_a_sentence(http, base, name, step):
    counts = {"complete": 0, "error": 0, "refused": 0}
    for place in range(len(base[name])):
        for odd in ODD[place % step :: step]:
            values = [*base[name]]
            values[place] = odd
            event, data = answer(http, name, values)
            sentence = "fine" if event == "complete" else data["error"] if event == "error" else data
            told = f"{name}, value {place}: {odd!r:.80} -> {event} {data!r:.300}"
            assert isinstance(sentence, str) and sentence.strip() and not sentence.startswith(UNFIT), told
            counts[event] += 1
    assert counts["error"] > counts["complete"], counts


@pytest.mark.parametrize("values", [[], ["a red apple"], ["a"] * 40, [None] * 9])
def test_too_few_and_too_many_values(http, values):
    event, data = answer(http, "generate", values)
    assert event == "error" and data["error"]


def test_a_fault_is_a_sentence_that_tells_nothing_of_this_machine(http, monkeypatch):
    def fail(*_):
        raise RuntimeError("/home/somebody/secret.txt")

    monkeypatch.setattr("studio.ui.jobs.generate_job.sample_together", fail)
    event, data = answer(http, "generate", BASE["generate"])
    assert event == "error" and "RuntimeError" in data["error"] and "secret" not in data["error"]


def test_odd_requests_beside_ordinary_ones_take_nothing_from_them(http):
    """What one program asks at the same moment may be done in one call."""

    def ask(number):
        prompt = ["a red apple", "\ud83c", ["a red apple"], "a fox", 10**400][number % 5]
        values = [prompt, 1, 7, *BASE["generate"][3:]]
        while True:
            event, data = answer(http, "generate", values)
            if event != "error" or "waiting already" not in data["error"]:
                return event, data
            time.sleep(0.05)

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(ask, range(10)))
    assert [event for event, _ in found] == ["complete", "error", "error", "complete", "error"] * 2
    assert all(data["error"].strip() for event, data in found if event == "error")


def test_the_python_client_raises_the_sentence(address):
    with pytest.raises(Exception, match="must be text"):
        Client(address, verbose=False).predict(["a"], 1, api_name="/generate")
