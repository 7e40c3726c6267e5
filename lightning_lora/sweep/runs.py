"""Runs that take turns: each is a whole fit in a thread of its own, and only one of them goes on at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Any

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

TURN = 4  # batches: a change of threads costs about a twentieth of a small training step


class Run(Thread):
    """The fit of one adapter, with its own random numbers. Either its thread computes, or the one that waits for it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.trainer: Any = None
        self.metrics: list[float] = []
        self.dropped: int | None = None  # the number of the validation after which it was ended
        self.error: BaseException | None = None
        self.random = _collect_rng_states()
        self.has_ended = False
        self._turn, self._back = Semaphore(0), Semaphore(0)
        self._request: Callable[[], Any] | None = None

    def run(self) -> None:
        """Fit."""
        try:
            self.trainer.fit(self.trainer.lightning_module, datamodule=self.trainer.datamodule)
        except BaseException as error:
            is_stop = isinstance(error.__context__, KeyboardInterrupt)  # for which Lightning needs the main thread
            self.error = error.__context__ if is_stop else error
        self.has_ended = True
        self._back.release()

    def go_on(self) -> None:
        """Let it compute until it pauses or ends, and do here what it asks for."""
        _set_rng_states(self.random)
        self.start() if self.ident is None else self._turn.release()
        self._back.acquire()
        while self._request is not None:
            self._answer, self._request = self._request(), None
            self._turn.release()
            self._back.acquire()
        self.random = _collect_rng_states()

    def pause(self) -> None:
        """Wait for the next turn. A run that was dropped ends then."""
        self._back.release()
        self._turn.acquire()
        if self.dropped is not None:
            raise _TunerExitException  # a quiet end for Lightning

    def ask(self, request: Callable[[], Any]) -> Any:
        """Return what ``request`` returns in the thread that waits, from which processes are best started."""
        self._request = request
        self.pause()
        return self._answer

    def stop(self) -> None:
        """Let it end, wherever it is, and wait for that."""
        self.dropped = self.dropped or 0
        self._turn.release()
        if self.ident is not None:
            self.join()


@dataclass
class Runs:
    """Several runs, in turn. ``sign`` is 1 if a low metric is good, and -1 if a high one is."""

    live: list[Run]
    keep: float
    sign: int
    validations: int = 0
    shown: Run = field(init=False)

    def play(self) -> list[Run]:
        """Let all fit, and return them, the best one first."""
        runs, self.shown = [*self.live], self.live[0]
        try:
            while self.live:
                for run in [*self.live]:
                    self._advance(run)
                if self.live and all(len(run.metrics) > self.validations for run in self.live):
                    self._drop()
        finally:
            for run in self.live:  # after an error or Ctrl-C
                run.stop()
        return sorted(runs, key=lambda run: (-(run.dropped or math.inf), self._rank(run)))

    def _advance(self, run: Run) -> None:
        run.go_on()
        if run.error is not None:
            when = "in" if run.trainer.global_step else "before"
            rank_zero_info(f"LoRASweep ends {when} training: {run.name} raised {type(run.error).__name__}.")
            raise run.error
        if run.has_ended:
            self.live.remove(run)
            run.join()
            if run.dropped is not None:
                run.trainer = None  # with its module

    def pass_on(self, run: Run, batch: int) -> None:
        """Let the others come as far as this run."""
        if batch % TURN == 0 or len(run.metrics) > self.validations:
            run.pause()

    def _drop(self) -> None:
        """Keep the better ones, after a validation of all."""
        self.validations += 1
        ranked = sorted(self.live, key=self._rank)
        best, kept = ranked[0], math.ceil(len(ranked) * self.keep)
        for run in ranked[kept:]:
            run.dropped = self.validations
        rank_zero_info(f"LoRASweep, validation {self.validations}: {best.name} is best; {kept} of {len(ranked)} go on.")
        self._show(best)

    def _show(self, best: Run) -> None:
        """Give the progress bar to the best one."""
        before, self.shown = self.shown.trainer, best
        bar, now = before.progress_bar_callback, best.trainer
        if bar is not None and now is not before:
            bar.on_train_end(before, before.lightning_module)
            bar.teardown(before, before.lightning_module, "fit")
            before.callbacks.remove(bar)
            now.callbacks.append(bar)
            bar.setup(now, now.lightning_module, "fit")
            bar.on_train_start(now, now.lightning_module)
            bar.on_train_epoch_start(now, now.lightning_module)

    def _rank(self, run: Run) -> float:
        value = self.sign * run.metrics[-1] if run.metrics else math.nan
        return math.inf if math.isnan(value) else value
