"""Clips with questions: a scene in which one emoji moves from cell to cell, decided by a seed."""

from dataclasses import dataclass

import numpy as np

from studio.data.scenes import CELL, Question, draw_scene

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames (T, H, W, 3), uint8; path (T, 2), row and column of the moving emoji's cell in each; questions."""

    frames: np.ndarray
    path: np.ndarray
    questions: tuple[Question, ...]


def draw_clip(rng: np.random.Generator, tiles: tuple[int, int] = (2, 2), steps: int = 4, hold: int = 2) -> Clip:
    """One clip: an emoji crosses a row or a column, a cell at a time, over the cells of a scene.

    Args:
        rng: a `numpy.random.Generator`.
        tiles: rows and columns of tiles of the scene, each 1 to 4.
        steps: cells that the emoji passes, 2 up to the scene's rows and columns of cells (twice the tiles).
        hold: frames it stays in each.

    Returns:
        A `Clip` of steps * hold frames. Questions ask what moves, which way, and where it ends.
    """
    scene = draw_scene(rng, tiles, questions=0)
    moving = draw_scene(rng, (1, 1), questions=0, emoji=1, words=0)
    cell = next(number for number, (shown, _) in enumerate(moving.cells) if shown != "nothing")
    top, left = (part * CELL for part in divmod(cell, 2))
    sprite = moving.image[top : top + CELL, left : left + CELL]
    direction = str(rng.choice([*DIRECTIONS]))
    along = np.array(DIRECTIONS[direction])
    size = 2 * np.array(tiles)
    begin = np.where(along < 0, steps - 1, 0)
    begin = begin + rng.integers(0, np.where(along == 0, size, size - steps + 1))
    path = begin + np.arange(steps)[:, None] * along
    frames = []
    for row, column in path:
        frame = scene.image.copy()
        frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = sprite
        frames += [frame] * hold
    row, column = path[-1]
    cells = tuple(int(r * size[1] + c) for r, c in path)
    questions = (
        Question("motion", "What moves?", moving.cells[cell][0], cells),
        Question("direction", "Which way does it move?", direction, cells),
        Question("end", "Where is it at the end?", f"row {row + 1}, column {column + 1}", cells[-1:]),
    )
    return Clip(np.stack(frames), np.repeat(path, hold, axis=0), questions)
