"""The hybrid objective: the terms that a run trains, their weighted sum, and the numbers of a whole step.

::

    L = Σ_terms weight · (sum of the term over the step) / (its count in the step)

with the weights of ``TrainBatch.weights``. The terms see different samples of one batch: GRPO the effective (fresh and
replayed) ones, MPO the preference pairs of the fresh groups, a term of your own what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from skyrl.objective.grpo import Grpo
from skyrl.objective.mpo import Mpo
from skyrl.objective.term import BatchView, Counts, Stat, Stats, Term
from skyrl.records import ConfigError, Metrics, SkyrlError, TrainBatch
from skyrl.settings import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor

TERMS: tuple[type[Term], ...] = (Grpo, Mpo)
"""The library's own."""
STEP_STATS = (
    Stat("learner/entropy", "tokens", "nats",
        "Entropy of the learner's next-token distribution, mean over all answer tokens trained on."),
    Stat("learner/logprob_gap_fresh", "on_policy_tokens", "nats",
        "Largest difference of the rollout's and the learner's log-probability over the tokens of on-policy answers, "
        "before the update; absent where none is recorded.", kind="max"),
    Stat("learner/logprob_gap_fresh_mean", "on_policy_tokens", "nats",
        "The same difference, mean over these tokens."),
)  # fmt: skip
"""What every step reports, whichever terms it trains."""
COUNTS = [field.name for field in fields(Counts)]
COVERED = tuple(Stat(name, "none", "-", "") for name in ("samples", "tokens", "grpo_tokens", "pairs", "places"))
"""What the micro-batches of a step hold together: must be what the batch says."""
CHECKED = (*COVERED, Stat("minimised", "none", "-", ""))
"""Statistics that are compared and not logged; the last is the sum of the losses that gradients were taken of."""
EXACT = 1e-4
"""What a loss may differ by from the sum of its parts, relative to their sizes or 1, whichever is larger."""


# ---------------------------------------------------------------- which terms


def run_terms(cfg: AlgorithmConfig) -> list[Term]:
    """The terms that any step of the run may train.

    Raises:
        ConfigError: for a term of ``algorithm.terms`` that can't be built; the message names its key.
    """
    known: list[Term] = [Grpo(cfg.grpo)] if cfg.uses_grpo else []
    known += [Mpo(cfg.mpo)] if cfg.uses_mpo else []
    return known + [term for term, weight in own_terms(cfg) if weight > 0]


def own_terms(cfg: AlgorithmConfig) -> list[tuple[Term, float]]:
    """The terms of ``algorithm.terms`` with their weights.

    Raises:
        ConfigError: for one that can't be imported, declares itself wrongly, has the name of another, or whose
            settings are wrong.
    """
    found: list[tuple[Term, float]] = []
    for place, own in enumerate(cfg.terms):
        key = f"algorithm.terms[{place}]"
        kind = imported(own.path, f"{key}.path")
        if not (isinstance(kind, type) and issubclass(kind, Term)):
            raise ConfigError(f"{key}.path={own.path}: is no subclass of skyrl.objective.term.Term")
        missing = [part for part in ("name", "text", "Settings") if not hasattr(kind, part)]
        if missing:
            raise ConfigError(f"{key}.path={own.path}: the class does not declare its {' and '.join(missing)}")
        taken = [term.name for term in TERMS] + [term.name for term, _ in found]
        if not kind.name.isidentifier() or kind.name in taken:
            allowed = f"an identifier, none of {', '.join(taken)}"
            raise ConfigError(f"{key}.path={own.path}: its name is {kind.name!r}; allowed: {allowed}")
        try:
            term = kind(kind.Settings(**own.settings), own.path)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
            raise ConfigError(f"{key}.settings of {own.path}: {'; '.join(wrong)}") from error
        for stat in (*term.declared(), *term.stats):
            if stat.per not in COUNTS or "/" not in stat.name:
                raise ConfigError(
                    f"{key}: the statistic {stat.name!r} of term {kind.name!r} is per {stat.per!r}; allowed: a name "
                    f"with a slash, per one of {', '.join(COUNTS)}"
                )
        found.append((term, own.weight))
    return found


def imported(path: str, key: str) -> Any:
    """What ``package.module:Name`` names.

    Raises:
        ConfigError: if there is no such thing; ``key`` is the setting that names it.
    """
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={path}: can't be imported as package.module:Name: {error}") from error


def active_terms(terms: Sequence[Term], batch: TrainBatch) -> list[tuple[Term, float]]:
    """The terms that this step trains, with their weights.

    Raises:
        SkyrlError: for a weight of a term that the run does not have.
    """
    keys = [term.key for term in terms]
    unknown = sorted(key for key, weight in batch.weights.items() if weight != 0 and key not in keys)
    if unknown:
        raise SkyrlError(f"step {batch.step} has weights of {', '.join(unknown)}; the run has {', '.join(keys)}")
    return [(term, weight) for term in terms if (weight := batch.weights.get(term.key, 0.0)) != 0]


# ---------------------------------------------------------------- a micro-batch


def hybrid_loss(view: BatchView, active: Sequence[tuple[Term, float]]) -> tuple[Tensor, Stats]:
    """The micro-batch's share of the step's loss, and every statistic of :func:`step_stats`.

    Raises:
        SkyrlError: if a term gives other statistics than it declares, or no loss that could train.
    """
    fresh = view.mask & (view.recorded & ~view.off_policy).unsqueeze(1)
    gap = (view.logprobs - view.behaviour).detach().abs().masked_fill(~fresh, 0.0)
    stats: Stats = {
        "learner/entropy": view.entropy.detach()[view.mask].double().sum(),
        "learner/logprob_gap_fresh": gap.max() if gap.numel() else gap.sum(),
        "learner/logprob_gap_fresh_mean": gap.double().sum(),
        "samples": view.weights.new_tensor(len(view.items)),
        "tokens": view.mask.sum(),
        "grpo_tokens": (view.mask & (view.weights != 0).unsqueeze(1)).sum(),
        "pairs": view.weights.new_tensor(len(view.chosen)),
        "places": view.mask.nonzero()[:, 1].sum(),
    }
    loss = view.logprobs[:0].sum()  # a zero with a graph, whatever the log-probabilities are
    for term, weight in active:
        total, own = term.loss(view)
        names = {stat.name for stat in term.declared()[1:]}
        if own.keys() != names:
            raise SkyrlError(f"term {term.name!r} gives statistics {sorted(own)}; it declares {sorted(names)}")
        if getattr(total, "shape", None) != () or total.requires_grad != view.logprobs.requires_grad:
            raise SkyrlError(f"the loss of term {term.name!r} must be one number that depends on the log-probabilities")
        loss = loss + weight * (total / max(getattr(view.counts, term.per), 1))
        stats |= {f"loss/{term.name}": total} | own
    stats["minimised"] = loss
    return loss, {name: value.detach().double() for name, value in stats.items()}


def step_stats(active: Sequence[tuple[Term, float]]) -> list[Stat]:
    """Every statistic of a step, in the order in which ranks exchange them."""
    return [*CHECKED, *STEP_STATS, *(stat for term, _ in active for stat in term.declared())]


def merge_stats(
    parts: Sequence[Stats], active: Sequence[tuple[Term, float]], device: Any, reduce: Callable[..., Tensor]
) -> dict[str, float]:
    """Every statistic of a step over the micro-batches ``parts`` and, by ``reduce(values, "sum" or "max")``, over the
    ranks: sums add, maxima take the maximum."""
    import torch

    stats = step_stats(active)
    largest = torch.tensor([stat.kind == "max" for stat in stats], device=device)
    merged = torch.zeros(len(stats), dtype=torch.float64, device=device).masked_fill(largest, -torch.inf)
    for part in parts:
        values = torch.stack([part[stat.name] for stat in stats])
        merged = torch.where(largest, merged.maximum(values), merged + values)
    maxima, sums = reduce(merged.clone(), "max"), reduce(merged.masked_fill(largest, 0.0), "sum")
    totals = torch.where(largest, maxima, sums).tolist()
    return {stat.name: value for stat, value in zip(stats, totals, strict=True)}


# ---------------------------------------------------------------- a whole step


def step_metrics(active: Sequence[tuple[Term, float]], totals: Mapping[str, float], counts: Counts) -> Metrics:
    """Metrics of a step from its statistics over all micro-batches and ranks.

    What there is nothing of (no sample, no pair, a term of weight 0) gives no key at all, rather than a 0 that would
    look like a perfect loss. ``loss/total`` needs one of the terms.

    Raises:
        SkyrlError: if the statistics cover another number of samples, tokens or pairs than the step has, which means
            that a micro-batch was lost or counted twice, or that the batch's own counts are wrong.
    """
    for stat in COVERED:
        got, want = totals[stat.name], getattr(counts, stat.name)
        if round(got) != want:
            what = stat.name.replace("grpo_", "GRPO ")
            moved = ": the mask lies on other tokens than the answers'" if stat.name == "places" else ""
            raise SkyrlError(f"statistics cover {got:g} {what}; the step has {want}{moved}")
    metrics: Metrics = {}
    for stat in step_stats(active)[len(CHECKED) :]:
        count, value = getattr(counts, stat.per), totals[stat.name]
        if count and value != float("-inf"):
            metrics[stat.name] = value if stat.kind == "max" else value / count
    losses = [weight * metrics[name] for term, weight in active if (name := f"loss/{term.name}") in metrics]
    if losses:
        metrics["loss/total"] = sum(losses)
    return metrics


def check_weights(
    active: Sequence[tuple[Term, float]], totals: Mapping[str, float], metrics: Metrics, progress: float
) -> None:
    """Compare what was minimised with what the step reports, so that no weight and no denominator is without effect.

    Args:
        totals: The statistics of the step over all micro-batches and ranks.
        metrics: Of :func:`step_metrics`.
        progress: As in :class:`~skyrl.objective.term.BatchView`.

    Raises:
        SkyrlError: if the terms with their weights add up to something else, or the parts of a term with theirs.
    """
    sums = [("the loss", totals["minimised"], {f"loss/{term.name}": weight for term, weight in active})]
    sums += [(f"loss/{term.name}", metrics.get(f"loss/{term.name}", 0.0), term.parts(progress)) for term, _ in active]
    for what, got, weights in sums:
        parts = [(name, weight, metrics.get(name, 0.0)) for name, weight in weights.items()]
        products = [weight * value for _, weight, value in parts]
        if weights and abs(got - sum(products)) > EXACT * max(1.0, sum(map(abs, products))):
            added = " + ".join(f"{weight:g} · {value:.6g} ({name})" for name, weight, value in parts)
            raise SkyrlError(
                f"loss_weight: {what} that was minimised is {got:.6g}, but {added} = {sum(products):.6g}: a weight or "
                "a denominator has no effect"
            )
