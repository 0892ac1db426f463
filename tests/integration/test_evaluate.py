"""An evaluation with real members over Ray: two rollout and two reward members share a task. The engine is the plain
one: the evaluation knows the sampler only, and how it samples with vLLM is what other tests are for."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from skyrl.crew.local_executor import LocalExecutor
from skyrl.evaluate import evaluate
from skyrl.settings import Config

pytestmark = pytest.mark.integration


def test_members_over_ray_give_what_one_process_gives(make_config: Callable[..., Config], tmp_path: Path) -> None:
    cfg = make_config("evaluate")
    path = tmp_path / "data" / "gsm8k" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(
        "".join(json.dumps({"question": f"What is 2+{i}?", "answer": f"#### {2 + i}"}) + "\n" for i in range(5))
    )
    cfg.rollout.engine, cfg.rollout.max_prompt_tokens = "tests.plain_engine:PlainEngine", 400
    cfg.rollout.num_workers, cfg.reward.num_workers, cfg.rollout.prompts_per_step = 2, 2, 4
    cfg.rollout.threads = 1
    cfg.evaluate.tasks, cfg.evaluate.data_dir = ["gsm8k", "training"], str(tmp_path / "data")
    cfg.data.eval_size = 6
    found = {}
    for name, executor in (("ray", None), ("here", LocalExecutor())):
        cfg.evaluate.output = str(tmp_path / name)
        results = evaluate(cfg, Console(file=io.StringIO(), width=200), executor)
        found[name] = results["tasks"], pq.read_table(tmp_path / name / "answers.parquet").to_pylist()
    tasks, answers = found["ray"]
    assert found["here"] == found["ray"]
    assert [tasks[name]["questions"] for name in ("gsm8k", "training")] == [5, 6]
    assert [answer["id"] for answer in answers[:5]] == [f"gsm8k/{i}" for i in range(5)]
    assert tasks["training"]["errors"] == 0 and all(answer["tokens"] > 0 for answer in answers)
