"""What ``python -m skyrl.watch`` shows, from hand-made folders."""

from __future__ import annotations

import fcntl
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from skyrl import watch as watching
from skyrl.monitoring.advice import advice
from skyrl.monitoring.lanes import Lane, Lanes, lanes_of
from skyrl.monitoring.timeline import Event
from skyrl.records import DataError
from skyrl.settings import Config
from skyrl.watch import main, watch

STEP = {
    "time/rollout": 6.0, "time/reward": 0.5, "time/buffer": 0.1, "time/learner": 3.0, "time/sync": 0.4,
    "time/step": 10.0, "buffer/size": 812, "buffer/age_mean": 2.5, "buffer/age_max": 7, "buffer/replayed": 20,
    "batch/items": 256, "batch/lag_mean": 0.0, "batch/lag_max": 0.0, "buffer/effective_share": 0.75,
    "buffer/effective_share_fresh": 0.5,
}  # fmt: skip


def folder(path: Path, steps: int = 3, **settings: Any) -> Path:
    """A run's folder."""
    cfg = Config(name="tiny", run_dir=str(path))
    cfg.controller.steps = 10
    saved = cfg.model_dump(mode="json")
    for key, value in settings.items():
        group, name = key.split("__")
        saved[group][name] = value
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(saved))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **STEP}) + "\n" for n in range(1, steps + 1)))
    return path


def told(path: Path, *events: dict[str, Any]) -> None:
    base = {"time": 0.0, "step": 2, "kind": "replaced", "member": "rollout-0", "text": "it died"}
    (path / "events.jsonl").write_text("".join(json.dumps(base | event) + "\n" for event in events))


def shown(path: Path) -> str:
    file = io.StringIO()
    watch(path, Console(file=file, width=40), once=True)
    return file.getvalue()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """As a living run holds it."""
    with (path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def slices() -> list[Event]:
    """Two steps of 10 s; rollout-0 samples 6 s of each, learner-0 trains 3."""
    events: list[Event] = []
    for place, (process, name) in enumerate([(1, "steps"), (2, "rollout-0"), (5, "learner-0")]):
        thread = {"pid": process, "tid": 1}
        events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": name}})
        for step in (1, 2):
            at = step * 20e6  # ten seconds of evaluation lie between
            parts = [
                [("step", "", 0, 10)],
                [
                    ("call", "Sampler.generate", 0, 6),
                    ("wait", "waits: learner", 6, 9),
                    ("call", "Sampler.probe", 12, 15),
                ],
                [("wait", "waits: rollout", 0, 6), ("call", "LearnerStep.train_step", 6, 9)],
            ][place]
            for category, called, start, end in parts:
                about = {"step": step, "version": step, "waited": start / 2}
                times = {"ts": at + start * 1e6, "dur": (end - start) * 1e6}
                events.append({"ph": "X", "cat": category, "name": called, **thread, **times, "args": about})
    return events


def test_a_log_file_gets_whole_plain_lines_with_alarms_first_and_advice_last(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    told(
        run,
        {"kind": "alarm", "member": "answers-cut-off", "text": "each answer is cut off"},
        {"kind": "alarm", "member": "rewards-never-differ", "text": "all equal"},
        {"kind": "alarm over", "member": "rewards-never-differ", "step": 3},
        {"kind": "replaced", "text": "rollout-0 died\x1b[31m in Sampler.generate [red]x[/red]"},
    )
    (run / "timeline").mkdir()
    (run / "timeline" / "steps_000001.json").write_text("[\n" + ",\n".join(map(json.dumps, slices())) + "\n]\n")
    text = shown(run)
    lines = text.splitlines()
    assert "\x1b" not in text and "[red]x[/red]" in text
    assert lines[0].startswith(f"tiny {run} | step 3/10 | ended without a summary")
    assert lines[1] == "ALARM  answers-cut-off, since step 2: each answer is cut off"
    assert "rewards-never-differ" not in text
    assert "  rollout-0 ████████████········  60 % busy: generate 6.00 | waits in learner 3.00" in lines
    assert "  learner-0 ██████··············  30 % busy: train_step 3.00 | waits in rollout 6.00" in lines
    assert any(
        line.startswith("SSB: 812 of 4,096 samples | replayed 20 of 256 | ages mean 2.5, oldest 7 of 8")
        for line in lines
    )
    assert lines.index("advice") > max(lines.index(line) for line in lines if line.startswith(("queue", "events")))
    assert "controller.lag=1" in text[text.index("advice") :]


def test_what_lies_outside_of_the_steps_does_not_count() -> None:
    lanes = lanes_of(slices())
    assert lanes is not None and (lanes.first, lanes.last, lanes.seconds) == (1, 2, 10.0)
    rollout, learner = lanes.members
    assert (rollout.busy, dict(rollout.waits), rollout.last) == (6.0, {"learner": 3.0}, "generate")
    assert (learner.busy, learner.queued) == (3.0, 3.0)
    assert lanes_of([]) is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("nothing", "has no config.json; allowed is the folder of a run"),
        ("config.json", "config.json is not valid JSON"),
        ("list", "config.json holds no settings of a run"),
        ("metrics.jsonl", "metrics.jsonl, line 1 is not valid JSON"),
        ("events.jsonl", "events.jsonl, line 1 is no event"),
    ],
)
def test_a_wrong_folder_is_a_clear_error(
    tmp_path: Path, broken: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path if broken == "nothing" else folder(tmp_path / "run")
    if broken == "list":
        (run / "config.json").write_text("[]")
    elif broken != "nothing":
        (run / broken).write_text("nonsense\n{}\n")
    monkeypatch.setattr("sys.argv", ["watch", str(run), "--once"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1 and said in capsys.readouterr().err
    with pytest.raises(DataError):
        watch(run, Console(file=io.StringIO()), once=True)


def test_a_run_that_has_measured_nothing_yet(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", steps=0)
    assert shown(run).splitlines()[0].split(" | ")[1] == "step 0/10"
    (run / "metrics.jsonl").unlink()
    with held(run):
        assert "going on" in shown(run)


def test_states_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder(tmp_path / "run")
    with held(run):
        assert "going on | about 1 min 10 s of training left" in shown(run) and "ALARM" not in shown(run)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 200.0)
        assert "ALARM  no number for 3 min 20 s; a step takes 10 s" in shown(run)
    assert "ALARM" not in shown(run)  # it has stopped
    (run / "summary.json").write_text("{}")
    assert "| ended |" in shown(run)


def test_it_follows_a_run_to_its_end_and_prints_a_block_for_each_step(tmp_path: Path) -> None:
    run, file = folder(tmp_path / "run", steps=1), io.StringIO()
    with held(run):
        follower = threading.Thread(target=watch, args=(run, Console(file=file)), kwargs={"every": 0.02})
        follower.start()
        for step in (2, 3):
            until = time.monotonic() + 10
            while f"step {step - 1}/10" not in file.getvalue() and time.monotonic() < until:
                time.sleep(0.01)
            with (run / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps({"step": step, **STEP}) + "\n")
        time.sleep(0.2)
    follower.join(timeout=10)
    assert not follower.is_alive()
    heads = [line.split(" | ")[1:3] for line in file.getvalue().splitlines() if line.startswith("tiny")]
    assert heads[:3] == [[f"step {step}/10", "going on"] for step in (1, 2, 3)]
    assert heads[3][1].startswith("ended without") and len(heads) == 4


def test_a_terminal_gets_a_view_that_renews_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = folder(tmp_path / "run"), io.StringIO()
    looks = iter([True, True, False])
    monkeypatch.setattr(watching, "in_use", lambda path: next(looks))
    watch(run, Console(file=file, width=120, force_terminal=True), every=0.01)
    assert file.getvalue().count("step 3/10") >= 3 and "\x1b[" in file.getvalue()


# ---------------------------------------------------------------- advice


def advised(lanes: Lanes | None = None, metrics: dict[str, float] | None = None, **settings: Any) -> list[str]:
    cfg = Config().model_dump(mode="json")
    for key, value in settings.items():
        group, name = key.split("__")
        cfg[group][name] = value
    return advice([{"step": n, **STEP, **(metrics or {})} for n in range(1, 13)], cfg, lanes)


def test_advice_rests_on_the_figures() -> None:
    first, second = advised()
    # 6 + 0.5 of 10 s are waited for; beside each other the longer one, 6.5, and the sync, 0.4.
    assert first.startswith("learners wait 65 % of a step") and "controller.lag=1" in first
    assert "6.9 s a step instead of 10.0" in first
    # 64 prompts: two members next; half of 6 s; without any sampling 4 s are left.
    assert "rollout.num_workers=2" in second and "up to 3.0 s" in second and "is 4.0 s a step instead of 10.0" in second


def test_advice_with_a_lag_names_what_is_still_waited_for() -> None:
    (one,) = advised(controller__lag=1, rollout__num_workers=4, rollout__prompts_per_step=36)
    assert "4 rollout member(s): rollout.num_workers=6" in one  # 5 does not divide 36
    learner = {"time/rollout": 0.2, "time/learner": 7.0, "time/step": 8.0}
    (one,) = advised(metrics=learner, controller__lag=1)
    assert one.startswith("the learner takes 88 % of a step: learner.num_workers=2") and "3.5 s" in one
    assert "The limit is 1.0 s a step, not 8.0" in one
    beside = Lanes(1, 5, 8.0, {}, [Lane("rollout-0", {"generate": 4.5}), Lane("learner-0", {"train_step": 7.0})])
    assert "The limit is 4.5 s a step" in advised(beside, learner, controller__lag=1)[0]
    assert "controller.lag=1" in advised(metrics=learner, controller__lag=3)[-1]


def test_advice_where_one_rollout_member_holds_up_the_others() -> None:
    members = [Lane("rollout-0", {"generate": 2.0}), Lane("rollout-1", {"generate": 6.0}), Lane("learner-0", {})]
    lanes = Lanes(1, 5, 10.0, {}, members)
    found = advised(lanes, rollout__num_workers=2)
    assert (
        "2.0 s a step, the slowest 6.0" in found[1]
        and "rollout.oversample=0.5" in found[1]
        and "4.0 s less" in found[1]
    )
    assert not any("oversample" in one for one in advised(lanes, rollout__num_workers=2, rollout__oversample=0.5))


def test_advice_on_rewards_sync_evaluation_and_the_buffer() -> None:
    quick = {"time/rollout": 0.1, "time/reward": 3.0, "time/learner": 2.0, "time/sync": 4.0, "time/step": 10.0}
    found = advised(metrics=quick | {"eval/seconds": 300.0, "sync/megabytes": 12.0})
    assert [one.split(":")[0] for one in found] == [
        "learners wait 31 % of a step for answers and their scores",
        "the loop waits 30 % of a step for 1 reward member(s)",
        "the weight sync takes 40 % of a step (12 MB a rollout member)",
        "evaluations take 75 % of the time (300.0 s every 10 steps)",
    ]
    poor = {"buffer/effective_share_fresh": 0.1, "buffer/effective_share": 0.2}
    assert (
        "filter_prompts" in advised(metrics=quick | poor)[-2] and "buffer.max_age" in advised(metrics=quick | poor)[-1]
    )
    assert not any("max_age" in one for one in advised(metrics=quick | poor, buffer__enabled=False))


def test_a_run_without_steps_or_with_nothing_to_change_is_left_alone() -> None:
    assert advice([], Config().model_dump(mode="json"), None) == []
    even = {"time/rollout": 2.0, "time/learner": 4.0, "time/step": 8.5}
    assert advised(metrics=even, controller__lag=1) == []
