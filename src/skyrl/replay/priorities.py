"""What the Selective Sample Buffer ranks by: sum trees to draw from, recency factors, and the order of eviction."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np


class SumTree:
    """Non-negative weights at ``size`` leaves, with their sums level by level up to the root.

    Every update recomputes the parents from their children, so the sums never drift from the leaves, and setting a
    leaf back to its old weight restores every sum to the last bit. Work on k leaves costs O(k log size), all of
    it inside numpy.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: number of leaves, at least 1; all start at weight 0.

        Raises:
            ValueError: for a size below 1.
        """
        if size < 1:
            raise ValueError(f"size is {size}; allowed: 1 or more")
        self.size = size
        depth = (size - 1).bit_length()
        self._levels = [np.zeros(1 << (depth - level)) for level in range(depth + 1)]

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._levels[-1][0])

    def get(self, leaves: np.ndarray) -> np.ndarray:
        """float64 [k]: weights of the leaves int [k]."""
        return self._levels[0][leaves]

    def scale(self, exponent: int) -> None:
        """Multiply every weight by 2^exponent; exact, as long as no weight leaves the range of normal floats."""
        factor = math.ldexp(1.0, exponent)
        for level in self._levels:
            level *= factor

    def set(self, leaves: np.ndarray, weights: np.ndarray) -> None:
        """Set the weights float [k] of the leaves int [k], which must be distinct.

        Raises:
            ValueError: for a leaf outside 0 … size-1, or a weight that is negative or not finite.
        """
        leaves, weights = np.asarray(leaves, dtype=np.int64), np.asarray(weights, dtype=np.float64)
        if leaves.size == 0:
            return
        if leaves.min() < 0 or leaves.max() >= self.size:
            raise ValueError(f"leaves {leaves.min()} … {leaves.max()}; allowed: 0 … {self.size - 1}")
        if not (np.isfinite(weights).all() and weights.min() >= 0):
            raise ValueError(f"weights from {weights.min()} to {weights.max()}; allowed: finite and 0 or more")
        self._levels[0][leaves] = weights
        nodes = leaves
        for below, level in zip(self._levels, self._levels[1:], strict=False):
            nodes = nodes >> 1
            level[nodes] = below[2 * nodes] + below[2 * nodes + 1]

    def sums(self, depth: int) -> np.ndarray:
        """Sums ``depth`` levels below the root: float64 [2^depth]; not a copy."""
        return self._levels[-1 - depth]

    @property
    def depth(self) -> int:
        """Levels from the root to the leaves."""
        return len(self._levels) - 1


BUCKETS = 64
"""Buckets of an :class:`EvictionQueue` for keys that differ by 1."""
_Place = tuple[float, int, int]
"""Key, number of arrival, leaf."""
Mixture = Sequence[tuple[SumTree, float]]
"""Trees of equal size with their coefficients: the weight of a leaf is Σ coefficient · its weight in each tree."""


def draw_mixture(mixture: Mixture, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to ``n`` distinct leaves one after the other, each with P ∝ its mixed weight among those not drawn yet.

    Drawing with replacement and passing over repeats gives exactly this law (successive sampling), so leaves are
    drawn in batches. What is still missing after a batch is drawn from the trees with the drawn leaves at 0; that
    keeps the number of rounds small where few leaves hold most of the weight. The coefficients stay what they were,
    so what remains is the same mixture. A leaf of weight 0 is never drawn. The trees are unchanged afterwards.

    Returns:
        int64 [k] in the order drawn; k < n only if fewer leaves have a weight above 0.

    Raises:
        ValueError: for a negative ``n``.
    """
    if n < 0:
        raise ValueError(f"n is {n}; allowed: 0 or more")
    drawn: list[np.ndarray] = []
    weights: list[list[np.ndarray]] = []
    missing = n
    try:
        while missing > 0 and (total := sum(coefficient * tree.total for tree, coefficient in mixture)) > 0:
            leaves = _descend(mixture, rng.random(missing) * total)
            _, first = np.unique(leaves, return_index=True)
            fresh = leaves[np.sort(first)]
            drawn.append(fresh)
            weights.append([tree.get(fresh) for tree, _ in mixture])
            missing -= fresh.size
            if missing:
                for tree, _ in mixture:
                    tree.set(fresh, np.zeros(fresh.size))
    finally:
        if len(drawn) > 1 or missing:
            for leaves, old in zip(drawn, weights, strict=True):
                for (tree, _), own in zip(mixture, old, strict=True):
                    tree.set(leaves, own)
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def _descend(mixture: Mixture, points: np.ndarray) -> np.ndarray:
    """Leaf whose interval of the cumulated mixed weights holds each point in [0, total)."""
    nodes = np.zeros(points.size, dtype=np.int64)
    for depth in range(1, mixture[0][0].depth + 1):
        left = 2 * nodes
        left_sum, right_sum = _mixed(mixture, depth, left), _mixed(mixture, depth, left + 1)
        # Rounding may leave a point at or past the end of its subtree; without the second condition it
        # would run off into a branch of weight 0.
        go_right = (points >= left_sum) & (right_sum > 0)
        points = points - left_sum * go_right
        nodes = left + go_right
    return nodes


def _mixed(mixture: Mixture, depth: int, nodes: np.ndarray) -> np.ndarray:
    (tree, coefficient), *others = mixture
    mixed = coefficient * tree.sums(depth)[nodes]
    for tree, coefficient in others:
        mixed += coefficient * tree.sums(depth)[nodes]
    return mixed


class Recency:
    """Factors recency^age, kept relative: a weight is multiplied by recency^(-version) once, at insertion, and then the
    *ratio* of any two is right at every later version without touching them.

    recency^(-version) itself leaves the range of floats after some hundred versions. So it is split into a fraction
    and a power of two: a shift of all exponents, exact in floats, brings the weights back into range.
    """

    def __init__(self, recency: float) -> None:
        """
        Args:
            recency: factor of one version of age, above 0 and at most 1.
        """
        self.bits = -math.log2(recency)
        """Binary digits that a weight loses with each version."""
        self._last: tuple[int, tuple[float, int]] = (0, (1.0, 0))  # most calls repeat the version of the one before

    def split(self, version: int) -> tuple[float, int]:
        """``(fraction, exponent)``: recency^(-version) = fraction · 2^exponent, fraction in [1, 2)."""
        if version != self._last[0]:
            power = version * self.bits
            exponent = math.floor(power)
            self._last = (version, (2.0 ** (power - exponent), exponent))
        return self._last[1]


class EvictionQueue:
    """Leaves in the order in which they make room: the smallest key first, among equals the one that came first.

    Leaves that come in order wait in a line; with equal keys it is the line alone. The others are sorted roughly, into
    buckets of similar keys, of which only the lowest is kept as a heap: one heap of a million would miss the
    cache at every level. A leaf that leaves from the middle stays there as a mark without meaning, which is passed over
    when it comes up. When the marks outnumber the rest they are cleared.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: number of leaves.
        """
        self._line: deque[_Place] = deque()
        self._buckets: dict[int, list[_Place]] = {}
        self._order: list[int] = []
        """Numbers of the buckets, a heap."""
        self._heap: int | None = None
        """Number of the bucket that is a heap."""
        self._numbers = [-1] * size
        self._living = 0
        self._marks = 0
        self.next_number = 0
        """Number that the next leaf gets: they count arrivals."""

    def __len__(self) -> int:
        return self._living

    def push(self, leaf: int, key: float) -> None:
        """Add a leaf that is not in the queue."""
        place = (key, self.next_number, leaf)
        if not self._line or self._line[-1] < place:
            self._line.append(place)
        elif (number := math.floor(key * BUCKETS)) not in self._buckets:
            self._buckets[number] = [place]
            heapq.heappush(self._order, number)
        elif number == self._heap:
            heapq.heappush(self._buckets[number], place)
        else:
            self._buckets[number].append(place)
        self._numbers[leaf] = self.next_number
        self.next_number += 1
        self._living += 1

    def remove(self, leaf: int) -> None:
        """Take a leaf out, wherever it stands."""
        self._numbers[leaf] = -1
        self._living -= 1
        self._marks += 1
        if self._marks > self._living + 64:
            # Sorted, so that all may stand in the line.
            self._line = deque(sorted(self._places()))
            self._buckets, self._order, self._heap, self._marks = {}, [], None, 0

    def first(self) -> tuple[float, int]:
        """``(key, leaf)`` of the leaf that goes next; it stays in the queue.

        Raises:
            IndexError: if the queue is empty.
        """
        line, numbers = self._line, self._numbers
        while line and numbers[line[0][2]] != line[0][1]:
            line.popleft()
            self._marks -= 1
        lowest = self._lowest()
        key, _, leaf = lowest if lowest is not None and (not line or lowest < line[0]) else line[0]
        return key, leaf

    def _lowest(self) -> _Place | None:
        """The first living place in the buckets."""
        numbers = self._numbers
        while self._order:
            number = self._order[0]
            bucket = self._buckets[number]
            if number != self._heap:
                heapq.heapify(bucket)
                self._heap = number
            while bucket and numbers[bucket[0][2]] != bucket[0][1]:
                heapq.heappop(bucket)
                self._marks -= 1
            if bucket:
                return bucket[0]
            del self._buckets[heapq.heappop(self._order)]
            self._heap = None
        return None

    def number(self, leaf: int) -> int:
        """How many came before this leaf; -1 if it is not in the queue."""
        return self._numbers[leaf]

    def by_arrival(self) -> list[int]:
        """All leaves in the order in which they came."""
        return [leaf for _, leaf in sorted((number, leaf) for _, number, leaf in self._places())]

    def _places(self) -> Iterator[_Place]:
        return (place for place in chain(self._line, *self._buckets.values()) if self._numbers[place[2]] == place[1])
