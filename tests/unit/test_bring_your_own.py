"""docs/bring_your_own.md: its scripts run, its files have no bad row, its commands are valid settings, and its reward
functions score. (Its launches are not run here: each takes a minute.)"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skyrl.cli import compose_config
from skyrl.data.datasets import build_datasets
from skyrl.records import Sample, SampleGroup
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.judging import Checks, rule_score

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "bring_your_own.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"into `(\w+\.py)`:\n\n```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
LAUNCHES = re.findall(r"-m skyrl\.launch (.*?)\n(?:```|\n)", TEXT.replace("\\\n", " "), re.DOTALL)
ANSWERS = {"mine": ("deer", "xyz"), "like_verl": ("The sum is 0.", "nothing"), "like_trl": ("0 1 2", "hm")}
"""Of each run: an answer to the first row that earns more, and one that earns less."""


def test_the_page_has_three_paths() -> None:
    made = {"make_data.py", "make_verl.py", "make_trl.py"}
    assert set(FILES) == made | {"my_rewards.py", "verl_reward.py", "trl_reward.py"}
    assert len(LAUNCHES) == 3


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file, code in FILES.items():
        (tmp_path / file).write_text(code)
    maker = {"mine": "make_data.py", "like_verl": "make_verl.py", "like_trl": "make_trl.py"}[name]
    subprocess.run([sys.executable, maker], check=True)
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model" / "config.json").write_text("{}")
    arguments = next(found for text in LAUNCHES if f"name={name}" in (found := shlex.split(text)))
    cfg = compose_config(arguments)
    assert cfg.name == name and cfg.reward.verifiers
    datasets = build_datasets(cfg)
    assert len(datasets["train"]) >= cfg.rollout.prompts_per_step and len(datasets["eval"]) >= 20
    prompt = datasets["train"][0]
    assert (len(prompt.images) == 1) == (name == "mine")
    form = AnswerForm(cfg.reward.answer, "", cfg.reward.verifier_timeout)
    ids = np.zeros(2, np.int32)
    samples = [Sample(i, ids, None, text, False, 0) for i, text in enumerate(ANSWERS[name])]
    for sample in samples:
        sample.answer = form.find(sample.text)
    group = SampleGroup(prompt, samples[0].token_ids, samples)
    checks = Checks(cfg, form)
    try:
        scores = [rule_score(parts) for parts in checks.parts([group])[0]]
    finally:
        checks.close()
    assert all(problem is None for _, problem in scores), scores
    assert scores[0][0] > scores[1][0]  # type: ignore[operator]
