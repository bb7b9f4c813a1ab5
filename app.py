"""Entry of a Hugging Face Space; here, `python app.py` opens the app."""

from importlib.util import find_spec

if find_spec("spaces"):
    pass

from studio.ui.app import build_app, launch_settings
from studio.ui.server.zerogpu import place

MODEL = "emoji-ar"

place(MODEL)
demo = build_app(MODEL)

if __name__ == "__main__":
    demo.launch(**launch_settings())
