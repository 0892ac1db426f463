"""What came of the strikes, as Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict

from tests.faults.runs import Outcome, Struck


def bad(outcome: Outcome) -> bool:
    """Whether a run shows a fault. With a lag values may differ; samples may be neither lost nor trained twice."""
    lag = outcome.name.startswith("lag1") or outcome.name in ("driver", "host")
    wrong = [] if lag else outcome.differing
    return bool(outcome.survived < len(outcome.strikes) or wrong or outcome.lost or outcome.twice)


INTRO = """\
# Killed, stopped, cut off

`make faults` trains a tiny policy over Ray and *strikes* its processes: each sends itself SIGKILL, or SIGSTOP, at one
point of a step (`tests/faults/points.py` lists them: before and after each call, and within sampling, scoring, drawing,
the backward pass, the update, a save). The run must go on by itself; where its own process or its only host is struck,
the same command must go on with it (`resume=auto`). Beside each run stands the same one left alone: every metric that
is no wall time, every sample and the bytes of the exported policy are compared. *KILL* is SIGKILL. *STOP* is SIGSTOP:
the process stays there and answers nothing, which is noticed after `controller.timeout`. *PAUSE* is SIGSTOP for three
seconds: nobody may be replaced for it. *Samples lost* are answers that the run left alone trained on and the struck one
did not. *Seconds until it goes on* count from the strike until a step is done that had not been done before; most of
them are the start of a process and its imports. In the run `real` vLLM samples and DeepSpeed trains, on two ranks; in
the others a plain engine and backend stand in for them.
"""


def table(outcomes: list[Outcome]) -> str:
    """One table of the runs, one of the roles and ways to strike, and what was not survived."""
    every = [strike for outcome in outcomes for strike in outcome.strikes]
    lines = [
        *INTRO.splitlines(),
        "",
        f"{sum(one.survived for one in every)} of {len(every)} strikes survived.",
        "",
        "| run | strikes | survived | samples lost | prompts trained twice | values that differ | exported policy |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        same = "the same bytes" if one.policy_equal else "differs"
        lines.append(
            f"| {one.name} | {len(one.strikes)} | {one.survived} | {len(one.lost)} | {len(one.twice)} | "
            f"{len(one.differing)} | {same} |"
        )
    lines += ["", "| struck | how | strikes | survived | seconds until it goes on: median | largest |"]
    lines += ["|---|---|---|---|---|---|"]
    groups: defaultdict[tuple[str, str], list[Struck]] = defaultdict(list)
    for strike in every:
        groups[strike.point.partition("/")[0], strike.how].append(strike)
    for (role, how), struck in sorted(groups.items()):
        seconds = [one.seconds for one in struck if one.survived and one.seconds is not None] or [float("nan")]
        lines.append(
            f"| {role} | {how} | {len(struck)} | {sum(one.survived for one in struck)} | "
            f"{statistics.median(seconds):.1f} | {max(seconds):.1f} |"
        )
    lost = [f"- {one.member} at {one.point} ({one.how}): {_last_line(one.error)}" for one in every if not one.survived]
    return "\n".join([*lines, *(["", "Not survived:", "", *lost] if lost else []), ""])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
