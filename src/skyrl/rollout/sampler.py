"""The role that samples: requests by row number in, groups of answers out. Knows nothing of vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from skyrl.crew.executor import cut
from skyrl.data.datasets import Chosen
from skyrl.objective.hybrid import imported
from skyrl.records import (
    Begun,
    ConfigError,
    DataError,
    Prompt,
    RolloutRequest,
    Sample,
    SampleGroup,
    SkyrlError,
    WeightSnapshot,
)
from skyrl.rollout.carried import begin, drawn, extended, finished, going_on
from skyrl.rollout.engine import Completion, Engine, EngineRequest, Enough
from skyrl.settings import Config, Overlong, Truncated

BAD_VALUE = (ValueError, TypeError, LookupError, ArithmeticError)
"""What an engine raises for a prompt that can't be sampled; anything else is an engine that is broken."""


class Unfit(NamedTuple):
    """A row that can't be asked."""

    row: int
    problem: str
    too_long: bool
    """That is all that is wrong with it."""


class Sampler:
    """One rollout worker: data sets, encoder and version round the engine whose class ``rollout.engine`` names, which
    starts with the policy of a Hugging Face folder.

    Raises:
        ConfigError: if there is no such class, or it can't stop early and ``rollout.oversample`` wants that.
    """

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from skyrl.data.datasets import build_datasets
        from skyrl.policy.encode import PromptEncoder
        from skyrl.policy.lengths import PromptLengths
        from skyrl.sync.incoming import Incoming

        self.cfg, self.version = cfg, 0
        self.datasets = build_datasets(cfg)
        self.encoder = PromptEncoder.configured(policy_folder, cfg)
        self._lengths = PromptLengths(self.encoder, cfg.rollout.max_prompt_tokens)
        self.engine: Engine = imported(cfg.rollout.engine, "rollout.engine")(cfg, policy_folder)
        if cfg.rollout.oversample and "enough" not in signature(self.engine.generate).parameters:
            raise ConfigError(
                f"rollout.oversample={cfg.rollout.oversample:g} with rollout.engine={cfg.rollout.engine}: its generate "
                "can't stop early, because it takes no argument enough (skyrl.rollout.engine says what that is); say 0"
            )
        # A tokenizer may name tokens that the output layer does not have.
        self._stop_ids = tuple(i for i in self.encoder.stop_token_ids if i < self.engine.vocabulary)
        self._forbidden_ids = tuple(i for i in self.encoder.forbidden_token_ids() if i < self.engine.vocabulary)
        self._incoming = Incoming(cfg.learner.lora)
        self._failure: str | None = None

    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {split: len(dataset) for split, dataset in self.datasets.items()}

    def parts(self) -> list[int]:
        """Rows of each file of the training data, one behind the other."""
        return list(getattr(self.datasets["train"], "sizes", [len(self.datasets["train"])]))

    def unfit(self, rows: Sequence[int], split: str) -> list[Unfit]:
        """Those of the rows whose prompts are too long (with ``data.overlong=cut``: however they are cut), or that the
        model's processor or chat template refuses. No picture is decoded. Data sets that are neither files nor lists
        may make their prompts at a cost, and are not looked at."""
        dataset, limit, found = self.datasets[split], self.cfg.rollout.max_prompt_tokens, list[Unfit]()
        outline = getattr(dataset, "outline", None)
        for row in rows if outline is not None or isinstance(dataset, list) else ():
            try:
                prompt = dataset[row] if outline is None else outline(row)
                tokens = self._lengths.tokens(prompt)
                if tokens > limit and self.cfg.data.overlong is Overlong.cut:
                    tokens = self._lengths.tokens(self._lengths.cut(prompt))
                if tokens > limit:
                    found.append(Unfit(row, f"prompt {prompt.id!r} has {tokens} tokens", True))
            except (DataError, ConfigError) as error:
                found.append(Unfit(row, str(error), False))
        return found

    def keep(self, split: str, rows: Sequence[int]) -> None:
        """Use these rows of a split only; their numbers are now their places in ``rows``."""
        self.datasets[split] = Chosen(self.datasets[split], rows)

    def _prompt(self, split: str, row: int) -> Prompt:
        prompt = self.datasets[split][row]
        return self._lengths.cut(prompt) if self.cfg.data.overlong is Overlong.cut else prompt

    def generate(self, request: RolloutRequest) -> list[SampleGroup]:
        """One group per requested row, in the order of the rows; a blind request leaves out rows without pictures.

        Raises:
            DataError: for an unknown split, a prompt longer than ``rollout.max_prompt_tokens``, or one that the engine
                refuses.
        """
        if request.split not in self.datasets:
            raise DataError(f"unknown split {request.split!r}; this worker has: {', '.join(self.datasets)}")
        prompts = [self._prompt(request.split, row) for row in request.rows]
        if request.blind:
            prompts = [_blind(prompt) for prompt in prompts if prompt.images]
        return self._groups(prompts, request, self.cfg.rollout.max_new_tokens, self.cfg.rollout.top_p)

    def generate_enough(
        self, request: RolloutRequest, begun: list[Begun], enough: int, pieces: int
    ) -> tuple[list[SampleGroup] | list[Begun], ...]:
        """As :meth:`generate`, but only until ``enough`` groups are complete: those that were begun earlier, before
        those of the requested rows. The engine is asked for all of them together and stopped then; which ones those
        are depends on the lengths of the answers alone. A group that ``rollout.max_carried`` steps have left is waited
        for. Returns the complete groups as so many pieces and, last, the others.

        Raises:
            DataError: as :meth:`generate`.
            SkyrlError: if the data set gives another prompt than the one that was begun, or an answer is as long
                already as this run allows.
        """
        most = self.cfg.rollout.max_carried
        going = sorted(begun, key=lambda one: -one.carried)
        prompts = [self._begun_prompt(request.split, one) for one in going]
        new = [self._prompt(request.split, row) for row in request.rows]
        start = request.step, request.samples_per_prompt, self.cfg.controller.lag
        going += [begin(row, prompt, *start) for row, prompt in zip(request.rows, new, strict=True)]
        prompts += new
        asked = [place for place, one in enumerate(going) if one.open]
        due = {at for at, place in enumerate(asked) if going[place].carried >= most}
        missing = enough - (len(going) - len(asked))

        def stop(done: Collection[int]) -> bool:
            return len(done) >= missing and due.issubset(done)

        if not stop(()):
            requests = [self._asked_on(prompts[place], going[place], request) for place in asked]
            answers = self._answers([prompts[place] for place in asked], requests, enough=stop)
            for place, made in zip(asked, answers, strict=True):
                for one in made:
                    self._ended(prompts[place], one)
                going[place] = extended(going[place], made, self.version, self._text)
                self._check_length(prompts[place], len(going[place].prompt_ids))
        complete = [place for place, one in enumerate(going) if not one.open][:enough]
        groups = [finished(going[place], prompts[place]) for place in complete]
        left = [replace(one, carried=one.carried + 1) for place, one in enumerate(going) if place not in complete]
        return *cut(groups, pieces), left

    def _begun_prompt(self, split: str, one: Begun) -> Prompt:
        prompt = self._prompt(split, one.row)
        if prompt.id != one.prompt_id:
            raise SkyrlError(
                f"the checkpoint has unfinished answers to prompt {one.prompt_id!r} of row {one.row}, where the data "
                f"now have {prompt.id!r}; resume with the data of the first start"
            )
        return prompt

    def _asked_on(self, prompt: Prompt, one: Begun, request: RolloutRequest) -> EngineRequest:
        rollout = self.cfg.rollout
        whole = self._asked(prompt, replace(request, step=one.step), rollout.max_new_tokens, rollout.top_p)
        return replace(going_on(one, whole), seed=sample_seed(request.seed, one.step, prompt, drawn(one)))

    def _ended(self, prompt: Prompt, made: Completion) -> None:
        """An answer that ended by itself trains the token that ended it, or the policy forgets how to stop."""
        last = int(made.token_ids[-1]) if len(made.token_ids) else None
        if not (made.truncated or made.stopped) and last not in self._stop_ids:
            raise SkyrlError(
                f"prompt {prompt.id!r}: the engine says that an answer ended by itself, but its last token is {last}; "
                f"tokens that end one: {', '.join(map(str, self._stop_ids))}. It would be trained without its end"
            )

    def _text(self, made: Completion, token_ids: np.ndarray) -> str:
        """The text of an answer that has ended. Engines leave special tokens out; tags that are such must stay."""
        return self.encoder.decode_answer(token_ids.tolist()) if self.encoder.special_tags else made.text

    def probe(self) -> list[SampleGroup]:
        """Short sampled answers to the first evaluation prompts, seeded by the policy version, to prove a sync."""
        rollout, size = self.cfg.rollout, len(self.datasets["eval"])
        prompts = [self._prompt("eval", row) for row in range(min(rollout.probe_prompts, size))]
        request = RolloutRequest("eval", (), self.version, 1, False, self.cfg.controller.seed)
        # Without top-p: it renormalises log-probabilities in a way that the learner can't know.
        return self._groups(prompts, request, rollout.probe_new_tokens, top_p=1.0)

    def continue_blind(self, groups: list[SampleGroup], step: int) -> list[SampleGroup]:
        """Fill ``SampleGroup.blind`` of scored groups in place: the best answer's first half, continued without the
        picture with a seed derived from ``step``.

        DropoutNTP of InternVL's MPO: a continuation that can't look any more tends to make things up, which makes it
        the rejected answer of a pair whose chosen one is the whole answer. Groups without a picture, or without an
        answer that can be cut, keep ``blind=None``. With ``reward.truncated=leave_out`` no token of a continuation that
        reaches the limit may be trained on. Returns ``groups`` itself.

        Raises:
            DataError: as :meth:`generate`.
        """
        rollout = self.cfg.rollout
        request = RolloutRequest("train", (), step, 1, False, self.cfg.controller.seed)
        cuts: list[tuple[SampleGroup, int, int]] = []
        prompts, asked = [], []
        for group in groups:
            group.blind = None
            place = best_answer(group.samples) if group.prompt.images else None
            if place is not None:
                prompt, whole = _blind(group.prompt), group.samples[place].token_ids
                kept = len(whole) // 2
                blind = self._asked(prompt, request, rollout.max_new_tokens - kept, rollout.top_p)
                asked.append(replace(blind, prompt_ids=[*blind.prompt_ids, *whole[:kept].tolist()]))
                prompts.append(prompt)
                cuts.append((group, place, kept))
        for (group, place, kept), (made,) in zip(cuts, self._answers(prompts, asked), strict=True):
            chosen = group.samples[place]
            ids = np.concatenate([chosen.token_ids[:kept], made.token_ids])
            trains = not (made.truncated and self.cfg.reward.truncated is Truncated.leave_out)
            mask = np.concatenate([chosen.mask[:kept], np.ones(len(made.token_ids), dtype=bool)]) & trains
            # The first half was drawn with the picture and the second without: no distribution gave the whole.
            text = self.encoder.decode_answer(ids.tolist())
            group.blind = place, Sample(len(group.samples), ids, None, text, made.truncated, self.version, mask=mask)
        return groups

    def _groups(
        self, prompts: list[Prompt], request: RolloutRequest, max_tokens: int, top_p: float
    ) -> list[SampleGroup]:
        answers = self._answers(prompts, [self._asked(prompt, request, max_tokens, top_p) for prompt in prompts])
        groups = []
        for prompt, completions in zip(prompts, answers, strict=True):
            self._check_length(prompt, len(completions[0].prompt_ids))
            samples = []
            for place, made in enumerate(completions):
                self._ended(prompt, made)
                text = self._text(made, made.token_ids)
                samples.append(Sample(place, made.token_ids, made.logprobs, text, made.truncated, self.version))
            groups.append(SampleGroup(prompt, completions[0].prompt_ids, samples))
        return groups

    def _asked(self, prompt: Prompt, request: RolloutRequest, max_tokens: int, top_p: float) -> EngineRequest:
        ids = self.encoder.text_ids(prompt)
        self._check_length(prompt, len(ids))  # placeholders not expanded yet; _groups checks the whole
        return EngineRequest(
            prompt_ids=ids,
            pictures=prompt.images,
            n=request.samples_per_prompt,
            temperature=0.0 if request.greedy else self.cfg.rollout.temperature,
            top_p=1.0 if request.greedy else top_p,
            max_tokens=max_tokens,
            seed=None if request.greedy else sample_seed(request.seed, request.step, prompt),
            stop_ids=self._stop_ids,
            forbidden_ids=self._forbidden_ids,
        )

    def _answers(self, prompts: list[Prompt], asked: list[EngineRequest], **enough: Enough) -> list[list[Completion]]:
        try:
            return self.engine.generate(asked, **enough) if asked else []
        except BAD_VALUE:  # names no prompt: ask one by one
            for prompt, request in zip(prompts, asked, strict=True):
                try:
                    self._check_length(prompt, len(self.encoder.encode(prompt)[0]))
                    self.engine.generate([replace(request, n=1, max_tokens=1, begun=())])
                except BAD_VALUE as error:
                    sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in prompt.images]
                    raise DataError(
                        f"prompt {prompt.id!r} with {len(request.prompt_ids)} tokens and pictures of {sizes} pixels "
                        f"can't be sampled: {type(error).__name__}: {error}"
                    ) from error
            raise

    def _check_length(self, prompt: Prompt, length: int) -> None:
        limit = self.cfg.rollout.max_prompt_tokens
        if length > limit:
            raise DataError(f"prompt {prompt.id!r} has {length} tokens; rollout.max_prompt_tokens allows {limit}")

    # ------------------------------------------------------------ weights

    def update(self, snapshot: WeightSnapshot) -> tuple[list[SampleGroup], float]:
        """:meth:`probe` after :meth:`load_weights`: one call, because a large crew's calls take time."""
        megabytes = self.load_weights(snapshot)
        return self.probe(), megabytes

    def load_weights(self, snapshot: WeightSnapshot) -> float:
        """Replace weights by the snapshot's; returns its size in megabytes. Calls run one after the other, so an answer
        has one version. A partial snapshot for the version that is here changes nothing: a member that was built anew
        while the others were sent it has all weights already.

        Raises:
            SyncError: if the snapshot does not cover the policy, or is partial and not for the weights that are here.
        """
        if snapshot.base is not None and snapshot.version == self._incoming.version:
            return 0.0
        self.engine.load(self._incoming.tensors(snapshot), snapshot.version, snapshot.base is None)
        self.version = self._incoming.version = snapshot.version
        return snapshot.megabytes

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        """One call of a transfer that vLLM drives itself (nccl, ipc)."""
        self._failure = None
        try:
            self.engine.transfer(method, kwargs)
        except Exception as error:
            self._failure = f"{method}: {type(error).__name__}: {error}"
            raise

    def transfer_failure(self) -> str | None:
        """What ended the last transfer here, if anything did."""
        return self._failure

    def finish_transfer(self, version: int) -> None:
        """The weights that came are those of ``version``."""
        self.version = version


def sample_seed(run_seed: int, step: int, prompt: Prompt, drawn: str = "") -> int:
    """Seed of a prompt's group at a step, 0 … 2^62; sample ``i`` of the group uses this plus ``i``. ``drawn`` says what
    there is already of a group that is continued.

    A hash, so that neither the number of workers nor the order of the prompts changes what is sampled.
    """
    name = f"{prompt.id}#{prompt.variant}" if prompt.variant else prompt.id
    text = f"{run_seed}/{step}/{name}/{drawn}" if drawn else f"{run_seed}/{step}/{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def best_answer(samples: list[Sample]) -> int | None:
    """Place of the answer with the highest r_θ that ended by itself, may be trained on and can be cut in two; without a
    reward model, of the highest rule score. Among equals the first. ``None`` if there is no such answer."""
    usable = [
        (place, sample.reward)
        for place, sample in enumerate(samples)
        if sample.error is None and sample.reward is not None and not sample.truncated
        if len(sample.token_ids) > 1 and sample.mask.any()
    ]
    if not usable:
        return None
    by_rule = any(reward.model is None for _, reward in usable)
    scores = [reward.rule if by_rule or reward.model is None else reward.model for _, reward in usable]
    return usable[int(np.argmax(scores))][0]


def _blind(prompt: Prompt) -> Prompt:
    return replace(prompt, variant="blind", images=())
