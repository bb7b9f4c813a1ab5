"""Long actions of a tab: buttons that start them, and one that takes their place and cancels them."""

import gradio as gr

from studio.ui.tabs.components import status_line

QUEUED = status_line("Waiting for the model …", state="running", fraction=0)
STOPPED = status_line("Stopped. What was there so far stays here.", state="stopped")
FAILED = status_line("That did not work. Everything you entered is unchanged.", state="stopped")
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
ON_THE_MODEL = {"concurrency_id": "gpu", "concurrency_limit": 1, "preprocess": False}
"""One at a time, with fields as they are: the work checks them, and says what to do about a mistake."""


def connect_actions(actions, status, starts, cancel):
    """Wire long actions of which one at a time is under way.

    Args:
        actions: (triggers, work, inputs, outputs) of each; `work` is an asynchronous generator of updates of `outputs`.
            When it is closed, what it does must stop.
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


def _buttons(starts, running):
    return [gr.update(visible=not running) for _ in starts] + [gr.update(visible=running)]
