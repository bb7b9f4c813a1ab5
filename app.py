"""Entry of a Hugging Face Space; elsewhere, `python app.py` opens the app."""

from importlib.util import find_spec

if find_spec("spaces"):
    import spaces  # noqa: F401  # before torch, or no GPU is lent

from studio.ui.app import build_app, launch_settings
from studio.ui.server.zerogpu import preload

MODEL = "emoji-ar"

preload(MODEL)
demo = build_app(MODEL)

if __name__ == "__main__":
    demo.launch(**launch_settings())
