"""Rollouts that were asked for and not trained on yet: this step's, and with ``controller.lag`` those of later steps.

A *rollout* of a step goes through these states, in this order::

    rows taken from the stream → asked (sampling, scoring) → scored → taken by the loop, which trains on it

Invariant: between two steps, the steps asked for are exactly the next ``lag`` ones, in order, none twice; the position
that a checkpoint saves is that of the last step that was trained, and the scored groups of later steps lie beside it.
So a resumed run neither repeats nor skips a prompt, whatever the step at which it was killed, and trains on the very
answers that the uninterrupted run would have trained on.

Example, lag 1: before step 1 is trained, steps 1 and 2 are asked for. A checkpoint after step 1 holds the position
behind step 1's rows, and step 2's scored groups. The resumed run takes step 2's rows from the stream again (they must
be the same), and asks for step 3 before it trains on step 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl.batch.batcher import Batcher
from skyrl.data.stream import Stream
from skyrl.records import RolloutRequest, SampleGroup, SkyrlError
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, PairSource
from skyrl.system import System

Promised = list[list[SampleGroup]]
"""Promises of groups, in the order of the rows."""


@dataclass(slots=True)
class Rollout:
    """The rollout of one step. All groups are promised."""

    step: int
    rows: tuple[int, ...]
    position: dict[str, Any]
    """The prompt stream's state behind these rows."""
    fresh: Promised
    """As sampled."""
    judged: Promised
    """Scored."""
    scored: Promised
    """What is trained on: the judged groups, with DropoutNTP after their answers were continued without the picture."""


class Ahead:
    """Asks for rollouts, and hands them out step by step.

    Args:
        cfg: ``controller.lag``, the size of a rollout, and what decides on blind continuations.
        system: Rollout and reward crew; the buffer crew, which holds restored groups.
        stream: Order of the training prompts: numbers of the rows, or places in ``rows``.
        rows: The data set's rows to train on (a filtered pool); None means all.
    """

    def __init__(self, cfg: Config, system: System, stream: Stream, rows: Sequence[int] | None = None) -> None:
        self.cfg, self.system, self.stream, self.rows = cfg, system, stream, rows
        self.position = stream.state_dict()
        """The stream's state behind the rows that were trained on."""
        self._asked: deque[Rollout] = deque()
        self._next = 1
        """The step that is taken next."""

    def ask_until(self, step: int) -> int:
        """Ask for every step up to this one (or the run's last) that was not asked for yet; how many. Returns at once.

        Args:
            step: The step that is about to be trained, plus the lag.
        """
        first = self._asked[-1].step + 1 if self._asked else self._next
        wanted = range(first, min(step, self.cfg.controller.steps) + 1)
        self._asked.extend(map(self._ask, wanted))
        return len(wanted)

    def take(self, step: int) -> Rollout:
        """The rollout of ``step``; afterwards its rows count as trained on.

        Raises:
            SkyrlError: if it was not asked for, or another one is due.
        """
        if not self._asked or self._asked[0].step != step:
            due = self._asked[0].step if self._asked else "none"
            raise SkyrlError(f"the rollout of step {step} was taken, due is {due}")
        rollout = self._asked.popleft()
        self.position, self._next = rollout.position, step + 1
        return rollout

    def sampling(self) -> list[list[SampleGroup]]:
        """Promises of what the rollout members make for later steps, ready or not."""
        return [
            part
            for rollout in self._asked
            for part in (*rollout.fresh, *(rollout.scored if rollout.scored is not rollout.judged else ()))
        ]

    def _ask(self, step: int) -> Rollout:
        """Sampling, scoring and, if this step's pairs need it, continuing without the picture: all asked at once."""
        cfg, system = self.cfg, self.system
        places = self.stream.take(cfg.rollout.prompts_per_step)
        rows = places if self.rows is None else tuple(int(self.rows[place]) for place in places)
        request = RolloutRequest(
            "train", rows, step, cfg.rollout.samples_per_prompt, greedy=False, seed=cfg.controller.seed
        )
        fresh, judged = system.ask(request)
        scored = judged
        if cfg.algorithm.mpo.pairs is PairSource.dropout_ntp and cfg.algorithm.weights(step)["mpo"] > 0:
            scored = system.rollouts.deal(Sampler.continue_blind, judged, step)
        return Rollout(step, rows, self.stream.state_dict(), fresh, judged, scored)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the trained position, and rows and number of parts of each step asked for ahead."""
        ahead = [{"step": one.step, "rows": list(one.rows), "parts": len(one.scored)} for one in self._asked]
        return {"stream": self.position, "lag": self.cfg.controller.lag, "ahead": ahead}

    def save(self, path: Path) -> None:
        """Write the sample buffer's state, with the scored groups of the steps asked for ahead."""
        counts = {one.step: len(one.scored) for one in self._asked}
        self.system.buffer.one(Batcher.save, path, counts, *(part for one in self._asked for part in one.scored))

    def load(self, path: Path, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` from what :meth:`save` and :meth:`state_dict` gave. With another lag than the saved
        run's, its answers to later steps would be too old or too young: they are asked for anew.

        Raises:
            SkyrlError: if the stream does not give the rows again that were asked for ahead.
        """
        self.system.buffer.one(Batcher.load, path)
        self.stream.load_state_dict(state["stream"])
        self.position, self._next = state["stream"], step + 1
        self._asked.clear()
        for saved in state["ahead"] if state["lag"] == self.cfg.controller.lag else ():
            places = self.stream.take(len(saved["rows"]))
            rows = places if self.rows is None else tuple(int(self.rows[place]) for place in places)
            if list(rows) != saved["rows"]:
                raise SkyrlError(
                    f"the checkpoint holds answers to rows {saved['rows']} for step {saved['step']}, the "
                    f"data now give {list(rows)}; resume with the data and the pool of the first start"
                )
            parts = [
                self.system.buffer.ask(Batcher.pending, saved["step"], place)[0] for place in range(saved["parts"])
            ]
            self._asked.append(Rollout(saved["step"], rows, self.stream.state_dict(), parts, parts, parts))
