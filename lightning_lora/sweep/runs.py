"""Runs that take turns: each is a whole fit in a thread of its own, and only one of them computes at a time."""

import math
from collections.abc import Callable
from functools import partial
from threading import Semaphore, Thread
from typing import Any

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import ConfigError

TURN = 4  # batches: a change of threads costs about a twentieth of a small training step


class Run(Thread):
    """The fit of one adapter, with random numbers of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.trainer: Any = None
        self.memo: dict[int, Any] = {}  # of the deepcopy: copies by the ids of objects
        self.metrics: list[float] = []  # one of each validation
        self.judged = 0  # how many of these were compared with the others'
        self.dropped: int | None = None  # the number of the validation after which it ends
        self.error: BaseException | None = None
        self.random = _collect_rng_states()
        self.taken, self.place = 0, (0, 0, 0)
        self._has_ended = False
        self._turn, self._back = Semaphore(0), Semaphore(0)
        self._request: Callable[[], Any] | None = None

    def go_on(self) -> bool:
        """Let it compute until it pauses, and do what it asks for. Return whether there is more to come."""
        _set_rng_states(self.random)
        self.start() if self.ident is None else self._turn.release()
        self._back.acquire()
        while self._request is not None:
            self._answer, self._request = self._request(), None
            self._turn.release()
            self._back.acquire()
        self.random = _collect_rng_states()
        if self.error is not None:
            raise self.error
        return not self._has_ended

    def stop(self) -> None:
        """Let it end, wherever it is, and wait for that."""
        self.dropped = self.judged
        self._turn.release()
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        """Fit."""
        try:
            self.trainer.fit(self.trainer.lightning_module, datamodule=self.trainer.datamodule)
        except BaseException as error:
            is_stop = isinstance(error.__context__, KeyboardInterrupt)  # which Lightning handles in the main thread
            self.error = error.__context__ if is_stop else error
            when = "in" if self.trainer.global_step else "before"
            rank_zero_info(f"LoRASweep ends {when} training: {self.name} raised {type(self.error).__name__}.")
        if self.dropped is not None:
            self.trainer = None  # with its module
            self.memo.clear()
        self._has_ended = True
        self._back.release()

    def reach(self, loop: object, batch: int) -> None:
        """Let the others come as far, at the first batch of a pass and after some more."""
        self.taken += 1
        if batch % TURN == 0:
            self.place = self.taken, batch, id(loop)
            self._pause()

    def ask(self, request: Callable[[], Any]) -> Any:
        """Return what ``request`` returns in the thread that waits: processes are safely started from the main one."""
        self._request = request
        self._pause()
        return self._answer

    def _pause(self) -> None:
        self._back.release()
        self._turn.acquire()
        if self.dropped is not None:
            raise _TunerExitException  # a quiet end for Lightning


def play(runs: list[Run], keep: float, sign: int) -> list[Run]:
    """Let all fit, and return them, the best one first. ``sign`` is 1 if a low metric is good, and -1 if a high one."""
    live, shown, rank = runs, runs[0], partial(_rank, sign)
    try:
        while live:
            live = [run for run in live if run.go_on()]
            if len({run.place for run in live}) > 1:
                first = min(live, key=lambda run: run.place)
                raise ConfigError(
                    f"{first.name} takes other batches than the others: its code ends an epoch early. All adapters of "
                    "LoRASweep must use the same batches. Change that, or use LoRACallback for each."
                )
            if live and all(len(run.metrics) > run.judged for run in live):
                live.sort(key=rank)
                _judge(live, math.ceil(len(live) * keep))
                _move_bar(shown.trainer, live[0].trainer)
                shown = live[0]
    finally:
        for run in live:  # after an error, or Ctrl-C
            run.stop()
    return sorted(runs, key=lambda run: (-(run.dropped or math.inf), rank(run)))


def _judge(ranked: list[Run], kept: int) -> None:
    """Let only the first ones go on, after a validation of all."""
    for run in ranked:
        run.judged += 1
    for run in ranked[kept:]:
        run.dropped = run.judged
    best = ranked[0]
    rank_zero_info(f"LoRASweep, validation {best.judged}: {best.name} is best; {kept} of {len(ranked)} go on.")


def _rank(sign: int, run: Run) -> float:
    value = sign * run.metrics[-1] if run.metrics else math.nan
    return math.inf if math.isnan(value) else value


def _move_bar(before: Any, now: Any) -> None:
    """Give the progress bar to another Trainer."""
    bar = before.progress_bar_callback
    if bar is None or now is before:
        return
    bar.on_train_end(before, before.lightning_module)
    bar.teardown(before, before.lightning_module, "fit")
    before.callbacks.remove(bar)
    now.callbacks.append(bar)
    bar.setup(now, now.lightning_module, "fit")
    bar.on_train_start(now, now.lightning_module)
    bar.on_train_epoch_start(now, now.lightning_module)
