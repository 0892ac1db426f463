"""A model behind an address that says whether an answer is right.

It is asked by the reward worker itself: the processes of other verifiers have neither the key nor the question.
Verdicts are kept in a file of the run, which counts the requests of all workers too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from skyrl.records import ConfigError, SkyrlError
from skyrl.redaction import hide_variables
from skyrl.rewards.endpoint import EndpointError, UnusableReply, post_json
from skyrl.settings.judge import FIELDS, JudgeConfig

CACHE_FILE = "judge.sqlite"
"""In the run's folder."""
FAILURES_IN_A_ROW = 8
"""Verdicts that fail one after the other end the run: the address is gone, and each costs all its tries."""


class Case(NamedTuple):
    """What is judged."""

    question: str
    answer: str
    truth: str


class BudgetError(SkyrlError):
    """``reward.judge.max_calls`` is spent."""


class EndpointJudge:
    """Asks for verdicts, several at a time.

    Args:
        cfg: Settings, with a ``url``.
        folder: Where verdicts are kept; None keeps them in memory.
        pause: Seconds before the second try.

    Raises:
        ConfigError: if there is no ``url``, or the environment variable of the key is not set.
    """

    def __init__(self, cfg: JudgeConfig, folder: Path | None, pause: float = 1.0) -> None:
        if cfg.url is None:
            raise ConfigError("a row names the verifier 'judge', but reward.judge.url is null; set it and .model")
        self.cfg, self.pause = cfg, pause
        self.url = cfg.url.rstrip("/") + "/chat/completions"
        self._headers = {}
        if cfg.api_key_env is not None:
            if not (key := os.environ.get(cfg.api_key_env)):
                raise ConfigError(f"reward.judge.api_key_env={cfg.api_key_env}: that environment variable is not set")
            self._headers["Authorization"] = f"Bearer {key}"
            hide_variables([cfg.api_key_env])
        self._lock, self._failures = threading.Lock(), 0
        path = ":memory:" if folder is None else str(folder / CACHE_FILE)
        self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
        self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL, reply TEXT)")
        self._file.execute("CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 0), calls INTEGER)")
        self._file.execute("INSERT OR IGNORE INTO spent VALUES (0, 0)")

    def verdicts(self, cases: Sequence[Case]) -> list[tuple[float | None, str | None]]:
        """Of each case a score, 1.0 or 0.0, or an error that names the address. Equal cases are asked once.

        Raises:
            BudgetError: if ``max_calls`` is spent.
            EndpointError: if the address failed :data:`FAILURES_IN_A_ROW` times in a row.
        """
        distinct = list(dict.fromkeys(cases))
        threads = ThreadPoolExecutor(self.cfg.parallel)
        try:
            found = dict(zip(distinct, threads.map(self._verdict, distinct), strict=True))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return [found[case] for case in cases]

    def _verdict(self, case: Case) -> tuple[float | None, str | None]:
        try:
            return self.verify(*case), None
        except UnusableReply as error:  # perhaps the answer's doing
            return None, str(error)
        except EndpointError as error:
            with self._lock:
                self._failures += 1
                gone = self._failures >= FAILURES_IN_A_ROW
            if gone:
                raise EndpointError(f"the judge failed {self._failures} times in a row; the last: {error}") from error
            return None, str(error)

    def verify(self, question: str, answer: str, truth: str) -> float:
        """1.0 for right, 0.0 for wrong.

        Raises:
            EndpointError: if no try gave a verdict in the form that was asked for.
            BudgetError: if ``max_calls`` is spent.
        """
        cfg = self.cfg
        content = json.dumps([cfg.url, cfg.model, cfg.template, cfg.max_tokens, question, answer, truth])
        key = hashlib.sha256(content.encode()).hexdigest()
        with self._lock:
            known = self._file.execute("SELECT score FROM verdicts WHERE key = ?", (key,)).fetchone()
        if known is not None:
            return float(known[0])
        mark = key[:16]  # depends on the answer, so that the answer can't hold it
        told = filled(cfg.template, {"question": question, "answer": answer, "truth": truth, "mark": mark})
        body: dict[str, Any] = {"model": cfg.model, "messages": [{"role": "user", "content": told}]}
        body |= {"temperature": 0, "max_tokens": cfg.max_tokens}
        score, reply = post_json(
            self.url,
            body,
            lambda got: read_verdict(got, mark),
            self._headers,
            cfg.timeout,
            cfg.tries,
            self.pause,
            self._pay,
        )
        with self._lock:
            self._failures = 0
            self._file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, score, reply))
        return float(score)

    def _pay(self) -> None:
        with self._lock:
            paid = self._file.execute(
                "UPDATE spent SET calls = calls + 1 WHERE calls < ?", (self.cfg.max_calls,)
            ).rowcount
        if not paid:
            raise BudgetError(
                f"the judge at {self.url} was asked {self.cfg.max_calls} times, which is reward.judge.max_calls"
            )


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields replaced, in one pass: a value that holds ``{truth}`` stays as it is."""
    return re.sub(rf"\{{({'|'.join(FIELDS)})\}}", lambda field: values[field.group(1)], template)


def read_verdict(reply: Any, mark: str) -> tuple[float, str]:
    """Score and text of a reply of the address; :class:`ValueError` if its last line is no verdict, or another line is
    one too."""
    choice = reply["choices"][0]
    text = choice["message"]["content"]
    if choice.get("finish_reason") == "length":
        raise ValueError("the reply was cut off; raise reward.judge.max_tokens")
    if not isinstance(text, str):
        raise ValueError(f"the reply has the content {text!r}")
    lines = [line.strip().strip("*`") for line in text.strip().splitlines()]
    said = [line for line in lines if line in (f"VERDICT {mark}: RIGHT", f"VERDICT {mark}: WRONG")]
    if len(said) != 1 or lines[-1] != said[0]:
        raise ValueError(
            f"the reply ends with {text.strip()[-80:]!r}; needed: one last line 'VERDICT {mark}: RIGHT' or WRONG"
        )
    return float(said[0].endswith("RIGHT")), text


def judge_verifier(answer: str, truth: str) -> float:
    """Not to be called: a judge needs the question, and is asked by the reward worker."""
    raise SkyrlError("the judge needs the question: it is asked by the reward worker, not as a function of its own")
