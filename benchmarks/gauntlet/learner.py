"""Faults of the learner and of the buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.gauntlet.fault import Fault, replaced


@contextmanager
def inert_weight() -> Iterator[None]:
    """The generation term of MPO has a weight, is reported, and is not in the loss."""
    from skyrl.objective.mpo import Mpo

    def loss(original: Any, term: Any, view: Any) -> Any:
        return original(Mpo(term.settings.model_copy(update={"generation_weight": 0.0})), view)

    with replaced(Mpo, "loss", loss):
        yield


@contextmanager
def outer_weight_ignored() -> Iterator[None]:
    """The weight of a term is read and not used."""
    from skyrl.learner import step

    with replaced(
        step, "hybrid_loss", lambda original, view, active: original(view, [(term, 1.0) for term, _ in active])
    ):
        yield


@contextmanager
def denominators_of_micro_batches() -> Iterator[None]:
    """Each micro-batch is divided by its own pairs and samples, not by the step's."""
    from skyrl.learner import step

    def loss(original: Any, view: Any, active: Any) -> Any:
        own = replace(
            view.counts,
            pairs=len(view.chosen),
            grpo_samples=int((view.weights != 0).sum()),
            grpo_tokens=int((view.mask & (view.weights != 0).unsqueeze(1)).sum()),
        )
        return original(replace(view, counts=own), active)

    with replaced(step, "hybrid_loss", loss):
        yield


@contextmanager
def tower_stays_frozen() -> Iterator[None]:
    from skyrl.policy import module

    def freeze(original: Any, parameters: Any, trainable: Any) -> Any:
        named = list(parameters)
        counts = original(named, trainable)
        for name, parameter in named:
            if module.module_of(name) == "vision":
                parameter.requires_grad_(False)
        return counts

    with replaced(module, "freeze", freeze):
        yield


@contextmanager
def record_recomputed() -> Iterator[None]:
    """The old log-probabilities are those of the policy that is trained: every ratio is 1."""
    from skyrl.learner import views

    def view(original: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        return replace(made, behaviour=made.logprobs.detach())

    with replaced(views, "batch_view", view):
        yield


@contextmanager
def record_off_by_one() -> Iterator[None]:
    from skyrl.learner import views

    def view(original: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        return replace(made, behaviour=made.behaviour.roll(1, 1))

    with replaced(views, "batch_view", view):
        yield


@contextmanager
def mask_off_by_one() -> Iterator[None]:
    from skyrl.learner import views

    def view(original: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        return replace(made, mask=made.mask.roll(1, 1))

    with replaced(views, "batch_view", view):
        yield


@contextmanager
def _backend(changed: Callable[[Any], None]) -> Iterator[None]:
    """``changed`` is shown the learner's backend as soon as there is one."""
    from skyrl.learner.step import LearnerStep

    def join(original: Any, learner: Any, *args: Any) -> None:
        original(learner, *args)
        changed(learner.backend)

    with replaced(LearnerStep, "join", join):
        yield


def gradient_not_applied() -> Any:
    def changed(backend: Any) -> None:
        update = backend.update

        def kept(lr: float) -> float:
            before = [parameter.detach().clone() for parameter in backend.trained]
            norm = float(update(lr))
            for parameter, old in zip(backend.trained, before, strict=True):
                parameter.data.copy_(old)
            return norm

        backend.update = kept

    return _backend(changed)


@contextmanager
def learning_rate_0() -> Iterator[None]:
    from skyrl.learner import step

    with replaced(step, "learning_rate", lambda original, *args: 0.0):
        yield


def reference_follows() -> Any:
    """The reference shares the policy's weights."""

    def changed(backend: Any) -> None:
        score = backend.score
        backend.score = lambda rows, reference=False: score(rows)

    return _backend(changed)


def optimizer_lost() -> Any:
    """The checkpoint's weights are loaded, its optimizer is not."""

    def changed(backend: Any) -> None:
        load = backend.load

        def loaded(*args: Any) -> None:
            load(*args)
            getattr(backend, "engine", backend).optimizer.state.clear()

        backend.load = loaded

    return _backend(changed)


@contextmanager
def age_ignored() -> Iterator[None]:
    """What is too old is neither dropped nor left out."""
    from skyrl.replay.ssb import SelectiveSampleBuffer

    def build(original: Any, buffer: Any, cfg: Any, seed: int) -> None:
        original(buffer, cfg.model_copy(update={"max_age": 1000}), seed)

    with replaced(SelectiveSampleBuffer, "__init__", build):
        yield


@contextmanager
def same_samples_drawn() -> Iterator[None]:
    """The random state is set anew before each draw, and what is added comes too late to be drawn."""
    from skyrl.replay.ssb import SelectiveSampleBuffer

    first: list[Any] = []

    def draw(original: Any, buffer: Any, n: int, version: int) -> Any:
        made = original(buffer, n, version)
        if made and not first:
            first.extend(made)
        return first[: len(made)] if made else made

    with replaced(SelectiveSampleBuffer, "draw", draw):
        yield


FAULTS = [
    Fault(
        "loss_weight_inert",
        "learner",
        "A part of the loss has a weight, is reported, and is never added.",
        ("NVIDIA-NeMo/RL#3792",),
        "loss_weight",
        1,
        inert_weight,
    ),
    Fault(
        "tower_not_trained",
        "learner",
        "The vision tower shall train and gets no update; the loss falls all the same.",
        ("huggingface/trl#1936",),
        "weights_still",
        1,
        tower_stays_frozen,
    ),
    Fault(
        "record_recomputed",
        "learner",
        "The old log-probabilities are computed by the policy that is trained: ratios are 1, clips never act.",
        ("meta-pytorch/torchforge#571", "areal-project/AReaL#201"),
        "record_ignored",
        1,
        record_recomputed,
    ),
    Fault(
        "term_weight_ignored",
        "learner",
        "The weight of a whole term is read and not used.",
        ("NVIDIA-NeMo/RL#3792",),
        "loss_weight",
        1,
        outer_weight_ignored,
        further=True,
    ),
    Fault(
        "denominators_of_micro_batches",
        "learner",
        "Sums are divided by what each micro-batch has: the learning rate depends on how the step is cut.",
        ("modelscope/ms-swift#10117", "allenai/open-instruct#1161"),
        "loss_weight",
        1,
        denominators_of_micro_batches,
        ("learner.micro_batch_tokens=500",),
        further=True,
    ),
    Fault(
        "record_off_by_one",
        "learner",
        "The record of the token before stands beside each token.",
        ("modelscope/ms-swift#8196",),
        "sampling_differs",
        1,
        record_off_by_one,
        further=True,
    ),
    Fault(
        "mask_off_by_one",
        "learner",
        "The loss leaves the first token out and takes the padding behind the last one.",
        (),
        "SkyrlError.*the mask lies on other tokens",
        1,
        mask_off_by_one,
        further=True,
    ),
    Fault(
        "gradient_not_applied",
        "learner",
        "Gradients are computed and clipped, and no weight changes.",
        ("Goekdeniz-Guelmez/mlx-lm-lora#55",),
        "weights_still",
        1,
        gradient_not_applied,
        further=True,
    ),
    Fault(
        "learning_rate_0", "learner", "The schedule gives 0.", (), "no_learning_rate", 1, learning_rate_0, further=True
    ),
    Fault(
        "reference_follows",
        "learner",
        "The reference shares the policy's weights: the divergence is 0 for ever.",
        (),
        "reference_wrong",
        2,
        reference_follows,
        further=True,
    ),
    Fault(
        "optimizer_lost",
        "learner",
        "A resumed run has its weights and no moments.",
        ("pytorch/rl#4188", "OpenPipe/ART#72"),
        "optimizer_lost",
        3,
        optimizer_lost,
        resumes=True,
        further=True,
    ),
    Fault(
        "replay_too_old",
        "learner",
        "The age limit of the buffer is not kept.",
        (),
        "stale",
        3,
        age_ignored,
        ("controller.steps=6", "buffer.max_age=1", "buffer.mix=0.5"),
        further=True,
    ),
    Fault(
        "replay_stuck",
        "learner",
        "Every step draws the same samples from the buffer.",
        (),
        "replay_stuck",
        3,
        same_samples_drawn,
        ("controller.steps=6",),
        further=True,
    ),
]
