"""Settings of what judges: where the answer stands, verifiers, reward model, the sum of their rewards."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from skyrl.schema import Count, DottedPath, Pattern, Problem, Settings
from skyrl.settings.judge import JudgeConfig, judge_problems
from skyrl.settings.system import WorkerConfig

if TYPE_CHECKING:
    from skyrl.settings.run import Config

TagName = Annotated[
    str, Field(pattern=r"^[^\s<>/]+$", json_schema_extra={"allowed": "a name without spaces, slashes, < and >"})
]
BUILTIN_VERIFIERS = ("exact", "numeric", "math", "choice", "code", "ifeval", "judge")


class Squash(Enum):
    none = "none"
    """The paper's raw sum (Eq. 7)."""
    sigmoid = "sigmoid"
    """1 / (1 + exp(-score / scale)), in (0, 1)."""
    tanh = "tanh"
    """tanh(score / scale), in (-1, 1)."""
    group_standardise = "group_standardise"
    """(score - group mean) / (group std + 1e-6)."""


class Truncated(Enum):
    train = "train"
    """It is judged and trained on like any other: without an end it is mostly wrong."""
    leave_out = "leave_out"
    """It is judged, so that it counts in its group, but none of its tokens is trained on."""
    soft_penalty = "soft_penalty"
    """As ``train``, and answers lose reward the nearer they come to the limit (DAPO, Eq. 13): nothing up to
    ``max_new_tokens − soft_penalty_tokens``, then evenly up to 1."""


class AnswerPlace(Enum):
    tags = "tags"
    """Between the last pair of answer tags."""
    boxed = "boxed"
    r"""In the last ``\boxed{…}`` whose braces balance."""
    hashes = "hashes"
    """Behind the last ``####``, to the end of the line (GSM8K)."""
    last_number = "last_number"
    """The last number, whatever it is used for there."""
    regex = "regex"
    """Group 1 of the last match of ``pattern``, or the whole match if it has no group."""
    whole = "whole"
    """All of it."""


class Think(Enum):
    required = "required"
    """One ``<think>…</think>`` stands at the beginning."""
    optional = "optional"
    """One at the beginning, or none at all."""
    none = "none"
    """The policy does not think in tags; they mean nothing."""


class AnswerConfig(Settings):
    """Where in the policy's text the answer stands that verifiers compare (docs/verifiers.md)."""

    at: AnswerPlace = AnswerPlace.tags
    """Everywhere but with ``tags`` it is looked for behind the reasoning: what is named inside is no answer."""
    pattern: Pattern | None = None
    """With ``at=regex``: the regular expression. ``.`` does not match a line break; ``(?s)`` in front changes that."""
    think: Think | None = None
    """Reasoning that the format reward asks for. null means ``required`` with ``at=tags``, else ``optional``."""
    think_tag: TagName = "think"
    """Name of the tags round the reasoning."""
    answer_tag: TagName = "answer"
    """Name of the tags round the answer."""

    @property
    def thinks(self) -> Think:
        """``think``, also where it is null."""
        return self.think or (Think.required if self.at is AnswerPlace.tags else Think.optional)

    @property
    def tags(self) -> tuple[str, str, str, str]:
        """Those that open and close the reasoning, and those of the answer."""
        think, answer = self.think_tag, self.answer_tag
        return f"<{think}>", f"</{think}>", f"<{answer}>", f"</{answer}>"


class RewardConfig(WorkerConfig):
    """Each worker holds the verifiers and a copy of the reward model."""

    answer: AnswerConfig = AnswerConfig()
    judge: JudgeConfig = JudgeConfig()
    model_weight: NonNegativeFloat = 1.0
    """w in r = r_rule + w·squash(r_θ) + w_f·r_format."""
    format_weight: NonNegativeFloat = 0.1
    """w_f."""
    squash: Squash = Squash.sigmoid
    """What is done to the reward model's raw score before it is added to the rule reward."""
    squash_scale: PositiveFloat | None = 0.5
    """Divides the raw score inside ``sigmoid`` and ``tanh``. null fits it, and a centre that is subtracted, to the
    interquartile range and the median of the first evaluation's scores; a resumed run keeps them."""
    truncated: Truncated = Truncated.train
    """What happens to an answer that the length limit ended."""
    soft_penalty_tokens: Count = 16
    """Width of the stretch before the limit in which ``soft_penalty`` acts (DAPO's L_cache), tokens."""
    verifiers: dict[str, DottedPath] = Field(default_factory=dict)
    """Verifiers of your own, and reward functions of TRL, verl and EasyR1, by the name that data give them: ``{close:
    "my_verifiers:close_enough"}``. Data can't name code."""
    verifier: str | None = None
    """Verifier of the rows that name none: a built-in one, or a name of ``verifiers``."""
    verifier_timeout: PositiveFloat = 5.0
    """Seconds that one verifier call may take before it is killed; some functions of TRL, verl and EasyR1 judge a
    whole group in one call."""
    verifier_processes: Count = 4
    """Most processes in which a reward worker runs verifiers side by side. They start when there is work for them."""
    verifier_environment: list[str] = Field(default_factory=list)
    """Environment variables that those processes get besides the few that Python needs, by name: a key that a function
    of yours needs, say. They get no others."""
    numeric_tolerance: NonNegativeFloat = 1e-6
    """Relative tolerance of the ``numeric`` verifier: nothing but 0 is right for 0."""
    model_batch: Count = 64
    """Samples that the reward model scores in one forward pass. Where those of a prompt share its row, a pass has the
    tokens of so many of the longest ones, but at most 8,192."""


def reward_problems(cfg: Config) -> Iterator[Problem]:
    """What does not fit together here."""
    if taken := sorted(set(cfg.reward.verifiers) & set(BUILTIN_VERIFIERS)):
        yield "reward.verifiers", f"{', '.join(taken)}: the name of a built-in verifier; give yours another one"
    if broken := sorted(name for name in cfg.reward.verifiers if {*":/#"} & {*name} or not name.strip()):
        yield "reward.verifiers", f"{', '.join(map(repr, broken))}: must be a name without a colon, slash or #"
    yield from judge_problems(cfg.reward.judge)
    known, answer = [*BUILTIN_VERIFIERS, *cfg.reward.verifiers], cfg.reward.answer
    if cfg.reward.verifier is not None and cfg.reward.verifier not in known:
        yield "reward.verifier reward.verifiers", f"the first must be null or one of {', '.join(known)}"
    if (answer.at is AnswerPlace.regex) != (answer.pattern is not None):
        yield "reward.answer.pattern reward.answer.at", "at=regex needs a pattern, the others take none"
    if answer.think_tag == answer.answer_tag:
        yield "reward.answer.think_tag reward.answer.answer_tag", "must be two names"
    if cfg.reward.truncated is Truncated.soft_penalty and cfg.reward.soft_penalty_tokens > cfg.rollout.max_new_tokens:
        yield "reward.soft_penalty_tokens rollout.max_new_tokens", "the first must not be above the second"
