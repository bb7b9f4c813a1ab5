"""Ask a question about an image with all visual tokens, then with fewer and fewer."""

import argparse
from pathlib import Path

from PIL import Image

import studio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="emoji-vlm")
    parser.add_argument("--method", default="divprune")
    options = parser.parse_args()

    reader = studio.load(options.model)
    image = Image.open(options.image).convert("RGB")
    for keep in (1.0, 0.5, 0.2, 0.1):
        found = reader(image, options.question, prune=options.method, keep=keep)
        seconds = sum(found.seconds.values())
        print(f"{found.kept_tokens} of {found.visual_tokens} tokens, {seconds:.3f} s: {found.answer}")


if __name__ == "__main__":
    main()
