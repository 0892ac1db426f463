"""The endless order in which training prompts are asked: a new shuffle for each pass over the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from skyrl.records import DataError


class PromptStream:
    """Row numbers of a data set, each once per epoch, in an order that depends on nothing but seed and calls.

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
