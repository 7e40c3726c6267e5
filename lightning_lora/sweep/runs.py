"""Runs that take turns: each is a whole fit in a thread of its own, and only one of them goes on at a time."""

import math
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Any

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.rank_zero import rank_zero_info


@dataclass(eq=False)
class Run:
    """The run of one adapter. ``dropped`` is the number of the validation after which it ended."""

    name: str
    trainer: Any = None
    metrics: list[float] = field(default_factory=list)
    dropped: int | None = None
    random: dict[str, Any] = field(default_factory=_collect_rng_states)
    turn: Semaphore = field(default_factory=lambda: Semaphore(0))


@dataclass
class Runs:
    """Several runs, in turn. ``sign`` is 1 if a low metric is good, and -1 if a high one is."""

    live: list[Run]
    keep: float
    sign: int
    validations: int = 0
    error: BaseException | None = None
    shown: Run = field(init=False)

    def play(self) -> list[Run]:
        """Let all fit, and return them, the best one first."""
        runs, self.shown = [*self.live], self.live[0]
        threads = [Thread(target=self._play, args=(run,), daemon=True) for run in runs]
        list(map(Thread.start, threads))
        runs[0].turn.release()
        try:
            list(map(Thread.join, threads))
        except BaseException as error:  # Ctrl-C: each run ends at its next turn
            self.error = error
            list(map(Thread.join, threads))
        if self.error is not None:
            raise self.error
        return sorted(runs, key=lambda run: (-(run.dropped or math.inf), self._rank(run)))

    def _play(self, run: Run) -> None:
        run.turn.acquire()
        try:
            run.trainer.fit(run.trainer.lightning_module, datamodule=run.trainer.datamodule)
            run.random = _collect_rng_states()
        except BaseException as error:
            when = "in" if run.trainer.global_step else "before"
            rank_zero_info(f"LoRASweep ends {when} training: {run.name} raised {type(error).__name__}.")
            self.error = self.error or error
        if run.dropped is not None:
            run.trainer = None  # with its module
        following = self._after(run)
        self.live.remove(run)
        following.turn.release()  # its own, if it was the last

    def _after(self, run: Run) -> Run:
        return self.live[(self.live.index(run) + 1) % len(self.live)]

    def pass_on(self, run: Run) -> None:
        """Let the others come as far as this run, each with its random numbers. A run that was dropped ends here."""
        following = self._after(run)
        if following is not run:
            run.random = _collect_rng_states()
            following.turn.release()
            run.turn.acquire()
            _set_rng_states(run.random)
        if all(len(each.metrics) > self.validations for each in self.live):
            self._drop()
        if run.dropped is not None or self.error is not None:
            raise _TunerExitException  # a quiet end for Lightning

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
