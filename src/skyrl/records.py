"""The records that flow through skyrl, from a prompt to a learner step.

One line, never reshaped into dictionaries::

    Prompt ──rollout──▶ SampleGroup[Sample] ──reward──▶ the same, scored ──buffer──▶ TrainBatch ──▶ learner

Arrays are numpy (this module imports no torch), so that a record travels through Ray's shared
memory without a copy. ``T`` is the number of answer tokens of one sample, ``P`` the number of prompt
tokens, ``G`` the number of samples in a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

Metrics = dict[str, float]
"""Metric name (docs/metrics.md defines each) → value. What was not measured has no key."""


@dataclass(slots=True, frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    parts: tuple[str | None, ...]
    """Texts and, as None, the places of the prompt's pictures, in reading order."""


@dataclass(slots=True, frozen=True)
class Check:
    """One comparison of an answer with a truth."""

    verifier: str
    """Name of a rule verifier, as in :class:`Prompt`."""
    truth: str
    weight: float = 1.0
    """Its share of the rule score, above 0; shares are divided by their sum."""


@dataclass(slots=True, frozen=True)
class Prompt:
    """One question, with its pictures and with what the verifier and the monitors need.

    Example::

        Prompt(id="train/17", question="What is the sum of the digits?", images=(scene,), answer="9",
               verifier="numeric", kind="sum", facts={"grid": [[3, 1], [4, 1]]})
    """

    id: str
    """Unique within the data set; errors and seeds name it."""
    question: str
    """The user's message without any picture placeholder; the chat template adds those. With ``turns``, the text of
    the last user's turn."""
    images: tuple[np.ndarray, ...]
    """RGB pictures, uint8 of shape [height, width, 3]; ``()`` for a text-only prompt."""
    answer: str
    """The ground truth that the verifier compares with."""
    verifier: str
    """Name of a rule verifier: a built-in one, or one of ``reward.verifiers``."""
    kind: str = "default"
    """Family of the question; accuracy is also reported per kind."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is known to be true of the picture, by name of the checker that knows how to read it. ``{}`` if unknown:
    then no claim can be checked. Never shown to the policy."""
    variant: str = ""
    """What was made of the data set's prompt: "" nothing, ``blind`` its pictures left out, ``masked`` most of each
    picture blackened, ``pair`` a prompt of the file of preference pairs."""
    turns: tuple[Turn, ...] = ()
    """The whole conversation, with the places of the pictures; ``()`` means one user's turn: all pictures, then
    ``question``."""
    checks: tuple[Check, ...] = ()
    """Several comparisons of one answer; ``()`` means that ``verifier`` alone compares it with ``answer``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, for reward functions of other systems. Never shown to the policy."""

    @property
    def key(self) -> tuple[str, str]:
        """What caches go by: two prompts of one key are the same prompt."""
        return self.id, self.variant

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """``turns``, also where it is ``()``. Places of pictures are left out where the prompt has none (``blind``)."""
        turns = self.turns or (Turn("user", (*(None for _ in self.images), self.question)),)
        if self.images:
            return turns
        return tuple(replace(turn, parts=tuple(part for part in turn.parts if part is not None)) for turn in turns)

    @property
    def all_checks(self) -> tuple[Check, ...]:
        """``checks``, also where it is ``()``."""
        return self.checks or (Check(self.verifier, self.answer),)


@dataclass(slots=True)
class RewardParts:
    """The parts of one sample's hybrid reward (Skywork R1V2, Eq. 7) and their sum."""

    rule: float
    """The verifiers' score, in [0, 1] unless it is a foreign reward function's."""
    format: float
    """1.0 if the answer keeps the form that ``reward.answer`` asks for, else 0.0."""
    model: float | None
    """The reward model's raw scalar score r_θ (unbounded); ``None`` when no reward model is used."""
    total: float
    """What the group advantage is computed from: see ``rewards/hybrid.py``."""
    rules: Mapping[str, float] = field(default_factory=dict)
    """Each verifier's score by its name; ``rule`` is their weighted mean."""

    @property
    def right(self) -> bool:
        """True for the full rule score; anything below is wrong."""
        return self.rule >= 1.0


_ALL = np.ones(0, dtype=bool)
"""Stands for "every token" until the sample knows how many it has."""


@dataclass(slots=True)
class Sample:
    """One answer to one prompt, with everything a later learner step needs to weigh it."""

    index: int
    """Place in its group, 0 … G-1."""
    token_ids: np.ndarray
    """int32 [T]: the answer's tokens, with the end-of-sequence token if it was reached."""
    logprobs: np.ndarray | None
    """float32 [T]: log π_behaviour(token) under the distribution it was really drawn from
    (temperature applied, forbidden tokens masked). ``None`` where that is unknown: offline pairs, and answers that
    were continued without the picture. Such a sample can be a member of a preference pair only."""
    text: str
    """The decoded answer, tags included, without the end-of-sequence token."""
    truncated: bool
    """True if the length limit ended it rather than the policy."""
    policy_version: int
    """Number of weight updates the sampling policy had received: the age of a replayed sample is the
    current version minus this. That of the oldest token, where ``versions`` has several."""
    reward: RewardParts | None = None
    """``None`` until scored, and when scoring failed (then ``error`` says why)."""
    advantage: float = 0.0
    """Group advantage of the total reward (Eq. 6), the same for every token; 0 if ``error``."""
    rule_advantage: float = 0.0
    """Group advantage of the rule part alone. Not 0 means the sample is *effective*: what the buffer
    keeps. A reward model's score never ties exactly, so the total can't decide it."""
    claims: int = 0
    """Checkable statements about the picture in the reasoning."""
    false_claims: int = 0
    """Those of them that contradict ``Prompt.facts``."""
    error: str | None = None
    """Why this sample could not be scored (verifier crashed, timed out). It takes no part in training
    and is counted; it is never a silent reward of 0."""
    mask: np.ndarray = field(default_factory=lambda: _ALL)
    """bool [T]: the tokens that the policy chose and that may be trained on; by default all of them. What stands there
    without being the policy's choice (a tool's result), and a truncated answer that shall not train, is False."""
    answer: str | None = None
    """What was found in ``text`` where the setting ``reward.answer`` looks; ``None`` if nothing was, and until
    scored."""
    versions: np.ndarray | None = None
    """int32 [T]: the policy version that drew each token, where they differ (``rollout.oversample``); ``None``:
    ``policy_version`` drew all."""

    def __post_init__(self) -> None:
        if self.mask is _ALL:
            self.mask = np.ones(len(self.token_ids), dtype=bool)

    @property
    def right(self) -> bool:
        """True for a scored answer with the full rule score."""
        return self.error is None and self.reward is not None and self.reward.right

    @property
    def trained_tokens(self) -> int:
        """Tokens that a loss may see."""
        return int(np.count_nonzero(self.mask))  # several times as fast as sum and any, and asked often

    @property
    def effective(self) -> bool:
        """True if the sample carries a learning signal of the rule reward, and tokens to put it on."""
        return self.error is None and self.rule_advantage != 0.0 and self.trained_tokens > 0


@dataclass(slots=True)
class SampleGroup:
    """The G samples drawn for one prompt, the unit in which advantages are computed."""

    prompt: Prompt
    prompt_ids: np.ndarray
    """int32 [P]: the prompt as the rollout engine saw it, picture placeholders expanded. The learner
    uses the same ids and checks that its own pictures fill exactly these placeholders."""
    samples: list[Sample]
    checkable: bool = False
    """Set by the reward worker: the prompt has a picture, and facts that a registered checker knows. Where it is False
    the samples' ``false_claims`` of 0 say nothing."""
    blind: tuple[int, Sample] | None = None
    """``algorithm.mpo.pairs=dropout_ntp`` only: the place of the chosen sample in ``samples``, and its first half
    continued without the picture, which becomes the rejected one (its log-probabilities are unknown)."""
    carried: int = 0
    """Steps whose sampling ended before this group was complete: it took part in a later one (``rollout.oversample``).
    """
    begun_lag: int = 0
    """``controller.lag`` when it was begun, if it was carried: a resumed run may have another."""


@dataclass(slots=True)
class Begun:
    """A group on its way: sampling was stopped before all its answers had ended, and a later step goes on with it. Its
    prompt goes by row number, as in :class:`RolloutRequest`."""

    row: int
    prompt_id: str
    """What the data set must still have in that row."""
    step: int
    """The step that asked for it first; its seeds come from there."""
    prompt_ids: np.ndarray
    """int32 [P], as in :class:`SampleGroup`; [0] as long as no token was sampled."""
    samples: list[Sample]
    """The G answers as far as they are; those that have not ended have no text."""
    open: tuple[int, ...]
    """Places of the answers that have not ended."""
    lag: int
    """``controller.lag`` of the run that began it."""
    carried: int = 0
    """As in :class:`SampleGroup`."""


@dataclass(slots=True)
class TrainItem:
    """One sample on its way into the learner, fresh or replayed. It is *off-policy* if its ``policy_version`` is below
    the batch's ``version``, for whichever of the two reasons."""

    prompt: Prompt
    prompt_ids: np.ndarray
    """int32 [P], as in :class:`SampleGroup`."""
    sample: Sample
    grpo_weight: float
    """Multiplies the sample's GRPO term: 1 for a fresh sample, the importance weight 1/(N·P) for a replayed
    one if the correction is on, 0 for a sample that is here only as a member of a preference pair."""


@dataclass(slots=True, frozen=True)
class PreferencePair:
    """A chosen and a rejected sample of one on-policy group; indices into ``TrainBatch.items``."""

    chosen: int
    rejected: int
    margin: float | None
    """r_θ(chosen) − r_θ(rejected), in the reward model's raw units; at least the threshold. ``None`` where the reward
    model did not score both."""


@dataclass(slots=True)
class TrainBatch:
    """Everything one learner step trains on. Every rank gets the whole batch and takes its own share of it,
    so the denominators below are the same on every rank without any communication."""

    step: int
    version: int
    """Weight updates that the learner has received when it trains on this batch."""
    weights: dict[str, float]
    """Each term's name, or path if it is one's own → its weight at this step; 0 for one that it does not train."""
    items: list[TrainItem]
    pairs: list[PreferencePair]
    grpo_samples: int
    """Samples with ``grpo_weight`` ≠ 0: denominator of sample-level averages over the whole step."""
    grpo_tokens: int
    """Their trained tokens (``Sample.mask``): denominator of token-level averages over the whole step."""

    def off_policy(self, item: TrainItem) -> bool:
        """True if an older policy than the learner's drew the item's sample: replayed, or asked for ahead."""
        return item.sample.policy_version < self.version


@dataclass(slots=True, frozen=True)
class StepReport:
    """What the sample buffer says of one step."""

    metrics: Metrics
    samples: int
    """Answers sampled for the step."""
    tokens: int
    """Their tokens."""
    notes: tuple[str, ...] = ()
    """What the user should read, besides numbers."""


@dataclass(slots=True, frozen=True)
class Event:
    """Something that happened in a run, and that its operator should know of."""

    time: float
    """Seconds since the epoch."""
    step: int
    """The step that was going on."""
    kind: str
    """``alarm``; ``resumed`` and ``stopped``, of the run; ``unsaved``, of a checkpoint; or of members: ``replaced``,
    ``left``, ``joined``, and ``restarted`` for the learner."""
    member: str
    """Whom it is about; "" for the run as a whole."""
    text: str


class CallRecord(NamedTuple):
    """A call to a member that has ended. Times are seconds since the epoch."""

    member: str
    call: str
    """Class and function, ``Sampler.generate``."""
    asked: float
    """By the clock of the process that asked; the others by that of the member."""
    started: float
    ended: float
    step: int | None = None
    """The step that it works for, which with ``controller.lag`` may be a later one than the one that was going on; None
    where its arguments do not say."""


@dataclass(slots=True, frozen=True)
class RolloutRequest:
    """What a rollout worker is asked for. Prompts go by row number: the worker holds the data set, so the
    controller never touches a picture."""

    split: str
    """``train`` or ``eval``."""
    rows: tuple[int, ...]
    step: int
    samples_per_prompt: int
    greedy: bool
    seed: int
    """The run's seed. A sample's own seed is derived from (seed, step, prompt, sample index)."""
    blind: bool = False
    """Ask without the picture: rows that have none are left out; the prompts' ``variant`` says ``blind``."""

    def shared_by(self, members: int) -> list[RolloutRequest]:
        """At most so many requests that together ask the same rows in order, as equal in size as ⌈rows / members⌉
        allows; none is empty."""
        size = max(1, -(-len(self.rows) // members))
        return [replace(self, rows=self.rows[at : at + size]) for at in range(0, len(self.rows), size)]


@dataclass(slots=True)
class WeightSnapshot:
    """Policy parameters at one version, on their way to the rollout members. Of a learner on CPU they are the learner's
    own memory: shared memory takes them from there, without a copy between."""

    version: int
    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    """Torch names: ``float32``, ``bfloat16``…"""
    parts: list[np.ndarray]
    """uint8 [bytes]: each parameter, C order."""
    base: int | None = None
    """Version of the weights among which these take their place; None: they are all of them."""

    @property
    def megabytes(self) -> float:
        """Size of the parameters, 10^6 bytes."""
        return sum(part.nbytes for part in self.parts) / 1e6


class SkyrlError(Exception):
    """Base of every error that skyrl raises on purpose. Its one argument is the whole message, so it
    survives pickling on its way out of a Ray actor."""


class ConfigError(SkyrlError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""


class DataError(SkyrlError):
    """A row, picture or token sequence is broken; the message names it."""


class MemberLost(SkyrlError):
    """A member died or hung, and nothing in the run can stand in for it."""

    def __init__(self, member: str, call: str, text: str) -> None:
        super().__init__(text)
        self.member, self.call = member, call

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.member, self.call, str(self))


class SyncError(SkyrlError):
    """The rollout workers do not hold the learner's weights."""


def flatten(groups: Iterable[SampleGroup]) -> list[Sample]:
    """All samples of ``groups`` in order."""
    return [sample for group in groups for sample in group.samples]
