"""Entry of a Hugging Face Space; here, `python app.py` opens the app."""

from studio.ui.app import build_app, launch_settings

demo = build_app()

if __name__ == "__main__":
    demo.launch(**launch_settings())
