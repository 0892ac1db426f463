"""The cache of the embedded models: what makes another key, and what is never mistaken for a finished build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skyrl.digits import embedded
from skyrl.digits.embedded import DONE, RECIPE_FILES, cache_folder, embedded_models, recipe
from skyrl.settings import ModelConfig

SOURCE = '''"""What it does."""

import math


def area(radius: float) -> float:
    """Of a circle."""
    # Archimedes knew it.
    return math.pi * radius**2


class Empty:
    """Nothing."""
'''


def digest(folder: Path, text: str) -> str:
    path = folder / "module.py"
    path.write_text(text)
    return embedded._code_digest(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""What it does."""', '"""Something else."""'),
        ('"""What it does."""\n', ""),
        ('    """Of a circle."""\n', ""),
        ("    # Archimedes knew it.\n", ""),
        ("    return", "    # Of a whole circle.\n\n    return"),
        ("math.pi * radius**2", "(\n        math.pi *   radius ** 2  # layout\n    )"),
        ('    """Nothing."""', "    ..."),
    ],
)
def test_comments_docstrings_and_layout_are_not_in_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert digest(tmp_path, SOURCE.replace(old, new)) == digest(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("math.pi * radius", "radius * math.pi"),
        ("(radius: float)", "(radius: float = 1.0)"),
        ("import math", "import cmath as math"),
        ("class Empty", "class Void"),
        ("return math", "math"),
    ],
)
def test_code_is_in_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert digest(tmp_path, SOURCE.replace(old, new)) != digest(tmp_path, SOURCE)


def test_every_recipe_file_exists_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe(ModelConfig())
    sources: Any = whole["sources"]
    assert set(sources) == set(RECIPE_FILES)
    assert len(set(sources.values())) == len(RECIPE_FILES)
    for changed in RECIPE_FILES:
        monkeypatch.setattr(
            embedded, "_code_digest", lambda path, c=changed: "new" if str(path).endswith(c) else sources[_name(path)]
        )
        assert recipe(ModelConfig()) != whole


def _name(path: Path) -> str:
    return "/".join(path.parts[-2:])


# ---------------------------------------------------------------- building


class Builds:
    """Stands in for the build: writes two small files and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.fail = False

    def __call__(self, cfg: ModelConfig, folder: Path) -> None:
        self.count += 1
        for name in ("policy", "reward"):
            (folder / name).mkdir()
            (folder / name / "weights").write_text(f"{cfg.seed} of build {self.count}")
            if self.fail:
                raise RuntimeError("no space left")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds()
    monkeypatch.setattr(embedded, "_build", made)
    return made


def config(tmp_path: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(cache_dir=str(tmp_path), **settings)


def test_the_second_call_finds_what_the_first_one_built(tmp_path: Path, builds: Builds) -> None:
    policy, reward = embedded_models(config(tmp_path))
    assert (policy.name, reward.name) == ("policy", "reward")
    assert policy.parent == reward.parent
    assert json.loads((policy.parent / DONE).read_text()) == recipe(config(tmp_path))
    assert embedded_models(config(tmp_path)) == (policy, reward)
    assert builds.count == 1
    assert (policy / "weights").read_text() == "0 of build 1"
    assert [p.name for p in tmp_path.iterdir()] == [policy.parent.name]  # no temporary folder is left


@pytest.mark.parametrize("name", ["warm_start_steps", "reward_body_steps", "reward_steps", "seed"])
def test_another_setting_makes_other_models(tmp_path: Path, builds: Builds, name: str) -> None:
    cfg = config(tmp_path)
    changed = replace(cfg, **{name: getattr(cfg, name) + 1})
    assert embedded_models(cfg)[0] != embedded_models(changed)[0]
    assert builds.count == 2


def test_settings_that_do_not_shape_the_models_share_them(tmp_path: Path, builds: Builds) -> None:
    first = embedded_models(config(tmp_path))
    assert embedded_models(config(tmp_path, dtype="bfloat16", policy="elsewhere", reward=None)) == first
    assert builds.count == 1


def test_other_code_makes_other_models(tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded_models(config(tmp_path))
    monkeypatch.setattr(embedded, "_code_digest", lambda path: f"changed {path.name}")
    assert embedded_models(config(tmp_path)) != first
    assert builds.count == 2


def test_another_version_of_a_library_makes_other_models(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embedded_models(config(tmp_path))
    monkeypatch.setattr(embedded, "version", lambda name: "0" if name == "tokenizers" else "1")
    assert embedded_models(config(tmp_path)) != first


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path, builds: Builds) -> None:
    builds.fail = True
    with pytest.raises(RuntimeError, match="no space left"):
        embedded_models(config(tmp_path))
    assert list(tmp_path.iterdir()) == []
    builds.fail = False
    policy, _ = embedded_models(config(tmp_path))
    assert builds.count == 2
    assert (policy / "weights").is_file()


def test_what_a_killed_build_left_is_not_used(tmp_path: Path, builds: Builds) -> None:
    left = tmp_path / "building-killed" / "policy"
    left.mkdir(parents=True)
    (left / "weights").write_text("half")
    policy, _ = embedded_models(config(tmp_path))
    assert builds.count == 1
    assert (policy / "weights").read_text() == "0 of build 1"


def test_a_folder_without_its_recipe_is_built_anew(tmp_path: Path, builds: Builds) -> None:
    policy, _ = embedded_models(config(tmp_path))
    (policy.parent / DONE).unlink()  # a cleaner of old files took it
    assert embedded_models(config(tmp_path))[0] == policy
    assert builds.count == 2
    assert (policy / "weights").read_text() == "0 of build 2"
    assert (policy.parent / DONE).is_file()


def test_when_two_processes_build_at_once_the_first_to_finish_wins(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(cfg: ModelConfig, folder: Path) -> None:
        builds(cfg, folder)
        monkeypatch.setattr(embedded, "_build", builds)
        embedded_models(cfg)  # another process begins and ends meanwhile

    monkeypatch.setattr(embedded, "_build", overtaken)
    policy, _ = embedded_models(config(tmp_path))
    assert builds.count == 2
    assert (policy / "weights").read_text() == "0 of build 2"
    assert [p.name for p in tmp_path.iterdir()] == [policy.parent.name]


# ---------------------------------------------------------------- where


def test_the_setting_comes_before_the_environment_and_that_before_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SKYRL_CACHE", "~/from_environment")
    assert cache_folder(ModelConfig(cache_dir=str(tmp_path / "set"))) == tmp_path / "set"
    assert cache_folder(ModelConfig(cache_dir="~/set")) == tmp_path / "home" / "set"
    assert cache_folder(ModelConfig()) == tmp_path / "home" / "from_environment"
    monkeypatch.setenv("SKYRL_CACHE", "")
    assert cache_folder(ModelConfig()) == tmp_path / "home" / ".cache" / "skyrl"
    monkeypatch.delenv("SKYRL_CACHE")
    assert cache_folder(ModelConfig()) == tmp_path / "home" / ".cache" / "skyrl"
