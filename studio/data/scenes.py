"""Scenes with questions: emoji and words on a grid, an unlimited supply that a seed determines; and single emoji.

A tile is what a vision tower sees at once (96 px); it has 2 x 2 cells. A scene of 2 x 2 tiles has 16 cells, one of
4 x 4 tiles 64. An emoji takes about two thirds of its cell, so that on a thumbnail of 2 x 2 tiles it is 17 px wide:
what it is, and what a word says, has to be read from the crops.

A single emoji is an image as the bundled generators make it: one emoji of the whole set in one style on one background.

Every question has one right answer, which the image alone decides.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from studio.checks import check_integer
from studio.data.archive import RESOLUTION, STYLES, Concept, load_concepts, load_images
from studio.data.backgrounds import BACKGROUNDS, NAMES, render
from studio.data.captions import article
from studio.data.splits import combinations

TILE = 96
MAX_TILES = 4
MAX_QUESTIONS = 1000
CELL = 48
MOST_EMOJI = 16
KINDS = ("place", "count", "background", "word", "presence")
SINGLE_KINDS = ("name", "style", "background")
WORDS = tuple(
    "ant arm axe bag bat bay bed bee box bus cap car cat cup day dog ear egg eye fan fig fly fox gem gum hat hen hut "
    "ice ink jar jet key kid leg lid log map mat mud net nut oak oil owl pan peg pen pie pig pin pot rat rug saw sea "
    "sky sun tap tea toe top toy van web wig zip".split()
)
_SUBJECTS = 160


@dataclass(frozen=True)
class Question:
    """A question of one of `KINDS` or `SINGLE_KINDS`.

    Its answer is in lower case; `cells` are those that show it, none for what is absent.
    """

    kind: str
    text: str
    answer: str
    cells: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """An image (H, W, 3), uint8, what is in each of its cells and the colour behind it, and questions about it."""

    image: np.ndarray
    cells: tuple[tuple[str, str], ...]
    questions: tuple[Question, ...]


@lru_cache(maxsize=1)
def subjects() -> tuple[Concept, ...]:
    """The concepts that scenes show: the first 160 whose label is one word, in the archive's order."""
    named = [concept for concept in load_concepts() if concept.label.isalpha() and concept.label not in WORDS]
    return tuple(named[:: max(1, len(named) // _SUBJECTS)][:_SUBJECTS])


def draw_scene(
    rng: np.random.Generator,
    tiles: tuple[int, int] = (2, 2),
    questions: int = 12,
    emoji: int | None = None,
    words: int | None = None,
) -> Scene:
    """One scene.

    Args:
        rng: a `numpy.random.Generator`.
        tiles: rows and columns of tiles, each 1 to 4.
        questions: how many, at most 1,000; their kinds are sampled uniformly from those that the scene allows.
        emoji, words: how many cells show one, together at most all; sampled at random where they are not given.

    Returns:
        A `Scene` of 96 px a tile.

    Raises:
        StudioError: a number out of range.
    """
    rows, columns = (2 * check_integer("Each number of tiles", side, 1, MAX_TILES) for side in tiles)
    questions = check_integer("The number of questions", questions, 0, MAX_QUESTIONS)
    cells = rows * columns
    if emoji is not None:
        emoji = check_integer("The number of emoji", emoji, 1, cells)
    if words is not None:
        words = check_integer("The number of words", words, 0, cells - (1 if emoji is None else emoji))
    order = rng.permutation(rows * columns)
    if emoji is None:
        emoji = int(rng.integers(1, min(MOST_EMOJI, len(order)) + 1))
    if words is None:
        words = int(rng.integers(0, min(4, len(order) - emoji) + 1))
    kinds = rng.choice(len(subjects()), size=max(1, int(np.ceil(emoji * rng.uniform(0.4, 1)))), replace=False)
    behind = rng.integers(len(NAMES))
    things = {
        int(cell): (int(rng.choice(kinds)), int(rng.integers(len(STYLES))), _own_background(rng, behind))
        for cell in order[:emoji]
    }
    written = {int(cell): str(rng.choice(WORDS)) for cell in order[emoji : emoji + words]}
    image = _paint(rng, (rows, columns), behind, things, written)
    facts = _Facts((rows, columns), things, written)
    shown = tuple(facts.cell(cell, behind) for cell in range(cells))
    return Scene(image, shown, tuple(facts.ask(rng) for _ in range(questions)))


def draw_single(rng: np.random.Generator, side: int = 64, held_out: bool = False) -> Scene:
    """One emoji that fills the image, with a question of each of `SINGLE_KINDS`.

    Args:
        rng: a `numpy.random.Generator`.
        side: of the image in pixels, 8 to 128.
        held_out: of the combinations of emoji, style and background that generators do not learn, or of the others.

    Returns:
        A `Scene` of one cell.

    Raises:
        StudioError: a side out of range.
    """
    side = check_integer("The side of the image", side, 8, RESOLUTION)
    rows = _combinations(held_out)
    row = rows[rng.integers(len(rows))]
    concept, style, behind = (int(each) for each in row)
    pixels = render(load_images(side), row[None])[0].permute(1, 2, 0).numpy()
    name, colour = load_concepts()[concept].label.lower(), NAMES[behind]
    texts = {"name": "What is it?", "style": "Which style is it?", "background": "What colour is the background?"}
    answers = {"name": name, "style": STYLES[style], "background": colour}
    questions = tuple(Question(kind, texts[kind], answers[kind], (0,)) for kind in SINGLE_KINDS)
    return Scene((pixels * 255).round().astype(np.uint8), ((name, colour),), questions)


@cache
def _combinations(held_out):
    return np.array(combinations(held_out))


def _own_background(rng, behind):
    return int(rng.integers(len(NAMES))) if rng.random() < 0.6 else int(behind)


def _paint(rng, grid, behind, things, written):
    rows, columns = grid
    canvas = Image.new("RGB", (columns * CELL, rows * CELL), BACKGROUNDS[NAMES[behind]])
    for cell, (subject, style, background) in things.items():
        left, top = cell % columns * CELL, cell // columns * CELL
        canvas.paste(BACKGROUNDS[NAMES[background]], (left, top, left + CELL, top + CELL))
        side = int(rng.integers(28, 41))
        at = left + int(rng.integers(2, CELL - side - 1)), top + int(rng.integers(2, CELL - side - 1))
        emoji = _emoji(subject, style).resize((side, side), Image.Resampling.BOX)
        under = np.asarray(canvas.crop((*at, at[0] + side, at[1] + side)), dtype=np.float32)
        over = np.asarray(emoji, dtype=np.float32)
        mixed = over[..., :3] + under * (1 - over[..., 3:] / 255)
        canvas.paste(Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8)), at)
    brush = ImageDraw.Draw(canvas)
    ink = "black" if sum(BACKGROUNDS[NAMES[behind]]) > 330 else "white"
    for cell, word in written.items():
        centre = (cell % columns + 0.5) * CELL, (cell // columns + 0.5) * CELL
        brush.text(centre, word, fill=ink, font=_font(int(rng.integers(17, 22))), anchor="mm")
    return np.asarray(canvas)


@cache
def _emoji(subject, style):
    """Premultiplied RGBA at 64 px."""
    image = load_images(64)[subjects()[subject].index, style]
    return Image.frombytes("RGBa", image.shape[:2], image.tobytes())


@cache
def _font(size):
    return ImageFont.load_default(size)


class _Facts:
    """The facts of a scene, as questions."""

    def __init__(self, grid, things, written):
        self.rows, self.columns = grid
        self.things, self.written = things, written
        self.names = [subject.label for subject in subjects()]
        shown = [subject for subject, _, _ in things.values()]
        self.counts = {subject: shown.count(subject) for subject in dict.fromkeys(shown)}
        self.single = [cell for cell, (subject, _, _) in things.items() if self.counts[subject] == 1]

    def cell(self, number, behind):
        """What is in a cell, "nothing" too, and the colour behind it."""
        if number in self.things:
            subject, _, background = self.things[number]
            return self.names[subject], NAMES[background]
        return self.written.get(number, "nothing"), NAMES[behind]

    def ask(self, rng):
        """A question of a kind that this scene allows."""
        kinds = [kind for kind in KINDS if kind != "word" or self.written]
        kinds = [kind for kind in kinds if kind != "background" or self.single]
        return getattr(self, f"_{rng.choice(kinds)}")(rng)

    def _place(self, rng):
        free = sorted(set(range(self.rows * self.columns)) - set(self.things) - set(self.written))
        if free and rng.random() < 0.15:
            cell = int(rng.choice(free))
            return Question("place", f"What is in {self._where(cell)}?", "nothing", (cell,))
        cell = int(rng.choice(list(self.things)))
        return Question("place", f"What is in {self._where(cell)}?", self.names[self.things[cell][0]], (cell,))

    def _count(self, rng):
        subject = int(rng.choice(list(self.counts)))
        text = f"How many times is there {article(self.names[subject])}?"
        return Question("count", text, str(self.counts[subject]), self._shown(subject))

    def _background(self, rng):
        cell = int(rng.choice(self.single))
        subject, _, background = self.things[cell]
        return Question("background", f"What colour is behind the {self.names[subject]}?", NAMES[background], (cell,))

    def _word(self, rng):
        cell = int(rng.choice(list(self.written)))
        return Question("word", f"Which word is in {self._where(cell)}?", self.written[cell], (cell,))

    def _presence(self, rng):
        there = rng.random() < 0.5
        absent = [subject for subject in range(len(self.names)) if subject not in self.counts]
        subject = int(rng.choice(list(self.counts) if there else absent))
        text = f"Is there {article(self.names[subject])}?"
        return Question("presence", text, "yes" if there else "no", self._shown(subject))

    def _shown(self, subject):
        return tuple(sorted(cell for cell, (shown, _, _) in self.things.items() if shown == subject))

    def _where(self, cell):
        return f"row {cell // self.columns + 1}, column {cell % self.columns + 1}"
