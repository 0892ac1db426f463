"""A term of the loss that is defined here, named in the settings by its path, and that the library does not know: it is
trained, logged and in the table of metrics. And what is refused."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import build_policy, groups_of, make_batch
from learner_plain import joined, plain_settings, weights_of
from learner_views import make_view, merged
from pydantic import PositiveFloat

from skyrl.monitoring.metrics import METRICS, MetricError, check_names, metric_table
from skyrl.objective import term as term_module
from skyrl.objective.hybrid import TERMS, active_terms, hybrid_loss, own_terms, run_terms, step_metrics
from skyrl.objective.term import BatchView, Counts, Stat, Stats, Term
from skyrl.records import ConfigError, SkyrlError, TrainBatch
from skyrl.schema import Settings
from skyrl.settings import AlgorithmConfig, Config


class BrevitySettings(Settings):
    limit: PositiveFloat = 6.0


class Brevity(Term):
    """Likelihood of answers above a length: a third term in a reader's own module."""

    name, per = "brevity", "samples"
    text = "Log-likelihood of answers above the limit, a token, mean over the step's samples."
    Settings = BrevitySettings
    stats = (
        Stat("brevity/over", "samples", "share", "Answers above the limit, of the step's samples."),
        Stat("brevity/longest", "samples", "tokens", "Tokens of the longest answer.", kind="max"),
        Stat("brevity/old", "none", "answers", "Off-policy answers.", when=lambda cfg: cfg.limit > 1),
    )

    def loss(self, view: BatchView) -> tuple[torch.Tensor, Stats]:
        lengths = view.mask.sum(1)
        over = lengths > self.settings.limit
        stats = {"brevity/over": over.sum(), "brevity/longest": lengths.max()}
        if self.settings.limit > 1:
            stats["brevity/old"] = view.off_policy.sum()
        return (view.row_sums(view.logprobs) / lengths.clamp(min=1) * over).sum(), stats


class Compared(Brevity):
    """Reads the reference."""

    name, uses_reference = "compared", True
    stats = ()

    def loss(self, view: BatchView) -> tuple[torch.Tensor, Stats]:
        assert view.reference is not None
        return view.row_sums((view.logprobs - view.reference).square()).sum(), {}


class Undeclared(Brevity):
    name, stats = "undeclared", ()


class Clashing(Brevity):
    name = "clashing"
    stats = (Stat("grpo/clip_fraction", "samples", "share", "Something else."),)


class ByPattern(Brevity):
    name = "by_pattern"
    stats = (Stat("eval/accuracy/mine", "samples", "share", "Something else."),)


class Namesake(Brevity):
    name = "grpo"


class PerWhat(Brevity):
    name, per = "per_what", "batches"


class Mute(Term):
    name = "mute"


class NoTerm:
    pass


HERE = __name__


def config(*terms: dict[str, Any], **rest: Any) -> AlgorithmConfig:
    return AlgorithmConfig(terms=list(terms), **rest)


def own(name: str = "Brevity", weight: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {"path": f"{HERE}:{name}", "weight": weight, "settings": changes}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("policy")
    build_policy(folder)
    return str(folder)


def test_an_own_term_is_trained_logged_and_in_the_table(policy: str) -> None:
    cfg = plain_settings()
    runs = {}
    for weight in (0.0, 0.5):
        cfg.algorithm.terms = config(own(weight=weight, limit=5.0)).terms
        learner = joined(cfg, policy)
        batch = make_batch(learner.encoder, 1)
        batch.items[0].sample.mask[1:] = False
        batch.grpo_tokens = sum(i.sample.trained_tokens for i in batch.items if i.grpo_weight != 0)
        batch.weights = cfg.algorithm.weights(1)
        found = [i.sample for i in batch.items]
        before = learner.logprobs(groups_of(batch))
        metrics = learner.train_step(batch)
        runs[weight] = (metrics, weights_of(learner))
        lengths = [s.trained_tokens for s in found]
    off, on = runs[0.0][0], runs[0.5][0]
    over = [length > 5 for length in lengths]
    want = sum(float(b[s.mask].mean()) for b, s, o in zip(before, found, over, strict=True) if o) / len(found)
    assert 0 < sum(over) < len(over)
    assert on["brevity/over"] == pytest.approx(np.mean(over)) and on["brevity/longest"] == max(lengths)
    assert on["brevity/old"] == sum(s.policy_version < batch.version for s in found) > 0
    assert on["loss/brevity"] == pytest.approx(want, rel=1e-5)
    assert on["loss/total"] == pytest.approx(off["loss/total"] + 0.5 * want, rel=1e-5)
    added = {"loss/brevity", "brevity/over", "brevity/longest", "brevity/old"}
    assert on.keys() - off.keys() == added
    assert any(not np.array_equal(runs[0.0][1][name], runs[0.5][1][name]) for name in runs[0.0][1])
    table = metric_table(cfg)
    assert table.keys() - METRICS.keys() == added
    assert table["brevity/over"].unit == "share" and table["loss/brevity"].description == Brevity.text
    check_names(on, table)
    with pytest.raises(MetricError, match="brevity/over"):
        check_names(on)


def test_an_own_term_may_stand_alone_and_compare_with_the_reference(policy: str) -> None:
    cfg = plain_settings()
    cfg.algorithm = config(own("Compared", 2.0), grpo={"weight": 0.0}, mpo={"weight": 0.0})
    learner = joined(cfg, policy)
    assert [term.name for term in learner.terms] == ["compared"] and learner.reference is not None
    losses = []
    for step in (1, 2):
        batch = make_batch(learner.encoder, step)
        batch.weights = cfg.algorithm.weights(step)
        metrics = learner.train_step(batch)
        assert "loss/grpo" not in metrics and metrics["loss/total"] == 2 * metrics["loss/compared"]
        losses.append(metrics["loss/compared"])
    assert losses[0] == pytest.approx(0, abs=1e-9)  # θ = π_0


def test_the_example_of_the_documentation_works() -> None:
    code = textwrap.dedent((term_module.__doc__ or "").split("::\n\n")[1].split("\n\nIt is trained")[0])
    names = {"Settings": Settings, "Term": Term, "Stat": Stat, "BatchView": BatchView}
    exec("from __future__ import annotations\n" + code, names)
    length: Any = names["Length"]
    term = length(length.Settings(limit=1))
    view = make_view(torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), mask=torch.tensor([[True, True], [True, False]]))
    loss, stats = hybrid_loss(view, [(term, 2.0)])
    assert (loss.item(), stats["loss/length"].item(), stats["length/over"].item()) == (-6, -3, 1)


def test_sums_and_maxima_over_micro_batches() -> None:
    term = Brevity(BrevitySettings(limit=1.5))
    active: list[tuple[Term, float]] = [(term, 1.0)]
    counts = Counts(samples=3, tokens=5, on_policy_tokens=5, grpo_samples=0, grpo_tokens=0, grpo_max_tokens=0, pairs=0,
                    pair_tokens=0, places=2)  # fmt: skip
    parts = []
    for mask in ([[True, True], [True, False]], [[True, True]]):
        view = make_view(
            torch.zeros(len(mask), 2),
            mask=torch.tensor(mask),
            weights=torch.zeros(len(mask)),
            items=[None] * len(mask),
            counts=counts,
        )
        parts.append(hybrid_loss(view, active)[1])
    totals = merged(parts, active)
    metrics = step_metrics(active, totals, counts)
    assert metrics["brevity/over"] == pytest.approx(2 / 3) and metrics["brevity/longest"] == 2
    assert merged([], active)["brevity/longest"] == -np.inf  # a rank without a micro-batch says nothing


@pytest.mark.parametrize("kind", TERMS, ids=lambda kind: kind.name)
def test_the_librarys_terms_declare_themselves_fully(kind: type[Term]) -> None:
    names = [stat.name for stat in kind.stats]
    assert len(set(names)) == len(names) and f"loss/{kind.name}" in METRICS
    for stat in kind.stats:
        assert METRICS[stat.name].unit == stat.unit and stat.per in Counts.__dataclass_fields__


def test_a_term_that_gives_other_statistics_than_it_declares() -> None:
    with pytest.raises(SkyrlError, match=r"term 'undeclared' gives statistics \['brevity/longest', .* declares \[\]"):
        hybrid_loss(make_view(torch.zeros(1, 1)), [(Undeclared(BrevitySettings()), 1.0)])


@pytest.mark.parametrize(
    "loss", [lambda x: x.detach().sum(), lambda x: x, lambda x: 1.0], ids=["still", "many", "float"]
)
def test_a_loss_that_could_not_train(loss: Any) -> None:
    class Wrong(Compared):
        uses_reference = False

        def loss(self, view: BatchView) -> tuple[torch.Tensor, Stats]:
            return loss(view.logprobs), {}

    view = make_view(torch.tensor([[-1.0, -2.0]]).requires_grad_())
    with pytest.raises(
        SkyrlError, match=r"the loss of term 'compared' must be one number that depends on the log-prob"
    ):
        hybrid_loss(view, [(Wrong(BrevitySettings()), 1.0)])


def test_a_statistic_that_is_not_finite_stops_the_step_by_its_name(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Brevity, view: BatchView) -> tuple[torch.Tensor, Stats]:
        total, stats = true_loss(self, view)
        return total, stats | {"brevity/over": total.detach() * np.nan}

    true_loss = Brevity.loss
    monkeypatch.setattr(Brevity, "loss", broken)
    cfg = plain_settings()
    cfg.algorithm = config(own())
    learner = joined(cfg, policy)
    batch = make_batch(learner.encoder, 7)
    batch.weights = cfg.algorithm.weights(7)
    with pytest.raises(SkyrlError, match="step 7: brevity/over is nan"):
        learner.train_step(batch)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([own("Missing")], rf"algorithm\.terms\[0\]\.path={HERE}:Missing: can't be imported"),
        ([own(), {"path": "no.such.module:Term"}], r"algorithm\.terms\[1\]\.path=no\.such\.module:Term: can't be"),
        ([own("NoTerm")], r"is no subclass of skyrl\.objective\.term\.Term"),
        ([own("Mute")], rf"{HERE}:Mute: the class does not declare its text and Settings"),
        ([own("Namesake")], r"its name is 'grpo'; allowed: an identifier, none of grpo, mpo"),
        ([own(), own("Brevity")], r"its name is 'brevity'; allowed: an identifier, none of grpo, mpo, brevity"),
        ([own(limit=-1)], rf"algorithm\.terms\[0\]\.settings of {HERE}:Brevity: limit=-1: Input should be greater"),
        ([own(limits=3)], r"limits=3: Extra inputs are not permitted"),
        ([own("PerWhat")], r"'loss/per_what' of term 'per_what' is per 'batches'; allowed: .*one of samples, tokens"),
        ([own("Clashing")], r"'clashing' .* declares metrics that there are already: grpo/clip_fraction"),
        ([own("ByPattern")], r"'by_pattern' .* there are already: eval/accuracy/mine"),
    ],
)
def test_refused(terms: list[dict[str, Any]], message: str) -> None:
    cfg = Config()
    cfg.algorithm.terms = config(*terms).terms
    with pytest.raises(ConfigError, match=message):
        metric_table(cfg)


def test_terms_of_a_run_and_their_weights() -> None:
    cfg = config(own(weight=0.25), own("Compared", 0.0))
    assert [(term.name, term.key, weight) for term, weight in own_terms(cfg)] == [
        ("brevity", f"{HERE}:Brevity", 0.25),
        ("compared", f"{HERE}:Compared", 0.0),
    ]
    terms = run_terms(cfg)
    assert [term.name for term in terms] == ["grpo", "mpo", "brevity"]
    batch = TrainBatch(1, 0, cfg.weights(1), [], [], 0, 0)
    assert [(term.name, weight) for term, weight in active_terms(terms, batch)] == [
        ("grpo", 1.0), ("mpo", 0.25), ("brevity", 0.25)
    ]  # fmt: skip
