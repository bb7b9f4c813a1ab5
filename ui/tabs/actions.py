"""Long actions of a tab: buttons that start them, and one that replaces these and cancels them."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from studio.ui.tabs.components import status_line

QUEUED = status_line("Waiting for the model …", state="running", fraction=0)
STOPPED = status_line("Stopped. The result so far stays here.", state="stopped")
FAILED = status_line("That did not work. Everything you entered is unchanged.", state="stopped")
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
ON_THE_MODEL: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "preprocess": False}
"""One at a time, with raw values: the work checks them, and its messages say what to do about a mistake."""


def connect_actions(
    actions: Sequence[tuple[Sequence[Any], Callable[..., Any], Sequence[Any], Sequence[Any]]],
    status: gr.HTML,
    starts: Sequence[gr.Button],
    cancel: gr.Button,
) -> None:
    """Connect long actions, one of which runs at a time.

    Args:
        actions: (triggers, work, inputs, outputs) of each; `work` is an asynchronous generator of updates of `outputs`,
            and stops when it is closed.
        status: the status line.
        starts: the buttons that start them.
        cancel: the button that is shown instead while one runs.
    """
    shown = [*starts, cancel]
    changed = [status, *shown]
    runs = []
    for triggers, work, inputs, outputs in actions:
        begin = gr.on(triggers, lambda: (QUEUED, *_buttons(starts, True)), None, changed, queue=False, **PRIVATE)
        run = begin.then(work, inputs, outputs, **ON_THE_MODEL, **PRIVATE)
        run.failure(lambda: FAILED, None, status, queue=False, **PRIVATE)
        run.then(lambda: _buttons(starts, False), None, shown, queue=False, **PRIVATE)
        runs.append(run)
    cancel.click(lambda: (STOPPED, *_buttons(starts, False)), None, changed, queue=False, cancels=runs, **PRIVATE)


def _buttons(starts: Sequence[gr.Button], running: bool) -> list[Any]:
    return [gr.update(visible=not running) for _ in starts] + [gr.update(visible=running)]
