"""A sum tree in numpy: weighted drawing without replacement among a million leaves in well under a millisecond each."""

from __future__ import annotations

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

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw up to ``n`` distinct leaves one after the other, each with P ∝ weight among those not drawn yet.

        Drawing with replacement and passing over repeats gives exactly this law (successive sampling), so leaves are
        drawn in batches. What is still missing after a batch is drawn from the tree with the drawn leaves at 0;
        that keeps the number of rounds small where few leaves hold most of the weight. A leaf of weight 0 is
        never drawn. The weights are unchanged afterwards.

        Returns:
            int64 [k] in the order drawn; k < n only if fewer leaves have a weight above 0.

        Raises:
            ValueError: for a negative ``n``.
        """
        if n < 0:
            raise ValueError(f"n is {n}; allowed: 0 or more")
        drawn: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        missing = n
        try:
            while missing > 0 and self.total > 0:
                leaves = self._descend(rng.random(missing) * self.total)
                _, first = np.unique(leaves, return_index=True)
                fresh = leaves[np.sort(first)]
                drawn.append(fresh)
                weights.append(self.get(fresh))
                missing -= fresh.size
                if missing:
                    self.set(fresh, np.zeros(fresh.size))
        finally:
            if len(drawn) > 1 or missing:
                for leaves, old in zip(drawn, weights, strict=True):
                    self.set(leaves, old)
        return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)

    def _descend(self, points: np.ndarray) -> np.ndarray:
        """Leaf whose interval of the cumulated weights holds each point in [0, total)."""
        nodes = np.zeros(points.size, dtype=np.int64)
        for level in self._levels[-2::-1]:
            left = 2 * nodes
            left_sum = level[left]
            # Rounding may leave a point at or past the end of its subtree; without the second condition it
            # would run off into a branch of weight 0.
            go_right = (points >= left_sum) & (level[left + 1] > 0)
            points = points - left_sum * go_right
            nodes = left + go_right
        return nodes
