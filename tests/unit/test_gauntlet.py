"""Silent faults in whole runs of one process, with plain parts instead of vLLM and DeepSpeed; and the gauntlet's own
book-keeping."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import policy_folder

from benchmarks.gauntlet import clean, report
from benchmarks.gauntlet.fault import Fault
from benchmarks.gauntlet.faults import BY_NAME, CHOSEN, FAULTS
from benchmarks.gauntlet.run import SETTINGS, attempt
from skyrl.settings import Alarm, all_settings


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = policy_folder(tmp_path_factory.getbasetemp() / "tiny")
    return (
        *SETTINGS,
        *("rollout.engine=plain_engine:PlainEngine", "learner.backend=plain_backend:PlainBackend"),
        *(f"model.policy={folder}", "model.reward=null", "reward=rule_only"),
        *("algorithm.mpo.pairs=rule", "algorithm.mpo.threshold.kind=off", "algorithm.mpo.generation_weight=1"),
        *("digits.kinds=[max]", "digits.text_share=0", "digits.train_size=400", "data.eval_size=16"),
        *("rollout.prompts_per_step=6", "rollout.samples_per_prompt=4", "rollout.max_new_tokens=24"),
        *("rollout.probe_prompts=2", "rollout.probe_new_tokens=4", "hallucination.probe_prompts=2"),
        *("learner.lr=3e-4", "learner.warmup_steps=0", "controller.steps=2"),
    )


@pytest.mark.parametrize(
    "name", ["weights_never_synced", "wrong_stop_token", "template_twice", "reward_always_0", "loss_weight_inert"]
)
def test_a_fault_is_noticed_by_its_name(name: str, plain: tuple[str, ...]) -> None:
    outcome, fault = attempt((), BY_NAME[name], plain), BY_NAME[name]
    assert report.caught(fault, {"said": outcome.said()}), outcome


def test_nothing_is_said_when_the_switch_is_off(plain: tuple[str, ...]) -> None:
    outcome = attempt((), None, plain)
    assert outcome.said() == [] and outcome.steps == 2


def test_the_faults_are_written_down_fully() -> None:
    assert len(BY_NAME) == len(FAULTS) and len(CHOSEN) == 24
    for fault in FAULTS:
        re.compile(fault.said)
        assert fault.story.endswith(".") and all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", one) for one in fault.reports)
        # An alarm that is waited for is one that there is.
        for word in re.findall(r"[a-z]+(?:_[a-z0-9]+)+", fault.said):
            assert word in {alarm.value for alarm in Alarm} | {"loss_weight"}, (fault.name, word)
    assert all(fault.reports for fault in CHOSEN)


def test_clean_runs_differ_and_their_settings_exist() -> None:
    runs = [clean.settings_of(run) for run in range(clean.RUNS)]
    assert len(set(runs)) == clean.RUNS
    groups = {"algorithm", "buffer", "reward"}
    for key in {one.partition("=")[0] for run in runs for one in run} - groups:
        assert key in all_settings(), key


def row(name: str, *said: tuple[int, str]) -> dict[str, object]:
    return {"kind": "fault", "fault": name, "said": [list(one) for one in said]}


def test_noticed_means_by_its_name_and_within_a_step() -> None:
    fault: Fault = BY_NAME["reward_always_0"]  # acts in step 1
    right, other = "no_contrast: all 0", "looping: again"
    assert report.caught(fault, row(fault.name, (1, right))) and report.caught(fault, row(fault.name, (2, right)))
    assert report.caught(fault, row(fault.name, (1, other), (1, right)))
    assert not report.caught(fault, row(fault.name, (3, right)))
    assert not report.caught(fault, row(fault.name, (1, other))) and not report.caught(fault, row(fault.name))
    names = [one.name for one in CHOSEN]
    rows = [row(name) for name in names[1:]] + [row(names[0], (1, "SyncError: x do not hold the learner's weights"))]
    rows += [{"kind": "clean", "run": 0, "settings": ["a=b"], "said": []}]
    text = report.document(rows)
    assert "- **1 of 24** faults" in text and "**0 of 1** runs" in text and text.count("**not noticed**") == 23


def test_the_document_is_that_of_the_rows() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    if not (folder / "gauntlet.jsonl").is_file():
        pytest.skip("the gauntlet was not run")
    from benchmarks.gauntlet.__main__ import read

    assert (folder / "gauntlet.md").read_text(encoding="utf-8") == report.document(read(folder / "gauntlet.jsonl"))
