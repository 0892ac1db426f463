"""What lies beside an exported policy: card, settings and results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_runs import config, policy_folder

from skyrl.cli import compose_config
from skyrl.crew.local_executor import LocalExecutor
from skyrl.monitoring.model_card import _override, base_model, measured, portable, write_model_card
from skyrl.monitoring.records import jsonable
from skyrl.monitoring.samples import SampleFiles
from skyrl.monitoring.summary import write_summary
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.module import load_policy
from skyrl.records import Prompt, RewardParts, Sample, SampleGroup
from skyrl.run import run
from skyrl.settings import Config

IDS = np.zeros(2, np.int32)
PICTURE = np.zeros((2, 2, 3), np.uint8)
HISTORY = [
    {"step": 0, "eval/accuracy": 0.25, "eval/hallucination": 0.5, "eval/accuracy/a|`b\n": 0.25},
    {"step": 4, "eval/accuracy": 0.75, "eval/hallucination": 0.0, "time/step": 90.0},
]


def group(name: str, rule: float | None, false: int | None = None, variant: str = "") -> SampleGroup:
    reward = None if rule is None else RewardParts(rule, 1.0, None, rule)
    one = Sample(0, IDS, None, "x", False, 0, reward, error="late" if rule is None else None)
    one.claims, one.false_claims = (0, 0) if false is None else (3, false)
    return SampleGroup(Prompt(name, "?", (PICTURE,), "1", "exact", variant=variant), IDS, [one], false is not None)


BEFORE = [group("0", 1.0, 1), group("1", 0.5, 0), group("2", 0.0, 2), group("3", None), group("4", 0.0)]
AFTER = [group("0", 1.0, 0), group("1", 1.0, 0), group("2", 1.0, 0), group("4", 0.0), group("0", 1.0, 3, "blind")]


def make(folder: Path) -> tuple[Config, Path]:
    """A run whose policy came from ``folder/secret place/base``, which has a card."""
    base = folder / "secret place" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    cfg = Config(name="try `it`", run_dir=str(folder / "run"))
    cfg.model.policy, cfg.model.reward, cfg.reward.model_weight = str(base), None, 0.0
    cfg.data.pairs_path = str(folder / "secret place" / "pairs.parquet")
    cfg.rollout.prompts_per_step, cfg.controller.steps = 8, 4
    cfg.cluster.address, cfg.digits.cache_dir = "10.0.0.1:6379", str(folder)
    exported = folder / "run" / "policy"
    exported.mkdir(parents=True)
    return cfg, exported


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_card_settings_and_results(tmp_path: Path) -> None:
    cfg, exported = make(tmp_path)
    (exported / "preprocessor_config.json").write_text("{}")
    writer = SampleFiles(cfg)
    writer.evaluation(0, BEFORE)
    writer.evaluation(2, BEFORE)
    writer.evaluation(4, AFTER)
    summary = write_summary(tmp_path / "run" / "summary.json", HISTORY, config=cfg)
    write_model_card(exported, tmp_path / "run", cfg, summary)
    front, text = card_of(exported)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "mit",
        "tags": ["skyrl", "reinforcement-learning", "grpo", "mpo"],
    }
    # By hand: 1 of the 4 that were scored is right, 3 of 4 afterwards; of those that can be checked 2 of 3 and 0 of 3
    # made a false claim. Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    z2, p, n = 1.959964**2, 0.25, 4
    middle, half = (p + z2 / 2 / n) / (1 + z2 / n), (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5 / (1 + z2 / n)
    low, high = 100 * (middle - half), 100 * (middle + half)
    assert f"| accuracy | 25.0 % ({low:.1f} to {high:.1f}, 4 answers) | 75.0 % (" in text
    assert (
        "| answers with a false claim about the picture | 66.7 % (" in text
        and "| 0.0 % (0.0 to 56.1, 3 answers) |" in text
    )
    assert "| accuracy, `a b` | 25.0 % | – |" in text  # a name from the data is no markup
    assert "# try `it`" in text and "Trained from `base`" in text and "4 steps of 8 prompts" in text
    everything = "".join(path.read_text() for path in exported.iterdir())
    assert "secret place" not in everything and str(tmp_path) not in everything and "10.0.0.1" not in everything
    settings = json.loads((exported / "skyrl_settings.json").read_text())
    assert settings["model"]["policy"] == "base" and settings["data"]["pairs_path"] == "pairs.parquet"
    assert settings["learner"] == jsonable(cfg.learner) and not {"cluster", "run_dir", "monitoring"} & settings.keys()
    results = json.loads((exported / "skyrl_results.json").read_text())
    assert results["accuracy_after"] == 0.75 and results["intervals_95"]["after"]["hallucination"]["answers"] == 3
    assert "config" not in results and "platform" not in results


def test_without_samples_there_are_figures_without_intervals(tmp_path: Path) -> None:
    cfg, exported = make(tmp_path)
    summary = write_summary(tmp_path / "run" / "summary.json", HISTORY[:1], config=cfg)
    write_model_card(exported, tmp_path / "run", cfg, summary)
    front, text = card_of(exported)
    assert front["pipeline_tag"] == "text-generation"
    assert "| accuracy | 25.0 % | – |" in text and "| 50.0 % | – |" in text


def test_an_old_evaluation_is_not_what_came_out(tmp_path: Path) -> None:
    cfg, exported = make(tmp_path)
    writer = SampleFiles(cfg)
    writer.evaluation(0, BEFORE)
    writer.evaluation(2, AFTER)
    summary = write_summary(tmp_path / "run" / "summary.json", HISTORY, config=cfg)  # 4 steps
    write_model_card(exported, tmp_path / "run", cfg, summary)
    assert "answers) | 75.0 % |" in card_of(exported)[1]


def test_the_command_repeats_the_settings(tmp_path: Path) -> None:
    """What the card tells to type gives the same settings, but for those that are of the machine."""
    cfg, exported = make(tmp_path)
    cfg.model.policy, cfg.data.pairs_path, cfg.name = "digits", None, "a 'b' \"c\" [d]"
    cfg.model.reward, cfg.reward.model_weight = "digits", 0.5
    cfg.digits.kinds, cfg.algorithm.grpo.clip_high = ["max", "sum"], 0.5
    cfg.reward.verifiers = {"own": "package.module:function"}
    cfg.hallucination.phrases = [r'\bno\b "it" \$', "ä, ö"]
    summary = write_summary(tmp_path / "run" / "summary.json", HISTORY, config=cfg)
    write_model_card(exported, tmp_path / "run", cfg, summary)
    block = card_of(exported)[1].split("```bash\n")[1].split("```")[0]
    words = shlex.split(block.replace("\\\n", " "))  # as a shell joins lines
    assert words[:3] == ["python", "-m", "skyrl.launch"]
    again = compose_config(words[3:])
    assert portable(jsonable(again)) == portable(jsonable(cfg))


@pytest.mark.parametrize(
    "text", ["a b", 'x"y', r"C:\d", r"a\"b", "off", "true", "12", "${x}", "[a", "ä", "", "a,b", "e\\"]
)
def test_any_text_as_a_word_of_the_command_line(text: str) -> None:
    (word,) = shlex.split(_override("monitoring.wandb_project", text))
    assert compose_config([word]).monitoring.wandb_project == text


def test_secrets_and_paths_stay_here() -> None:
    tree = {
        "judge": {"api_key": "sk-1", "endpoint": "https://me:pw@host/v1", "max_new_tokens": 5, "token": None},
        "paths": ["/home/me/a.parquet", "~/b", "../c/d", "e/f"],
        "learner": {"backend": "mine.module:Backend"},
        "cluster": {"address": "10.0.0.1"},
        "controller": {"timeout": 3, "steps": 4},
    }
    assert portable(tree) == {
        "judge": {"api_key": "(left out)", "endpoint": "https://host/v1", "max_new_tokens": 5, "token": None},
        "paths": ["a.parquet", "b", "d", "e/f"],
        "learner": {"backend": "mine.module:Backend"},
        "controller": {"steps": 4},
    }


def test_base_models() -> None:
    assert base_model("digits") is None
    assert base_model("/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-3B/snapshots/0a1b") == "Qwen/Qwen2.5-VL-3B"
    assert base_model("/data/my-model") == "my-model" and base_model("org/name") == "org/name"


def test_a_run_hands_on_a_folder_that_loads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cfg = config(tmp_path / "run", steps=1)
    cfg.model.policy, cfg.checkpoint.export = policy_folder(tmp_path_factory.getbasetemp() / "tiny"), True
    summary = run(cfg, LocalExecutor())
    exported = tmp_path / "run" / "policy"
    front, text = card_of(exported)
    assert front["pipeline_tag"] == "image-text-to-text" and "model.policy=policy" in text
    before, after = (measured(tmp_path / "run" / "samples" / f"eval_{step:06d}.parquet") for step in (0, 1))
    assert before["accuracy"].of == after["accuracy"].of == 4  # data.eval_size; not those that were asked blind
    assert (before["accuracy"].share, after["accuracy"].share) == (
        summary["accuracy_before"],
        summary["accuracy_after"],
    )
    assert after["hallucination"].share == summary["hallucination_after"]
    model, encoder = load_policy(str(exported), "float32"), PromptEncoder.from_pretrained(str(exported))
    assert model.get_output_embeddings() is not None and encoder.stop_token_ids


def test_measured_leaves_out_what_was_asked_blind_or_not_scored(tmp_path: Path) -> None:
    cfg = Config(run_dir=str(tmp_path))
    SampleFiles(cfg).evaluation(3, [group("0", None, None), group("1", 1.0, 1, "blind")])
    assert measured(tmp_path / "samples" / "eval_000003.parquet") == {}
