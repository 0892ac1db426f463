"""The endless order in which training prompts are asked: a new shuffle for each pass over the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np

from skyrl.records import DataError


class Stream(Protocol):
    """An endless order of row numbers, whose position can be saved: :class:`PromptStream`, :class:`MixedStream`."""

    def take(self, n: int) -> tuple[int, ...]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PromptStream:
    """Row numbers of a data set, each once per epoch, in an order that depends on nothing but seed and calls. It holds
    8 bytes a row.

    A call of :meth:`take` that reaches the end of an epoch goes on in the next one. The rows it took already then wait
    a little: they move behind the part of the new epoch that this call takes, so that no prompt comes twice in a step.

    Args:
        size: Rows of the data set, 1 or more.
        seed: Seed of the shuffling, 0 or more. What is out of range is a :class:`DataError`.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1 or seed < 0:
            raise DataError(f"the prompt stream got size {size} and seed {seed}; allowed: 1 or more, and 0 or more")
        self.size, self.seed = size, seed
        self._begin(epoch=0, position=0, taken=(), head=0)

    def take(self, n: int) -> tuple[int, ...]:
        """The next ``n`` row numbers. No row comes twice, unless ``n`` is more than ``size``. A negative ``n`` is a
        :class:`DataError`."""
        if n < 0:
            raise DataError(f"the prompt stream was asked for {n} rows; allowed: 0 or more")
        rows: list[int] = []
        while len(rows) < n:
            if self._position == self.size:
                # With n above size repeats can't be avoided, and the plain shuffle is the fairest order.
                taken = tuple(rows) if n <= self.size else ()
                self._begin(self._epoch + 1, 0, taken, head=n - len(rows) if taken else 0)
            part = self._order[self._position : self._position + n - len(rows)]
            rows += part.tolist()
            self._position += len(part)
        return tuple(rows)

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as plain numbers: a stream that loads it goes on with the same rows."""
        state = {"size": self.size, "seed": self.seed, "epoch": self._epoch, "position": self._position}
        return state | {"taken": list(self._taken), "head": self._head}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. One of another number of rows or another seed, or that is incomplete or out of range,
        is a :class:`DataError` and changes nothing."""
        own, size = self.state_dict(), self.size
        if state.keys() != own.keys():
            raise DataError(f"state of the prompt stream has {sorted(state)}; allowed: exactly {sorted(own)}")
        for name in ("size", "seed"):
            if state[name] != own[name]:
                raise DataError(
                    f"the saved prompt stream has {name} {state[name]}, this run {own[name]}; a run can only go on "
                    "with the same data and data.seed. Start a new run from the exported policy to train on other data"
                )
        epoch, position, taken, head = state["epoch"], state["position"], tuple(state["taken"]), state["head"]
        fits = epoch >= 0 and 0 <= position <= size and 0 <= head <= size - len(taken)
        if not (fits and all(0 <= row < size for row in taken)):
            raise DataError(f"state of the prompt stream is out of range for {size} rows: {state}")
        self._begin(epoch, position, taken, head)

    def _begin(self, epoch: int, position: int, taken: tuple[int, ...], head: int) -> None:
        """Set up an epoch: its first ``head`` rows are none of ``taken``."""
        self._epoch, self._position, self._taken, self._head = epoch, position, taken, head
        self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        if taken:
            first = np.flatnonzero(~np.isin(self._order, taken))[:head]
            self._order = np.concatenate([self._order[first], np.delete(self._order, first)])


class MixedStream:
    """Row numbers of several parts that lie one behind the other. The share of each in every :meth:`take`, and in all
    of them together, follows its weight to within a row or two; each part has epochs of its own, by
    :class:`PromptStream`.

    Args:
        sizes: Rows of each part, 1 or more.
        weights: Share of each part, above 0, any scale.
        seed: Of the shuffling, 0 or more. What is out of range is a :class:`DataError`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise DataError(f"got the weights {list(weights)} for {len(sizes)} parts; allowed: one above 0 for each")
        self.sizes, self.weights, self.seed = list(sizes), [weight / sum(weights) for weight in weights], seed
        self._starts = [0, *accumulate(sizes)]
        self._parts, self._taken = self._fresh(), [0] * len(sizes)

    def take(self, n: int) -> tuple[int, ...]:
        """The next ``n`` row numbers; no row comes twice, unless a part's share is more than it has."""
        picks = list[int]()
        for _ in range(n):  # the part that is most behind
            total = sum(self._taken) + 1
            behind = [weight * total - taken for weight, taken in zip(self.weights, self._taken, strict=True)]
            picks.append(behind.index(max(behind)))
            self._taken[picks[-1]] += 1
        rows = [iter(part.take(picks.count(place))) for place, part in enumerate(self._parts)]
        return tuple(self._starts[place] + next(rows[place]) for place in picks)

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as plain numbers: a stream that loads it goes on with the same rows."""
        parts = [part.state_dict() for part in self._parts]
        return {"weights": list(self.weights), "taken": list(self._taken), "parts": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. One of other parts, weights or seed is a :class:`DataError` and changes nothing."""
        own, taken, parts = self.state_dict(), state.get("taken"), self._fresh()
        if state.keys() != own.keys() or len(state["parts"]) != len(parts) or state["weights"] != own["weights"]:
            raise DataError(
                f"the saved prompt stream has the weights {state.get('weights', 'of one file')}, this run "
                f"{own['weights']}; a run can only go on with the same data.train_path and data.weights"
            )
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        if not isinstance(taken, list) or len(taken) != len(parts) or min(taken) < 0:
            raise DataError(f"state of the prompt stream is out of range: it took {taken}")
        self._parts, self._taken = parts, list(taken)

    def _fresh(self) -> list[PromptStream]:
        return [PromptStream(size, self.seed + place) for place, size in enumerate(self.sizes)]


def rows_used(state: dict[str, Any]) -> int:
    """How many rows a stream with this ``state_dict`` has given."""
    if "parts" in state:
        return sum(state["taken"])
    return int(state["epoch"] * state["size"] + state["position"])


def prompt_stream(
    sizes: Sequence[int], seed: int, per_step: int, weights: Sequence[float] | None, rows: Sequence[int] | None = None
) -> Stream:
    """The stream over a data set of parts with these ``sizes``, or over the places of ``rows`` in it.

    Args:
        per_step: Prompts of a step.
        weights: Share of each part; None means by its size.
        rows: The data set's rows that are used, ascending; None means all.

    Raises:
        DataError: if a part has fewer rows than its share of a step may be: some would come twice.
    """
    if rows is not None:
        ends = np.searchsorted(np.asarray(rows), [0, *accumulate(sizes)])
        sizes = [int(end - start) for start, end in pairwise(ends)]
    if len(sizes) == 1:
        return PromptStream(sizes[0], seed)
    weights = weights or sizes
    for place, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        most = math.ceil(per_step * weight / sum(weights)) + 1
        if size < most:
            raise DataError(
                f"file {place + 1} of data.train_path has {size} prompts to train on, but its share of a step of "
                f"{per_step} may be {most}; lower its weight, or rollout.prompts_per_step"
            )
    return MixedStream(sizes, weights, seed)


def shares(weights: Sequence[float], n: int) -> list[int]:
    """``n`` split by weights into whole numbers, the largest remainders rounded up."""
    exact = [n * weight / sum(weights) for weight in weights]
    found = [math.floor(one) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: found[place] - exact[place])
    for place in by_rest[: n - sum(found)]:
        found[place] += 1
    return found
