"""Verifiers that hang, crash, raise or lie: each costs its own sample only. All of it with real processes."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hostile_verifiers
import pytest

from skyrl.records import DataError
from skyrl.rewards.conventions import Takes
from skyrl.rewards.runner import VerifierRunner

HERE = str(Path(__file__).parent)
NAMES = [name for name, one in vars(hostile_verifiers).items() if inspect.isfunction(one)]
OWN = {name: f"hostile_verifiers:{name}" for name in [*NAMES, "no_such"]}


@pytest.fixture(scope="module")
def runner() -> Iterator[VerifierRunner]:
    with closing(VerifierRunner(timeout=0.5, own=OWN)) as runner:
        yield runner


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(condition: object, seconds: float = 5.0) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_trusted_verifiers_need_no_process() -> None:
    with closing(VerifierRunner(timeout=0.5, numeric_tolerance=0.1)) as runner:
        assert runner.verify("numeric", "9.5", "9").score == 1.0
        assert runner.verify("exact", "cat", "dog").score == 0.0
        assert runner.verify("choice", "B", "(B)").score == 1.0
        assert runner._child is None


def test_broken_truth_is_an_error_not_a_zero() -> None:
    with closing(VerifierRunner(timeout=0.5)) as runner:
        verdict = runner.verify("numeric", "9", "nine")
    assert verdict.score is None
    assert "DataError" in str(verdict.error) and "'nine'" in str(verdict.error)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("hang", "killed after 0.5 s"),
        ("hang_in_c", "killed after 0.5 s"),
        ("crash", "exit status 3"),
        ("leave", "exit status 4"),
        ("fail", "KeyError: 'no such thing'"),
        ("hoard", "MemoryError"),
        ("too_high", "1.5"),
        ("not_a_number", "nan"),
        ("a_word", "'right' (str)"),
        ("no_such", "no_such"),
    ],
)
def test_misbehaviour_is_an_error_of_that_sample_only(runner: VerifierRunner, name: str, seen: str) -> None:
    start = time.monotonic()
    verdict = runner.verify(name, "x" * 500, "9")
    assert verdict.score is None
    assert seen in str(verdict.error) and f"verifier {name!r}" in str(verdict.error)
    assert "x" * 80 + "…" in str(verdict.error) and "x" * 81 not in str(verdict.error)
    assert time.monotonic() - start < 10
    assert runner.verify("right", "9", "9").score == 1.0
    assert runner.verify("right", "8", "9").score == 0.0


def test_process_is_kept_between_answers_and_replaced_after_a_crash(runner: VerifierRunner) -> None:
    first, second = runner.verify("process_id", "", ""), runner.verify("process_id", "", "")
    assert first == second
    runner.verify("fail", "", "")
    assert runner.verify("process_id", "", "") == first
    runner.verify("crash", "", "")
    assert runner.verify("process_id", "", "") != first


def test_process_that_died_while_idle_costs_no_sample(runner: VerifierRunner) -> None:
    runner.verify("right", "", "")
    child = runner._child
    assert child is not None
    child.process.kill()
    assert eventually(lambda: gone(child.process.pid))
    assert runner.verify("right", "9", "9").score == 1.0


def test_kill_takes_the_verifiers_own_processes_along(runner: VerifierRunner, tmp_path: Path) -> None:
    runner.verify("hang_with_child", str(tmp_path / "pid"), "")
    assert eventually(lambda: gone(int((tmp_path / "pid").read_text())))


def test_child_imports_no_heavy_module(runner: VerifierRunner) -> None:
    assert runner.verify("heavy_modules", "", "").score == 1.0


def test_prints_do_not_break_the_protocol(runner: VerifierRunner, capfd: pytest.CaptureFixture[str]) -> None:
    runner.close()  # a child takes its file descriptors when it starts
    assert runner.verify("chatter", "", "").score == 1.0
    assert capfd.readouterr().out == ""


def test_unknown_name_raises(runner: VerifierRunner) -> None:
    with pytest.raises(DataError, match="'nope'"):
        runner.verify("nope", "", "")
    with pytest.raises(DataError, match="'nope'"):
        runner.takes("nope")


def test_own_names() -> None:
    with closing(VerifierRunner(timeout=5.0, own={"mine": OWN["right"], "gone": "hostile_verifiers:absent"})) as runner:
        assert [runner.verify("mine", answer, "9").score for answer in ("9", "8")] == [1.0, 0.0]
        assert runner.takes("mine") is Takes.answer
        with pytest.raises(DataError, match=r"verifier 'gone'.*absent' can't be imported"):
            runner.takes("gone")
        assert "verifier 'gone'" in str(runner.verify("gone", "9", "9").error)
        assert runner.verify("numeric", "9.0", "9").score == 1.0


def test_works_beside_threads_and_off_the_main_thread() -> None:
    """As in a Ray actor, whose process has threads and may call from one of them."""
    scores: list[float | None] = []

    def work() -> None:
        with closing(VerifierRunner(timeout=5.0)) as runner:
            scores.append(runner.verify("math", "\\frac{1}{2}", "0.5").score)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert scores == [1.0]


def test_close_ends_the_process_and_is_repeatable() -> None:
    runner = VerifierRunner(timeout=0.5, own=OWN)
    runner.close()
    runner.verify("right", "", "")
    child = runner._child
    assert child is not None
    runner.close()
    runner.close()
    assert child.process.returncode is not None


def test_child_ends_with_a_killed_parent() -> None:
    code = (
        f"import sys, os; sys.path.insert(0, {HERE!r})\n"
        "from skyrl.rewards.runner import VerifierRunner\n"
        "runner = VerifierRunner(1.0, own={'mine': 'hostile_verifiers:right'}); runner.verify('mine', '', '')\n"
        "print(runner._child.process.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert eventually(lambda: gone(int(output)))


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("\\frac{1}{2}", "0.5", 1.0),
        ("$(x+1)^2$", "x^2+2x+1", 1.0),
        ("\\sqrt{8}", "2\\sqrt{2}", 1.0),
        ("\\boxed{3}", "3", 1.0),
        ("x^2+1", "x^2+2x+1", 0.0),
        ("\\frac{1}{3}", "0.5", 0.0),
        ("", "9", 0.0),
        ("__import__('os').system('exit 1')", "9", 0.0),
    ],
)
def test_math(answer: str, truth: str, score: float) -> None:
    assert math_runner().verify("math", answer, truth).score == score


def test_endless_math_is_killed_and_what_is_seen_to_be_endless_is_wrong() -> None:
    with closing(VerifierRunner(timeout=2.0)) as runner:
        assert runner.verify("math", "9^{9^{9^{9}}}", "9").score == 0
        verdict = runner.verify("math", r"\sum_{k=1}^{\infty}\frac{\sin k}{k^{1.1}}", "9")
    assert verdict.score is None and "killed after 2 s" in str(verdict.error)


@pytest.mark.parametrize(
    ("truth", "right"), [("50%", "50\\%"), ("$50\\%$", "0.5"), ("50°", "50^\\circ"), ("50", "50%")]
)
def test_signs_of_per_cent_and_degree(truth: str, right: str) -> None:
    assert [math_runner().verify("math", answer, truth).score for answer in (right, "50", "51%")] == [1, 1, 0]


@pytest.mark.parametrize("truth", ["", "\\frac{", "x^2+", "???"])
def test_unreadable_math_truth_is_an_error(truth: str) -> None:
    assert "DataError" in str(math_runner().verify("math", "9", truth).error)


_MATH: list[VerifierRunner] = []


def math_runner() -> VerifierRunner:
    """One process for all the tests: sympy takes a second to load."""
    if not _MATH:
        _MATH.append(VerifierRunner(timeout=30.0))  # what is tested is the verdict, also on a busy machine
    return _MATH[0]


@pytest.fixture(scope="module", autouse=True)
def close_math_runner() -> Iterator[None]:
    yield
    for runner in _MATH:
        runner.close()
