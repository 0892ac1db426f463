"""The Selective Sample Buffer (Skywork R1V2): effective samples of earlier steps, drawn with P ∝ |advantage|^alpha.

docs/selective_sample_buffer.md says what it is for, what P is, and what was chosen where the paper is silent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl.records import Sample, SampleGroup
from skyrl.replay.priorities import EvictionQueue, Recency, SumTree, draw_mixture
from skyrl.replay.store import Entry, Store, StoredPrompt, by_prompt, own_prompt, own_sample, read_records
from skyrl.settings import BufferConfig, Eviction, Unit

PRIORITIES = (1e-50, 1e50)
"""|A|^alpha below the first counts as 0, above the second is an error."""
FADING_BITS = 500
"""recency^max_age may be no smaller than 2^-500. With ``PRIORITIES`` and ``HEADROOM_BITS`` this keeps every weight a
normal float."""
HEADROOM_BITS = 400
"""The newest weights may have grown by 2^400 before all are shifted down."""
STATE_KEYS = {"capacity", "unit", "leaves", "free", "counts", "unit_prompts", "samples", "prompts", "rng"}


@dataclass(slots=True, frozen=True)
class Drawn:
    """One sample out of the buffer."""

    stored: StoredPrompt
    sample: Sample
    probability: float
    """P of its unit: the chance that this sample (or its group) is drawn first."""


class SelectiveSampleBuffer:
    """Keeps effective samples, makes room at capacity, drops the outdated by age, and draws by |advantage|.

    The age of a sample is the current policy version minus the version that drew it; a group is as old as its oldest
    sample. Samples may arrive in any order of versions. A *unit* is a sample or a group (``BufferConfig.unit``), and
    with N units the chance of being drawn first is::

        P = (1 − uniform_share) · priority / Σ priority + uniform_share / N
        priority = |A|^alpha · recency^age, with the mean of |A|^alpha over the samples of a group

    Equal seeds and equal calls give equal draws, also across ``state_dict``.
    """

    def __init__(self, cfg: BufferConfig, seed: int) -> None:
        """
        Args:
            cfg: the settings. ``enabled``, ``mix``, ``fill_target`` and ``importance_correction`` are not used here.
            seed: of the buffer's own random generator.

        Raises:
            ValueError: for a setting outside its limits.
        """
        _check(cfg)
        self.cfg = cfg
        self._rng = np.random.default_rng(seed)
        self._recency = Recency(cfg.recency)
        self._clear()

    def __len__(self) -> int:
        return self._store.size

    def add(self, groups: list[SampleGroup], version: int) -> int:
        """Drop what is older than ``max_age``, then keep the effective samples of ``groups`` that can be drawn.

        At capacity the first units in the order of eviction go until the new one fits: ``oldest`` the one that came
        first; ``smallest`` the smallest priority, recency included, among equals the one that came first. That may be
        the new one itself. Passed over: samples that are not effective, whose hybrid advantage (hence priority)
        is 0, or that are already older than ``max_age``.

        Args:
            groups: scored groups.
            version: the current policy version.

        Returns:
            The number of their samples that are in the buffer afterwards.

        Raises:
            ValueError: for an advantage that is not finite or too large for alpha, a sample newer than ``version``, or
                a group that is larger than the buffer. Nothing is added then.
        """
        wanted = [(group, self._select(group, version)) for group in groups]
        self._expire(version)
        self._rebase(version)
        changed: dict[int, float] = {}
        first = self._queue.next_number
        for group, samples in wanted:
            if samples:
                stored = own_prompt(group)
                for unit in self._units(tuple(map(own_sample, samples))):
                    self._insert(self._entry(stored, unit), changed)
        self._set_weights(changed)
        return sum([len(self._store[leaf].samples) for leaf in changed if self._queue.number(leaf) >= first])

    def draw(self, n: int, version: int) -> list[Drawn]:
        """Drop what is older than ``max_age``, then draw up to ``n`` samples without replacement.

        Units come one after the other, each with chance ∝ P among those not drawn yet (successive sampling). The first
        group that does not fit into ``n`` ends the draw: passing over it would prefer small groups. The drawn samples
        stay in the buffer. Fewer than ``n`` come back if fewer are there.

        Args:
            n: samples wanted, 0 or more.
            version: the current policy version.

        Raises:
            ValueError: for a negative ``n``.
        """
        self._expire(version)
        if n < 0:
            raise ValueError(f"n is {n}; allowed: 0 or more")
        if n == 0 or not len(self):
            return []
        share = self.cfg.uniform_share
        by_priority, by_number = (1 - share) / self._tree.total, share / len(self._queue)
        mixture = [(self._tree, by_priority)]
        if self._ones is not None:
            mixture.append((self._ones, by_number))
        leaves = draw_mixture(mixture, n, self._rng)
        chances = by_priority * self._tree.get(leaves) + by_number
        drawn: list[Drawn] = []
        for leaf, chance in zip(leaves.tolist(), chances.tolist(), strict=True):
            entry = self._store[leaf]
            if len(drawn) + len(entry.samples) > n:
                break
            drawn += [Drawn(entry.stored, sample, chance) for sample in entry.samples]
        return drawn

    def stats(self, version: int) -> dict[str, float]:
        """``size`` (samples), ``prompts`` (groups they belong to), ``priority_mass`` (Σ priority over the units), and,
        unless empty, ``age_mean`` and ``age_max`` of the samples in policy versions."""
        fraction, exponent = self._recency.split(version)
        mass = math.ldexp(self._tree.total / fraction, self._shift - exponent)
        size, prompts = float(len(self)), float(self._store.prompts)
        return {"size": size, "prompts": prompts, "priority_mass": mass} | self._store.ages(version)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, each prompt once; picklable, holding the records themselves."""
        leaves = self._queue.by_arrival()
        return {
            "capacity": self.cfg.capacity,
            "unit": self.cfg.unit.value,
            "leaves": np.array(leaves, dtype=np.int64),
            "free": np.array(self._store.free, dtype=np.int64),
            "rng": self._rng.bit_generator.state,
        } | self._store.records(leaves)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the whole content by that of :meth:`state_dict`.

        With the same settings the following draws are those that the saved buffer would have made. All settings may
        differ; with another ``capacity`` or ``unit`` the samples are added anew in the order in which they came.

        Raises:
            ValueError: if a key is missing, as in a state that an older version of this class saved.
        """
        if missing := STATE_KEYS - state.keys():
            raise ValueError(
                f"buffer state lacks {sorted(missing)}: another version of skyrl saved it; go on with that version, or "
                "start a new run from its exported policy"
            )
        self._clear()
        units = read_records(state)
        self._rebase(max((sample.policy_version for sample in state["samples"]), default=0))
        changed: dict[int, float] = {}
        if (state["capacity"], state["unit"]) == (self.cfg.capacity, self.cfg.unit.value):
            self._store.free = state["free"].tolist()
            for leaf, (stored, samples) in zip(state["leaves"].tolist(), units, strict=True):
                self._put(leaf, self._entry(stored, samples), changed)
        else:
            for stored, samples in by_prompt(units):
                for unit in self._units(samples):
                    self._insert(self._entry(stored, unit), changed)
        self._set_weights(changed)
        self._rng.bit_generator.state = state["rng"]

    # ------------------------------------------------------------------ inside

    def _clear(self) -> None:
        capacity = self.cfg.capacity
        self._store = Store(capacity)
        self._queue = EvictionQueue(capacity)
        self._tree = SumTree(capacity)
        self._shift = 0
        """The tree's weights are |A|^alpha · recency^(-version) · 2^(-shift)."""
        self._ones = SumTree(capacity) if self.cfg.uniform_share > 0 else None

    def _priority(self, sample: Sample) -> float:
        # Python's pow on one float: numpy's vectorised one may differ in the last bit with the place in the array.
        try:
            priority = abs(sample.advantage) ** self.cfg.alpha if sample.advantage else 0.0
        except OverflowError:
            return math.inf
        return priority if priority >= PRIORITIES[0] else 0.0

    def _select(self, group: SampleGroup, version: int) -> list[Sample]:
        """The samples of a group worth keeping."""
        selected = []
        for sample in group.samples:
            if not sample.effective:
                continue
            if not math.isfinite(sample.advantage):
                raise ValueError(f"{_where(group, sample)}: advantage is {sample.advantage}; allowed: finite")
            if (made := sample.policy_version) > version:
                raise ValueError(
                    f"{_where(group, sample)}: policy version {made}; allowed: up to {version}, the current"
                )
            if (priority := self._priority(sample)) > PRIORITIES[1]:
                power = f"|{sample.advantage}|^{self.cfg.alpha:g}"
                raise ValueError(f"{_where(group, sample)}: {power} is above 1e50; lower alpha")
            if priority > 0 and version - made <= self.cfg.max_age:
                selected.append(sample)
        if self.cfg.unit is Unit.group and len(selected) > self.cfg.capacity:
            raise ValueError(
                f"prompt {group.prompt.id}: {len(selected)} samples to keep together; capacity is {self.cfg.capacity}"
            )
        return selected

    def _units(self, samples: tuple[Sample, ...]) -> list[tuple[Sample, ...]]:
        """The kept samples of one prompt, parted into what is drawn together."""
        return [samples] if self.cfg.unit is Unit.group else [(sample,) for sample in samples]

    def _entry(self, stored: StoredPrompt, samples: tuple[Sample, ...]) -> Entry:
        priority = sum([self._priority(sample) for sample in samples]) / len(samples)
        version = min([sample.policy_version for sample in samples])
        if self.cfg.eviction is Eviction.oldest:
            return Entry(stored, samples, priority, version, eviction_key=0.0)
        # log2 of the weight: its order is that of the priorities at any version.
        return Entry(stored, samples, priority, version, math.log2(priority) + version * self._recency.bits)

    def _insert(self, entry: Entry, changed: dict[int, float]) -> None:
        """Make room and put the entry in, unless it is itself the first to go. New weights are noted in ``changed``.

        With ``unit=group`` smaller units may have gone before one turns up that is worth more than the entry: the
        buffer then keeps a little less than it could.
        """
        store, count = self._store, len(entry.samples)
        while store.size + count > store.capacity:
            key, leaf = self._queue.first()
            if entry.eviction_key < key:
                return
            self._release(leaf)
            changed[leaf] = 0.0
        self._put(store.free.pop(), entry, changed)

    def _put(self, leaf: int, entry: Entry, changed: dict[int, float]) -> None:
        self._store.put(leaf, entry)
        self._queue.push(leaf, entry.eviction_key)
        fraction, exponent = self._recency.split(entry.version)
        changed[leaf] = math.ldexp(entry.priority * fraction, exponent - self._shift)

    def _release(self, leaf: int) -> None:
        self._store.release(leaf)
        self._queue.remove(leaf)

    def _expire(self, version: int) -> None:
        """Drop every unit older than ``max_age``."""
        outdated = self._store.older_than(version - self.cfg.max_age)
        for leaf in outdated:
            self._release(leaf)
        self._set_weights(dict.fromkeys(outdated, 0.0))

    def _rebase(self, version: int) -> None:
        """Shift all weights by a power of two before those of ``version`` become too large."""
        _, exponent = self._recency.split(version)
        if exponent - self._shift > HEADROOM_BITS:
            if len(self):
                self._tree.scale(self._shift - exponent)
            self._shift = exponent

    def _set_weights(self, changed: dict[int, float]) -> None:
        leaves, weights = np.array(list(changed), dtype=np.int64), np.array(list(changed.values()))
        self._tree.set(leaves, weights)
        if self._ones is not None:
            self._ones.set(leaves, weights > 0)


def _where(group: SampleGroup, sample: Sample) -> str:
    return f"prompt {group.prompt.id}, sample {sample.index}"


def _check(cfg: BufferConfig) -> None:
    if cfg.capacity < 1 or cfg.max_age < 0 or not (math.isfinite(cfg.alpha) and cfg.alpha >= 0):
        raise ValueError(
            f"capacity is {cfg.capacity}, max_age {cfg.max_age}, alpha {cfg.alpha}; "
            "allowed: 1 or more, 0 or more, 0 or more"
        )
    if not 0 < cfg.recency <= 1 or not 0 <= cfg.uniform_share <= 1:
        raise ValueError(
            f"recency is {cfg.recency}, uniform_share {cfg.uniform_share}; allowed: above 0 and at most 1, 0 … 1"
        )
    bits = Recency(cfg.recency).bits
    if bits * cfg.max_age > FADING_BITS:
        raise ValueError(
            f"recency is {cfg.recency} with max_age {cfg.max_age}; allowed: a max_age of up to "
            f"{int(FADING_BITS / bits)}: what is older would never be drawn"
        )
