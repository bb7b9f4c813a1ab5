"""Two ways to sample the same image, side by side: one machine, taken in turns, with a clock for each."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from studio import DECODINGS
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Call, as_files
from studio.ui.render.preview import Pace, Sketch, partial_images
from studio.ui.server.models import fitting_decodings, get_pipeline
from studio.ui.server.worker import follow
from studio.ui.server.zerogpu import on_gpu

_TURN = 0.03  # seconds that one may be ahead of the other


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where one side of a race stands.

    Args:
        title: its decoding.
        sampled, total: tokens.
        clock: seconds it has had the machine for.
        image: the latest, or `None`.
        fates: of its tokens.
        stats: those of the pipeline, at the end.
    """

    title: str
    total: int
    sampled: int = 0
    clock: float = 0.0
    image: object = None
    fates: DraftTrace | None = None
    stats: object = None


@dataclasses.dataclass(frozen=True)
class Race:
    """Both sides, plain decoding first; none while the model is being loaded."""

    lanes: tuple[Lane, ...] = ()
    warning: str | None = None

    @property
    def finished(self):
        return bool(self.lanes) and all(lane.stats for lane in self.lanes)


def race(wish):
    """Follow a race of plain decoding and the decoding of a wish: an asynchronous iterator over `Race`.

    A wish for plain decoding itself races against the next one that fits the model. Both sample one image with the same
    seed. They never run at the same time: the one whose clock is behind goes on, so that the clocks run together, and
    each shows the seconds that its decoding takes alone. A
    wish for the faster of plain and Jacobi decoding is a race of these two.

    Raises:
        StudioError: the model has plain decoding only, cannot be loaded, or refuses the wish.
    """
    if wish.decoding == "exact":
        wish = dataclasses.replace(wish, decoding="jacobi")
    wish = _with_rival(wish)
    return follow(lambda job: _race(wish, job))


def _with_rival(wish):
    """The wish with a decoding that is not plain."""
    if wish.decoding != wish.plain:
        return wish
    pipeline = DECODINGS[wish.plain].pipeline
    rivals = [name for name in fitting_decodings(wish.model) if DECODINGS[name].pipeline == pipeline]
    if not (rivals := [name for name in rivals if name not in (wish.plain, "exact")]):
        raise StudioError("This model has one decoding only: there is no other to race against.")
    return dataclasses.replace(wish, decoding=rivals[0], options={})


@on_gpu(seconds=120)
def _race(wish, job):
    job.report(Race())
    pipe = get_pipeline(wish.model, job.device)
    wishes = (dataclasses.replace(wish, count=1, decoding=wish.plain, options={}), dataclasses.replace(wish, count=1))
    track = _Track([Call(pipe, each) for each in wishes], job)
    with ThreadPoolExecutor(len(wishes), thread_name_prefix="studio-race") as lanes:
        for done in [lanes.submit(track.run, number) for number in range(len(wishes))]:
            done.result()
    return track.race


class _Track:
    """The state of a race."""

    def __init__(self, calls, job):
        self.calls, self.job = calls, job
        self.race = Race(tuple(Lane(call.wish.title, call.total) for call in calls), calls[-1].warning)
        self.turns = TurnScheduler(len(calls))
        self.failed = False

    def run(self, number):
        """Sample one side's image."""
        call, pace = self.calls[number], Pace()

        def on_step(sketch):
            self.turns.stop(number)
            if not self._is_over():
                self._update(number, sampled=sketch.sampled)
                if sketch.sampled < call.total and pace.is_due():
                    start = time.monotonic()
                    self._update(number, image=partial_images(call.pipe, sketch)[0], fates=_fates(call, sketch))
                    pace.spent(time.monotonic() - start)
                self.job.report(self.race)
            self.turns.go(number)
            return self._is_over()

        self.turns.go(number)
        try:
            output = call(on_step)
            self.turns.stop(number)
            if not self._is_over():
                ended = {"sampled": call.total, "fates": _fates(call, Sketch(output.tokens)), "stats": output.stats}
                self._update(number, image=as_files(output.images, call.wish)[0], **ended)
                self.job.report(self.race)
        except BaseException:
            self.failed = True
            raise
        finally:
            self.turns.leave(number)

    def _is_over(self):
        return self.job.stopped or self.failed

    def _update(self, number, **changes):
        lanes = [*self.race.lanes]
        lanes[number] = dataclasses.replace(lanes[number], clock=self.turns.clocks[number], **changes)
        self.race = dataclasses.replace(self.race, lanes=tuple(lanes))


def _fates(call, sketch):
    return call.fates(sketch) or DraftTrace(call.total, sketch.sampled, places=sketch.places)


class TurnScheduler:
    """Lets one of several threads run at a time, the one that is behind; a clock runs between `go` and `stop`."""

    def __init__(self, count):
        self.clocks = [0.0] * count
        self._racing = set(range(count))
        self._active, self._started = 0, None
        self._changed = threading.Condition()

    def go(self, number):
        """Wait for one's turn, and start one's clock."""
        with self._changed:
            self._choose()
            self._changed.wait_for(lambda: self._active == number)
            self._started = time.perf_counter()

    def stop(self, number):
        """Stop one's clock; nobody else goes on before one's next `go` or `leave`."""
        self.clocks[number] += time.perf_counter() - self._started

    def leave(self, number):
        """Run no more."""
        with self._changed:
            self._racing.discard(number)
            self._choose()

    def _choose(self):
        """Whose turn it is: whoever has it keeps it until it is clearly ahead."""
        if not self._racing:
            return
        behind = min(self._racing, key=lambda number: self.clocks[number])
        active = self._active
        if active not in self._racing or self.clocks[active] > self.clocks[behind] + _TURN:
            self._active = behind
        self._changed.notify_all()
