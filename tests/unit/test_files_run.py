"""Whole runs on files of other systems: a mixture, pictures in place, long rows left out, resumed where it stopped."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tiny_models import processor, random_model
from tiny_runs import config

from skyrl import run as module
from skyrl.crew.local_executor import LocalExecutor
from skyrl.data.parquet import write_parquet
from skyrl.data.pictures import encode_png
from skyrl.digits.scenes import DigitScenes
from skyrl.monitoring.records import read_metrics
from skyrl.records import DataError
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, Overlong


def verl_rows(path: Path, size: int) -> None:
    """Scenes as verl writes them, every fifth too long."""
    scenes = DigitScenes("train", size, 0.0, seed=1)
    with path.open("w") as file:
        for row in range(size):
            scene, long = scenes[row], " and so on" * 100 if row % 5 == 0 else ""
            said = [
                {"role": "system", "content": "You see digits."},
                {"role": "user", "content": f"Look: <image> {scene.question}{long}"},
            ]
            picture = base64.b64encode(encode_png(scene.images[0], scene.id)).decode()
            truth = {"style": "rule", "ground_truth": scene.answer}
            cells = {"data_source": "my/scenes", "prompt": said, "images": [picture], "reward_model": truth}
            file.write(json.dumps(cells) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    random_model(scale=1.0).save_pretrained(made / "policy")
    processor().save_pretrained(made / "policy")
    verl_rows(made / "verl.jsonl", 20)
    for name, split, size in (("own", "train", 15), ("eval", "eval", 4)):
        scenes = DigitScenes(split, size, 0.3, seed=0)
        write_parquet(made / f"{name}.parquet", [scenes[row] for row in range(size)])
    return made


def settings(folder: Path, run_dir: Path, steps: int) -> Config:
    cfg = config(run_dir, steps)
    cfg.model.policy, cfg.data.source, cfg.reward.verifier = str(folder / "policy"), "files", "numeric"
    cfg.data.train_path = [str(folder / "verl.jsonl"), str(folder / "own.parquet")]
    cfg.data.eval_path, cfg.data.weights = str(folder / "eval.parquet"), [2.0, 1.0]
    cfg.data.overlong, cfg.rollout.max_prompt_tokens = Overlong.drop, 120
    return cfg


def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Step → ids of the training prompts that are sampled from now on."""
    found: dict[int, list[str]] = {}
    generate = Sampler.generate

    def watched(self: Sampler, request: object) -> object:
        groups = generate(self, request)  # type: ignore[arg-type]
        if request.split == "train":  # type: ignore[attr-defined]
            found.setdefault(request.step, []).extend(group.prompt.id for group in groups)  # type: ignore[attr-defined]
        return groups

    monkeypatch.setattr(Sampler, "generate", watched)
    return found


def test_a_mixture_of_layouts_trains_and_a_resumed_run_asks_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = asked(monkeypatch)
    module.run(settings(folder, tmp_path / "whole", 5), LocalExecutor())
    assert "data.overlong=drop: 4 of 35 train prompts are left out (over 120 tokens)" in capsys.readouterr().out
    whole = dict(watched)
    watched.clear()
    logged = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "data/left_out_train" in row]
    assert [(row["step"], row["data/left_out_train"], row["data/left_out_eval"]) for row in logged] == [(0, 4.0, 0.0)]
    assert sorted(whole) == [1, 2, 3, 4, 5]
    for ids in whole.values():
        assert len(set(ids)) == 6 and sum(one.startswith("verl/") for one in ids) == 4  # two of three
    verl = [one for ids in whole.values() for one in ids if one.startswith("verl/")]
    assert len(verl) == 20 and len(set(verl[:16])) == 16  # its own epoch of the sixteen rows that fit
    assert not {f"verl/{row}" for row in range(0, 20, 5)} & set(verl)

    part = settings(folder, tmp_path / "part", 3)
    module.run(part, LocalExecutor())
    watched.clear()
    module.run(
        part.model_copy(update={"resume": "auto", "controller": part.controller.model_copy(update={"steps": 5})}),
        LocalExecutor(),
    )
    assert watched == {step: whole[step] for step in (4, 5)}
    rows = [
        {row["step"]: row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "time/step" in row}
        for name in ("whole", "part")
    ]
    for step in (4, 5):
        kept = [
            {k: v for k, v in one[step].items() if "seconds" not in k and not k.startswith(("time/", "throughput/"))}
            for one in rows
        ]
        assert kept[0] == kept[1]


def test_long_rows_end_the_run_before_its_first_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(folder, tmp_path / "run", 2)
    cfg.data.overlong, cfg.data.eval_path = Overlong.error, str(folder / "own.parquet")
    with pytest.raises(
        DataError, match=r"(?s)4 of 35 train prompts can't be asked.*row 5: prompt 'verl/5' has \d+ tokens"
    ):
        module.run(cfg, LocalExecutor())
    assert "note: 4 of 4 evaluation prompts are also trained on ('train/0' of data.eval_path" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
