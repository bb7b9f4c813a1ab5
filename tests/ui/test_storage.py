"""What visitors leave behind: files and sessions, private, bounded and cleaned."""

import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import httpx
import pytest

from studio.ui.app import build_app, launch_settings
from studio.ui.server import storage
from studio.ui.server.run import running
from studio.ui.server.session import Listeners
from studio.ui.server.storage import forget_sessions, sweep

HOUR = 3600
TORN = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx'


def put(path, size=1, age=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_old_files_and_empty_folders_go(tmp_path):
    put(tmp_path / "sampled" / "image.png")
    put(tmp_path / "tmpaborted")
    put(tmp_path / "deep_links" / "x" / "state.json")
    kept = str(put(tmp_path / "example" / "scene.png"))
    later = time.time() + HOUR + 60
    put(tmp_path / "new" / "image.png")
    os.utime(tmp_path / "new" / "image.png", (later, later))
    sweep(tmp_path, {kept}, later)
    sweep(tmp_path, {kept}, later + 60)
    assert left(tmp_path) == ["example", "example/scene.png", "new", "new/image.png"]


def test_many_and_large_files_leave_the_newest(tmp_path, monkeypatch):
    now = time.time() + 30
    for number in range(6):
        os.utime(put(tmp_path / f"{number}" / "a", 10), (now + number,) * 2)
    monkeypatch.setattr(storage, "_MOST_FILES", 4)
    sweep(tmp_path, now=now + 6)
    assert [name for name in left(tmp_path) if "/" in name] == ["2/a", "3/a", "4/a", "5/a"]
    monkeypatch.setattr(storage, "_MOST_BYTES", 25)
    sweep(tmp_path, now=now + 6)
    assert [name for name in left(tmp_path) if "/" in name] == ["4/a", "5/a"]


def test_a_link_is_removed_and_not_followed(tmp_path):
    mine = put(tmp_path / "mine" / "a")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(mine.parent)
    sweep(tmp_path / "cache", now=time.time() + 2 * HOUR)
    assert mine.exists() and left(tmp_path / "cache") == []


def test_idle_sessions_are_forgotten_and_others_kept():
    listeners, old = Listeners(), datetime.now() - timedelta(seconds=HOUR)
    names = ("idle", "heard", "busy", "new")
    states = SimpleNamespace(session_data=dict.fromkeys(names), time_last_used=dict.fromkeys(names, old))
    states.time_last_used["new"] = datetime.now()
    queue = SimpleNamespace(
        event_ids_to_events={"event": SimpleNamespace(session_hash="busy")},
        pending_event_ids_session=dict.fromkeys([*names, "lost"]),
        pending_messages_per_session=dict.fromkeys([*names, "lost"]),
    )
    listeners.arrive("heard")
    blocks = SimpleNamespace(_queue=queue, state_holder=states, upload_file_set={"/gone", __file__}, temp_file_sets=[])
    forget_sessions(blocks, listeners)
    assert list(states.session_data) == list(states.time_last_used) == ["heard", "busy", "new"]
    assert list(queue.pending_event_ids_session) == list(queue.pending_messages_per_session) == ["heard", "busy", "new"]
    assert blocks.upload_file_set == {__file__}


def test_the_folder_is_private_and_goes_with_the_process(tmp_path):
    code = "from studio.ui.server.storage import use_private_folder; import os; folder = use_private_folder()\n"
    code += "(folder / 'a').touch(); print(*(oct(path.stat().st_mode) for path in (folder, folder / 'a')))\n"
    code += "print(os.environ['GRADIO_TEMP_DIR'] == str(folder))"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0o40700", "0o100600", "True"] and left(tmp_path) == []


@pytest.mark.slow
def test_a_soak_of_requests_leaves_a_bounded_number_of_files_bytes_and_sessions(steps, reader, tmp_path, monkeypatch):
    """Rounds of images, aborted uploads and answers that nobody takes; each leaves what the first one did."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(storage, "_ROUND", 0.2)
    monkeypatch.setattr(storage, "_OLDEST", 1)
    monkeypatch.setattr(storage, "_IDLE", 1)
    monkeypatch.setattr("studio.ui.server.session._PATIENCE", 1)
    blocks, counts = build_app("tiny"), []
    with running(blocks, "127.0.0.1", 0, folder=tmp_path, **launch_settings()) as url:
        with httpx.Client(base_url=url, timeout=60) as http:
            for number in range(6):
                one_round(http, number)
                time.sleep(4)
                files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
                sessions = len(blocks.state_holder.session_data), len(blocks._queue.pending_event_ids_session)
                counts.append((len(files), sum(files), *sessions, len(blocks._queue.event_ids_to_events)))
    print("files, bytes, sessions, awaited sessions, events:", counts)
    assert counts[-1] == counts[0] and counts[0][2:] == (0, 0, 0)


def one_round(http, number):
    for seed in range(10):
        values = ["a red apple", 1, 100 * number + seed, None, None, None, None, "ar", {}, None, None]
        event = http.post("gradio_api/call/generate", json={"data": values}).json()["event_id"]
        if seed % 2:
            http.get(f"gradio_api/call/generate/{event}").raise_for_status()
        http.post("gradio_api/upload", files={"files": ("a.png", os.urandom(10_000))}).raise_for_status()
        http.post("gradio_api/upload", content=TORN, headers={"content-type": "multipart/form-data; boundary=x"})
