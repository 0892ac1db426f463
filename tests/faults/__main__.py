"""``python -m tests.faults``: strikes more than a hundred times, and writes what came of it.

    python -m tests.faults [--out outputs/faults] [--only lag0 driver …] [--minutes 30]

Goes on where it was interrupted. ``OUT/faults.json`` has every strike, ``OUT/faults.md`` the tables. Exit code 1 if a
strike was not survived, a value differs at lag 0, or a sample was lost or trained twice.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.faults.plans import nightly
from tests.faults.runs import Outcome, Struck, compare, drive, reference
from tests.faults.table import bad, table

ROOT = Path(__file__).parents[2]
PATIENCE = 3.0
"""Times ``controller.timeout`` without progress, after which a run hangs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "faults")
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the next call goes on")
    given = parser.parse_args()
    until, started = time.monotonic() + 60 * given.minutes, time.monotonic()
    out: Path = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_runs

    policy = out / "policy"
    plans = nightly(str(policy) if (policy / "config.json").exists() else tiny_runs.policy_folder(out))
    outcomes: list[Outcome] = []
    for name, plan in plans.items():
        file = out / name / "outcome.json"

        def show(text: str, name: str = name) -> None:
            print(f"{time.monotonic() - started:6.0f} s  {name}: {text}", flush=True)
            if time.monotonic() > until:
                raise KeyboardInterrupt

        if not file.exists() and (not given.only or name in given.only):
            alone = reference(out / name / "alone", plan)
            strikes = drive(out / name / "struck", plan, PATIENCE * plan.timeout + 30, show)
            made = compare(name, alone, out / name / "struck", strikes)
            file.write_text(json.dumps(asdict(made), indent=1))
        if file.exists():
            outcomes.append(_read(file))
    (out / "faults.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    (out / "faults.md").write_text(table(outcomes))
    print(table(outcomes))
    return int(any(map(bad, outcomes)))


def _read(file: Path) -> Outcome:
    found = json.loads(file.read_text())
    return Outcome(**(found | {"strikes": [Struck(**one) for one in found["strikes"]]}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
