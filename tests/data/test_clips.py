"""Clips: what moves, and nothing else; decided by the seed."""

import numpy as np

from studio.data.clips import DIRECTIONS, draw_clip
from studio.data.scenes import CELL


def test_one_emoji_moves_as_the_answers_say():
    for seed in range(20):
        clip, again = (draw_clip(np.random.default_rng(seed), (2, 2), steps=3) for _ in range(2))
        assert clip.frames.shape == (6, 192, 192, 3) and (clip.frames == again.frames).all()
        changed = (clip.frames[2:] != clip.frames[:-2]).any(-1)
        for number, frame in enumerate(changed):
            cells = {(int(y) // CELL, int(x) // CELL) for y, x in zip(*frame.nonzero())}
            both = {tuple(clip.path[number].tolist()), tuple(clip.path[number + 2].tolist())}
            assert cells and cells <= both
        assert (clip.frames[0] == clip.frames[1]).all()
        what, way, end = clip.questions
        step = clip.path[2] - clip.path[0]
        assert tuple(step.tolist()) == DIRECTIONS[way.answer]
        assert end.answer == "row {}, column {}".format(*(clip.path[-1] + 1)) and what.answer.isalpha()
    assert len({draw_clip(np.random.default_rng(seed)).questions[1].answer for seed in range(20)}) == 4
