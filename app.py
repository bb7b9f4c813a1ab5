"""Entry of a Hugging Face Space; elsewhere, `python app.py` opens the app."""

import os
from importlib.util import find_spec

if find_spec("spaces"):
    import spaces  # noqa: F401  # before torch, or no GPU is lent

from studio.ui.app import build_app, launch_settings
from studio.ui.server.limits import Limits
from studio.ui.server.options import offer
from studio.ui.server.zerogpu import preload

MODEL = "emoji-ar"

# A Space is open to strangers: they choose from a list, and name no folder and no repository.
name = offer(MODEL, Limits()) if os.environ.get("SPACE_ID") else MODEL
preload(name)
demo = build_app(name)

if __name__ == "__main__":
    demo.launch(**launch_settings())
