"""Recorded random numbers in the form that decodings ask for them, by image and position."""

import torch


class RecordedNoise:
    """As `PositionNoise`, from recordings: orders (B, L) at once, the rest by `put` and `put_test`."""

    def __init__(self, orders, token_dim, steps):
        self.orders = orders
        self.starts = torch.zeros(*orders.shape, token_dim)
        self.between = torch.zeros(steps, *orders.shape, token_dim)
        self.tests = torch.zeros(orders.shape)
        self.trials = {}

    def put(self, places, start, steps):
        """`start` (n, D); `steps` (T, n, D) by step."""
        self.starts[places.images, places.positions] = start
        self.between[:, places.images, places.positions] = steps

    def put_test(self, places, uniform, proposals, uniforms):
        """`uniform` (n,); `proposals` (R, n, D) and `uniforms` (R, n) of the trials after it."""
        self.tests[places.images, places.positions] = uniform
        for row, place in enumerate(zip(places.images.tolist(), places.positions.tolist())):
            self.trials[place] = (proposals[:, row], uniforms[:, row])

    def order(self, total):
        assert total == self.orders.shape[1]
        return self.orders

    def start(self, places):
        return self.starts[places.images, places.positions]

    def steps(self, places, count):
        assert count == len(self.between)
        return self.between[:, places.images, places.positions]

    def test(self, places, step=0):
        return self.tests[places.images, places.positions]

    def trial(self, places, number, step=0):
        asked = [self.trials[place] for place in zip(places.images.tolist(), places.positions.tolist())]
        return torch.stack([sampled[number] for sampled, _ in asked]), torch.stack(
            [sampled[number] for _, sampled in asked]
        )
