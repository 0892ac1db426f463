"""The Selective Sample Buffer (Skywork R1V2): effective samples of earlier steps, drawn with P ∝ |advantage|^alpha.

docs/selective_sample_buffer.md says what it is for, what P is, and what was chosen where the paper is silent.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.replay.race import race
from skyrl.settings import BufferConfig, Eviction, Unit
from skyrl.settings.buffer import MAX_DECAY_BITS

PRIORITIES = (1e-50, 1e50)
"""|A|^alpha below the first counts as 0, above the second is an error. With ``MAX_DECAY_BITS`` every weight is then a
normal float."""
LAYOUT = 3
"""Number of the layout of ``state_dict``; 1 and 2 had none written in them."""
ROW = np.dtype(
    [
        ("prompt", object),
        ("prompt_ids", object),
        ("samples", object),  # a tuple
        ("count", np.int64),  # its length
        ("group", np.int64),  # number of the group, equal for all of its units
        ("priority", np.float64),  # |A|^alpha, the mean over the samples
        ("version", np.int64),  # policy version of the oldest sample
    ]
)
"""A unit: what is drawn and makes room as a whole."""


class SavedBuffer(TypedDict):
    """What :meth:`SelectiveSampleBuffer.state_dict` gives."""

    layout: int
    samples: list[Sample]
    sample_prompts: np.ndarray
    """int64 [N]: each sample's place in ``prompts``."""
    prompts: list[tuple[Prompt, np.ndarray]]
    """With their ids, int32 [P]."""
    rng: dict[str, Any]
    """The random generator's state, numbers and its name."""


@dataclass(slots=True, frozen=True)
class Drawn:
    """One sample out of the buffer, with its prompt."""

    prompt: Prompt
    prompt_ids: np.ndarray
    """int32 [P], the same array for all samples of a group."""
    sample: Sample
    probability: float
    """P of its unit: the chance that this sample (or its group) is drawn first."""


class SelectiveSampleBuffer:
    """Keeps effective samples, makes room at capacity, drops the outdated, and draws by |advantage|.

    Each step of a run first draws, then adds what it sampled. ``state_dict`` is what a checkpoint keeps of it::

        add ──▶ held ──draw──▶ held, and replayed      a sample may be drawn in many steps, never twice in one
                 └──▶ gone: older than ``max_age``, or displaced at ``capacity``

    A *unit* is a sample, or with ``unit=group`` all kept samples of a group. With N units, P is the chance of a unit
    to be drawn first; the age of a sample is the current policy version minus the version that drew it, and a group is
    as old as its oldest sample::

        P = (1 − uniform_share) · priority / Σ priority + uniform_share / N
        priority = |A|^alpha · recency^age, with the mean of |A|^alpha over the samples of a group

    What always holds: at most ``capacity`` samples; every priority is above 0; units stand in the order in which they
    came, those of one group side by side; a prompt is kept once for its group; equal seeds and equal calls give equal
    draws, also across ``state_dict``.

    Example: one right answer of four has |A| = √3, each wrong one 1/√3, so half of all first draws are the right one::

        >>> ids = np.array([7], dtype=np.int32)
        >>> answers = [
        ...     Sample(i, ids, None, text="", truncated=False, policy_version=0, advantage=a, rule_advantage=a)
        ...     for i, a in enumerate([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
        ... ]
        >>> buffer = SelectiveSampleBuffer(BufferConfig(max_age=2), seed=0)
        >>> buffer.add([SampleGroup(Prompt("sum/1", "1 + 2 = ?", (), "3", "numeric"), ids, answers)], version=0)
        4
        >>> drawn = buffer.draw(4, version=2)
        >>> sorted((one.sample.index, round(one.probability, 3)) for one in drawn)
        [(0, 0.5), (1, 0.167), (2, 0.167), (3, 0.167)]
        >>> buffer.draw(4, version=3), len(buffer)  # older than max_age
        ([], 0)
    """

    def __init__(self, cfg: BufferConfig, seed: int) -> None:
        """
        Args:
            cfg: the settings. ``enabled``, ``mix``, ``fill_target`` and ``importance_correction`` are not used here.
            seed: of the buffer's own random generator.

        Raises:
            ValueError: if recency^max_age is below 2^-500.
        """
        if (bits := -math.log2(cfg.recency)) * cfg.max_age > MAX_DECAY_BITS:
            raise ValueError(
                f"recency is {cfg.recency} with max_age {cfg.max_age}; allowed: a max_age of up to "
                f"{int(MAX_DECAY_BITS / bits)}: what is older would never be drawn"
            )
        self.cfg = cfg
        self._rng = np.random.default_rng(seed)
        self._rows = np.zeros(0, ROW)
        self._groups = 0

    def __len__(self) -> int:
        return int(self._rows["count"].sum())

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
        rows = self._rank((group.prompt, group.prompt_ids, self._select(group, version)) for group in groups)
        self._rows = self._young(self._rows, version)
        return self._put(rows)

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
        self._rows = self._young(self._rows, version)
        if n < 0:
            raise ValueError(f"n is {n}; allowed: 0 or more")
        if n == 0 or not len(self._rows):
            return []
        weights, share = self._weights(self._rows), self.cfg.uniform_share
        chances = (1 - share) / weights.sum() * weights + share / len(weights)
        drawn: list[Drawn] = []
        for place in race(chances, n, self._rng).tolist():
            row, chance = self._rows[place], float(chances[place])
            if len(drawn) + row["count"] > n:
                break
            drawn += [Drawn(row["prompt"], row["prompt_ids"], sample, chance) for sample in row["samples"]]
        return drawn

    def stats(self, version: int) -> dict[str, float]:
        """``size`` (samples), ``prompts`` (groups they belong to), ``priority_mass`` (Σ priority over the units), and,
        unless empty, ``age_mean`` and ``age_max`` of the samples in policy versions."""
        rows, size = self._rows, len(self)
        stats = {"size": float(size), "prompts": float(len(np.unique(rows["group"]))), "priority_mass": 0.0}
        if size:
            ages = version - rows["version"]
            stats["priority_mass"] = float(self._weights(rows).sum()) * self.cfg.recency ** int(ages.min())
            stats |= {"age_mean": int(ages @ rows["count"]) / size, "age_max": float(ages.max())}
        return stats

    def state_dict(self) -> SavedBuffer:
        """Everything that later draws depend on, each prompt once; it holds the records themselves."""
        rows = self._rows
        _, first, group = np.unique(rows["group"], return_index=True, return_inverse=True)
        return {
            "layout": LAYOUT,
            "samples": [sample for samples in rows["samples"] for sample in samples],
            "sample_prompts": np.repeat(group, rows["count"]),
            "prompts": list(zip(rows["prompt"][first], rows["prompt_ids"][first], strict=True)),
            "rng": self.random_state(),
        }

    def random_state(self) -> dict[str, Any]:
        """Of the random generator: plain numbers and its name."""
        return dict(self._rng.bit_generator.state)

    def redo(self, groups: list[SampleGroup], version: int, random_state: dict[str, Any]) -> None:
        """Bring about what a :meth:`draw` and an :meth:`add` of these groups at ``version`` left behind, given the
        :meth:`random_state` that followed. Errors as those of :meth:`add` and :meth:`load_state_dict`."""
        self.add(groups, version)
        self._rng.bit_generator.state = random_state

    def load_state_dict(self, state: SavedBuffer) -> None:
        """Replace the whole content by that of :meth:`state_dict`.

        With the same settings the following draws are those that the saved buffer would have made. All settings may
        differ: the samples are added anew in the order in which they came.

        Raises:
            ValueError: for a state of another layout, and for samples that these settings refuse (see :meth:`add`).
                The buffer stays as it was then.
            LookupError, TypeError: for a random generator's state that is none.
        """
        if (layout := state.get("layout", 2 if "leaves" in state else 1)) != LAYOUT:
            raise ValueError(
                f"the sample buffer's state has layout {layout}, that of {'older' if layout < LAYOUT else 'newer'} "
                f"checkpoints; this version of skyrl reads layout {LAYOUT}. Go on with the version that saved it, or "
                "start a new run from its exported policy"
            )
        if not np.isin(state["sample_prompts"], np.arange(len(state["prompts"]))).all():
            raise ValueError("the sample buffer's state names a prompt that it lacks")
        members: list[list[Sample]] = [[] for _ in state["prompts"]]
        for sample, place in zip(state["samples"], state["sample_prompts"].tolist(), strict=True):
            members[place].append(sample)
        rows = self._rank((*prompt, samples) for prompt, samples in zip(state["prompts"], members, strict=True))
        self._rng.bit_generator.state = state["rng"]
        self._rows = np.zeros(0, ROW)
        self._put(self._young(rows, int(rows["version"].max(initial=0))))

    # ------------------------------------------------------------------ inside

    def _select(self, group: SampleGroup, version: int) -> list[Sample]:
        """The effective samples of a group that are young enough."""
        selected = [sample for sample in group.samples if sample.effective]
        for sample in selected:
            if (made := sample.policy_version) > version:
                raise ValueError(
                    f"{_where(group.prompt, sample)}: policy version {made}; allowed: up to {version}, the current"
                )
        return [sample for sample in selected if version - sample.policy_version <= self.cfg.max_age]

    def _priority(self, prompt: Prompt, sample: Sample) -> float:
        """|A|^alpha; 0 if it is too small to count."""
        advantage = sample.advantage
        if not math.isfinite(advantage):
            raise ValueError(f"{_where(prompt, sample)}: advantage is {advantage}; allowed: finite")
        try:
            # Python's pow on one float: numpy's vectorised one may differ in the last bit with the place in the array.
            priority = abs(advantage) ** self.cfg.alpha if advantage else 0.0
        except OverflowError:
            priority = math.inf
        if priority > PRIORITIES[1]:
            power = f"|{advantage}|^{self.cfg.alpha:g}"
            raise ValueError(f"{_where(prompt, sample)}: {power} is above 1e50; lower alpha")
        return priority if priority >= PRIORITIES[0] else 0.0

    def _rank(self, groups: Iterable[tuple[Prompt, np.ndarray, list[Sample]]]) -> np.ndarray:
        """The samples as rows, parted into units; those of priority 0 are left out."""
        whole, rows = self.cfg.unit is Unit.group, []
        for prompt, prompt_ids, samples in groups:
            ranked = [(_own_sample(one), p) for one in samples if (p := self._priority(prompt, one)) > 0]
            if whole and len(ranked) > self.cfg.capacity:
                raise ValueError(
                    f"prompt {prompt.id}: {len(ranked)} samples to keep together; capacity is {self.cfg.capacity}"
                )
            if ranked:
                own = replace(prompt, images=tuple(map(_own, prompt.images))), _own(prompt_ids)
                self._groups += 1
            for unit in [ranked] if whole and ranked else [[one] for one in ranked]:
                kept, priorities = zip(*unit, strict=True)
                oldest = min(sample.policy_version for sample in kept)
                rows.append((*own, kept, len(kept), self._groups, sum(priorities) / len(kept), oldest))
        return np.array(rows, ROW)

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """float64 [N]: priorities with ages counted from the youngest unit; their ratios hold at every version."""
        ages = rows["version"].max(initial=0) - rows["version"]
        factors = [self.cfg.recency**age for age in range(int(ages.max(initial=0)) + 1)]  # Python's pow, as above
        weights: np.ndarray = rows["priority"] * np.array(factors)[ages]
        return weights

    def _young(self, rows: np.ndarray, version: int) -> np.ndarray:
        """The rows without those older than ``max_age``."""
        old = version - rows["version"] > self.cfg.max_age
        return rows[~old] if old.any() else rows

    def _put(self, new: np.ndarray) -> int:
        """Take in the new rows one by one, each time making room; returns how many of their samples stay.

        With ``unit=group`` smaller units may have gone before one turns up that is worth more than the new one: the
        buffer then keeps a little less than it could.
        """
        before, room = len(self._rows), self.cfg.capacity - len(self)
        rows = np.concatenate([self._rows, new])
        keep = np.ones(len(rows), dtype=bool)
        keys = self._weights(rows) if self.cfg.eviction is Eviction.smallest else np.zeros(len(rows))
        # For each new sample one old unit may have to go, no more. A sorted list is a heap.
        order = np.argsort(keys[:before], kind="stable")[: new["count"].sum()]
        leaving = list(zip(keys[order].tolist(), order.tolist(), strict=True))
        for place in range(before, len(rows)):
            heapq.heappush(leaving, (float(keys[place]), place))
            room -= int(rows["count"][place])
            while room < 0:
                _, gone = heapq.heappop(leaving)
                keep[gone] = False
                room += int(rows["count"][gone])
        self._rows = rows[keep]
        return int(new["count"][keep[before:]].sum())


def _where(prompt: Prompt, sample: Sample) -> str:
    return f"prompt {prompt.id}, sample {sample.index}"


def _own(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if it is a view: a view into shared memory or into a batch would keep all of
    that alive for as long as the sample stays in the buffer."""
    return array if array.flags.owndata else array.copy()


def _own_sample(sample: Sample) -> Sample:
    logprobs, versions = (None if one is None else _own(one) for one in (sample.logprobs, sample.versions))
    ids, mask = _own(sample.token_ids), _own(sample.mask)
    return replace(sample, token_ids=ids, logprobs=logprobs, mask=mask, versions=versions)
