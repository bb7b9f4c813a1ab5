"""What a session has made: newest first, bounded, out of the files themselves, and nobody else's."""

import asyncio
import json
import zipfile
from pathlib import Path

import gradio as gr
import httpx
import pytest
from PIL import Image

from studio import StudioError
from studio.saving import png_writer
from studio.ui.app import build_app, launch_settings
from studio.ui.server import models
from studio.ui.server.history import MOST, add, archive, chosen_file
from studio.ui.server.run import running
from studio.ui.tabs import history as strips
from studio.ui.tabs.history import finished_files, use_settings


@pytest.fixture
def saved(tmp_path):
    """Writes an image as the app saves it, and returns its path."""

    def save(name, seed=1, **call):
        path = tmp_path / f"{name}.png"
        png_writer(Image.new("RGB", (8, 8)), {"model": "emoji-ar", "prompt": "a fox", **call}, seed)(path)
        return str(path)

    return save


def test_the_newest_come_first_and_the_oldest_go(saved):
    past = []
    for number in range(MOST):
        add(past, [saved(f"{number}a", number), saved(f"{number}b", number + 1)])
    assert len(past) == MOST and [Path(path).stem for path in past[:4]] == ["23a", "23b", "22a", "22b"]
    Path(past[1]).unlink()
    add(past, [past[3]])
    assert [Path(path).stem for path in past[:3]] == ["22b", "23a", "22a"] and len(past) == MOST - 1


def test_the_files_say_what_they_are(saved, tiny_class_pipeline, monkeypatch):
    monkeypatch.setitem(models._pipelines, "classes", tiny_class_pipeline)
    files = [
        saved("prompt", 7, decoding={"name": "lantern", "delta": 0.2}),
        saved("class", 8, model="classes", prompt=None, class_label=7),
        saved("elsewhere", 9, model="gone", prompt=None, class_label=7),
        saved("html", 1, prompt="<b>\nbold"),
    ]
    assert [caption for _, caption in add([], files)] == [
        "seed 7 · a fox · emoji-ar, lantern", "seed 8 · toilet tissue · classes", "seed 9 · class 7 · gone",
        "seed 1 · <b> bold · emoji-ar",
    ]  # fmt: skip


def test_what_carries_no_settings_is_left_out(saved, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    past = []
    assert len(add(past, [str(tmp_path / "plain.png"), saved("one"), str(tmp_path / "gone.png")])) == len(past) == 1


def test_all_of_them_in_one_file(saved):
    past = [saved("one", 1), saved("two", 2)]
    with zipfile.ZipFile(archive([*past, "/gone.png"])) as file:
        assert file.namelist() == ["01-one.png", "02-two.png"]
        assert [file.read(name) for name in file.namelist()] == [Path(path).read_bytes() for path in past]
    with pytest.raises(StudioError, match="There is no image yet"):
        archive([])


def test_the_one_that_was_clicked_or_the_newest(saved):
    past = [saved("one"), saved("two")]
    assert [chosen_file(past, number) for number in (None, 1, 9, "x")] == [past[0], past[1], past[0], past[0]]
    Path(past[0]).unlink()
    with pytest.raises(StudioError, match="This image is gone"):
        chosen_file(past, 0)
    with pytest.raises(StudioError, match="There is no image yet"):
        chosen_file([], None)


def test_its_settings_fill_the_form(saved, toasts):
    form = form_of()
    past = [saved("one", 5, guidance_scale=2.5), saved("two", 6, model="emoji-mar")]
    values = {field.elem_id: update for field, update in use_settings(form, past, None, "emoji-ar").items()}
    assert (values["prompt"], values["seed"], values["guidance"]) == ("a fox", "5", "2.5")
    values = {field.elem_id: update for field, update in use_settings(form, past, 1, "emoji-ar").items()}
    assert values["model"]["value"] == "emoji-mar" and values["seed"] == "6" and not toasts
    Path(past[0]).unlink()
    assert use_settings(form, past, 0, "emoji-ar") == {} and "is gone" in toasts[0]


def form_of():
    found = []
    connect = strips.connect_history
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "studio.ui.tabs.generate.connect_history",
            lambda history, form: found.append(form) or connect(history, form),
        )
        build_app("emoji-ar")
    return found[0]


def test_previews_are_not_kept():
    preview = Image.new("RGBA", (8, 8))
    assert finished_files(gr.update(value=[("a.png", "a"), ("b.png", "b")])) == ["a.png", "b.png"]
    for update in (gr.skip(), gr.update(value=[("a.png", "a"), (preview, "b")]), gr.update(value=None)):
        assert finished_files(update) == []


def test_two_actions_of_a_session_lose_nothing(saved):
    """The list of a session is one object: what ends later does not put an older list back."""
    past, gates = [], [asyncio.Event(), asyncio.Event()]

    async def work(number):
        await gates[number].wait()
        yield gr.update(value=[(saved(f"{number}", number), "")]), gr.skip()

    async def scenario():
        with gr.Blocks():
            strip = strips.build_history([])
        tasks = [asyncio.create_task(_last(strip.recorded(work)(past, number))) for number in (0, 1)]
        await asyncio.sleep(0)
        for gate in reversed(gates):
            gate.set()
            await asyncio.sleep(0.05)
        return await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert [Path(path).stem for path in past] == ["0", "1"]


async def _last(updates):
    return [update async for update in updates][-1]


class Session:
    """A page as a browser has it: it calls the functions behind buttons, and follows what they answer."""

    def __init__(self, http, app, name):
        self.http, self.name, self.config = http, name, app.config
        self.ids = {part["props"].get("elem_id"): part["id"] for part in app.config["components"]}

    def sample(self, **given):
        """The strip after a request of the Generate tab with these values of fields."""
        outputs = [self.ids[name] for name in ("images", "tokens", "status", "history")]
        behind = [each for each in self.config["dependencies"] if each["outputs"][:4] == outputs]
        values = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        values |= {self.ids[name]: value for name, value in given.items()}
        data = [values[part] for part in behind[0]["inputs"]]
        found = self.call(behind[0]["id"], data)[3]
        return [(image["image"]["orig_name"], image["caption"]) for image in found["value"]]

    def call(self, function, data):
        body = {"data": data, "fn_index": function, "session_hash": self.name}
        self.http.post("gradio_api/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.name}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]
        raise AssertionError("nothing came back")


def test_a_session_sees_nothing_of_another(steps):
    app = build_app("tiny")
    with running(app, "127.0.0.1", 0, **launch_settings()) as url, httpx.Client(base_url=url, timeout=60) as http:
        mine, yours = Session(http, app, "mine"), Session(http, app, "yours")
        [first] = mine.sample(prompt="a red apple", count=1, seed="7")
        assert first[0] == "a-red-apple-7.png" and first[1] == "seed 7 · a red apple · tiny, ar"
        theirs = yours.sample(prompt="a blue sky", count=2, seed="50")
        assert [name for name, _ in theirs] == ["a-blue-sky-50.png", "a-blue-sky-51.png"]
        assert [name for name, _ in mine.sample(prompt="a pear", count=1, seed="9")] == ["a-pear-9.png", first[0]]
        whole = [each["id"] for each in app.config["dependencies"] if each["outputs"] == [mine.ids["history-archive"]]]
        assert whole
        for session, names in ((mine, ["a-pear-9", "a-red-apple-7"]), (yours, ["a-blue-sky-50", "a-blue-sky-51"])):
            [file] = session.call(whole[0], [None])
            with zipfile.ZipFile(file["path"]) as archived:
                assert archived.namelist() == [f"{number:02}-{name}.png" for number, name in enumerate(names, 1)]
        third = Session(http, app, "third")
        body = {"data": [None], "fn_index": whole[0], "session_hash": third.name}
        http.post("gradio_api/queue/join", json=body).raise_for_status()
        with http.stream("GET", "gradio_api/queue/data", params={"session_hash": third.name}) as lines:
            assert any("There is no image yet" in line for line in lines.iter_lines())
