"""Rollouts that were asked for and not trained on yet: this step's, and with ``controller.lag`` those of later steps.

A *rollout* of a step goes through these states, in this order::

    rows taken from the stream → asked (sampling, scoring) → scored → taken by the loop, which trains on it

Invariant: between two steps, the steps asked for are exactly the next ``lag`` ones, in order, none twice; the position
that a checkpoint saves is that of the last step that was trained, and the scored groups of later steps lie beside it.
So a resumed run neither repeats nor skips a prompt, whatever the step at which it was killed, and trains on the very
answers that the uninterrupted run would have trained on.

With ``rollout.oversample`` a step's rollout begins with the groups that the one before left unfinished (*begun* ones),
takes new rows for the rest, and leaves begun groups itself. They travel from request to request, so a rollout member
keeps nothing. Invariant: the rows taken from the stream are those trained on, those of the steps asked ahead, and those
begun, none twice; a checkpoint holds the groups that were begun when its last step was sampled, and those behind each
step asked ahead.

Example, lag 1: before step 1 is trained, steps 1 and 2 are asked for. A checkpoint after step 1 holds the position
behind step 1's rows, and step 2's scored groups. The resumed run takes step 2's rows from the stream again (they must
be the same), and asks for step 3 before it trains on step 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from skyrl.batch.batcher import Batcher
from skyrl.data.stream import Stream
from skyrl.records import Begun, RolloutRequest, SampleGroup, SkyrlError
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, PairSource
from skyrl.system import System

Promised = list[list[SampleGroup]]
"""Promises of groups, in the order of the rows."""


@dataclass(slots=True)
class Left:
    """Begun groups that a rollout leaves to the next one."""

    counts: tuple[int, ...] = ()
    """How many, by rollout member that will go on with them; () for none at all."""
    parts: list[list[Begun]] = field(default_factory=list)
    """Promises, one a member."""


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
    left: Left


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
        self.left = Left()
        """What the rollout that was trained on left."""
        self.sampling_call = Sampler.generate_enough if cfg.rollout.oversample else Sampler.generate
        """What rollout members are mostly called for."""
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
        self.position, self.left, self._next = rollout.position, rollout.left, step + 1
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
        cfg, system, left = self.cfg, self.system, self._asked[-1].left if self._asked else self.left
        wanted = cfg.rollout.in_flight
        news = [max(0, wanted - count) for count in left.counts or (0,) * cfg.rollout.num_workers]
        rows = self._take(sum(news))
        request = RolloutRequest(
            "train", rows, step, cfg.rollout.samples_per_prompt, greedy=False, seed=cfg.controller.seed
        )
        if self.sampling_call is Sampler.generate and not left.counts:
            fresh, judged = system.ask(request)
        else:
            fresh, judged, left = self._ask_enough(request, news, left)
        scored = judged
        if cfg.algorithm.mpo.pairs is PairSource.dropout_ntp and cfg.algorithm.weights(step)["mpo"] > 0:
            scored = system.rollouts.deal(Sampler.continue_blind, judged, step)
        return Rollout(step, rows, self.stream.state_dict(), fresh, judged, scored, left)

    def _ask_enough(self, request: RolloutRequest, news: list[int], left: Left) -> tuple[Promised, Promised, Left]:
        """Let each member go on with what was left to it and with so many new rows, until its share is complete."""
        share = self.cfg.rollout.prompts_per_step // len(news)
        bounds = pairwise(accumulate(news, initial=0))
        requests = [replace(request, rows=request.rows[a:b]) for a, b in bounds]
        fresh, judged, parts = self.system.ask_enough(requests, left.parts or [[] for _ in news], share)
        had = left.counts or (0,) * len(news)
        counts = tuple(max(0, old + new - share) for old, new in zip(had, news, strict=True))
        return fresh, judged, Left(counts, parts) if any(counts) else Left()

    def _take(self, n: int) -> tuple[int, ...]:
        """The data set's next ``n`` rows."""
        places = self.stream.take(n)
        return places if self.rows is None else tuple(int(self.rows[place]) for place in places)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the trained position and the groups begun there; rows, parts and begun groups of each
        step asked for ahead."""
        ahead = [
            {"step": one.step, "rows": list(one.rows), "parts": len(one.scored), "left": sum(one.left.counts)}
            for one in self._asked
        ]
        left = sum(self.left.counts)
        return {"stream": self.position, "left": left, "lag": self.cfg.controller.lag, "ahead": ahead}

    def save(self, path: Path) -> None:
        """Write the sample buffer's state, with the scored groups of the steps asked for ahead, and all begun ones."""
        counts = {one.step: len(one.scored) for one in self._asked}
        lefts = {self._next - 1: self.left} | {one.step: one.left for one in self._asked}
        parts = [part for one in self._asked for part in one.scored]
        begun = [part for left in lefts.values() for part in left.parts]
        left_counts = {step: len(left.parts) for step, left in lefts.items()}
        self.system.buffer.one(Batcher.save, path, counts, left_counts, *parts, *begun)

    def load(self, path: Path, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` from what :meth:`save` and :meth:`state_dict` gave. With another lag than the saved
        run's, its answers to later steps would be too old or too young: they are asked for anew.

        Raises:
            SkyrlError: if the stream does not give the rows again that were asked for ahead.
        """
        self.system.buffer.one(Batcher.load, path)
        self.stream.load_state_dict(state["stream"])
        self.position, self._next = state["stream"], step + 1
        self.left = self._restored(step, state["left"])
        self._asked.clear()
        for saved in state["ahead"] if state["lag"] == self.cfg.controller.lag else ():
            rows = self._take(len(saved["rows"]))
            if list(rows) != saved["rows"]:
                raise SkyrlError(
                    f"the checkpoint holds answers to rows {saved['rows']} for step {saved['step']}, the "
                    f"data now give {list(rows)}; resume with the data and the pool of the first start"
                )
            parts = [
                self.system.buffer.ask(Batcher.pending, saved["step"], place)[0] for place in range(saved["parts"])
            ]
            left = self._restored(saved["step"], saved["left"])
            self._asked.append(Rollout(saved["step"], rows, self.stream.state_dict(), parts, parts, parts, left))

    def start_over(self, position: dict[str, Any]) -> None:
        """Forget all that was asked, and take the rows from ``position``, the beginning, again."""
        self.stream.load_state_dict(position)
        self.position, self._next, self.left = position, 1, Left()
        self._asked.clear()

    def _restored(self, step: int, count: int) -> Left:
        """What the step left, shared by the members of this run, of which there may be more or fewer now."""
        if count == 0:
            return Left()
        members = self.cfg.rollout.num_workers
        bounds = [count * place // members for place in range(members + 1)]
        return Left(
            tuple(b - a for a, b in pairwise(bounds)), self.system.buffer.deal(Batcher.begun, [step], pieces=members)
        )
