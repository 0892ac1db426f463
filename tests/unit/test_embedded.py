"""The cache of the embedded models: what makes another key, and what is never mistaken for a finished build."""

from __future__ import annotations

import ast
import json
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import skyrl
from skyrl.digits import embedded, scenes, training
from skyrl.digits.embedded import CODE, DONE, cache_folder, embedded_models, recipe
from skyrl.digits.scenes import held_out_sum
from skyrl.digits.settings import DigitsConfig
from skyrl.policy.encode import PromptEncoder
from skyrl.records import Prompt
from skyrl.settings import Config

ROOT = Path(skyrl.__file__).parent
SOURCE = '''"""What it does."""

import cmath
import math

TWO: int = 2
POWER = TWO
LEFT, RIGHT = 1, 5
OTHER = 3


def area(radius: float) -> float:
    """Of a circle."""
    # Archimedes knew it.
    return math.pi * radius**POWER * LEFT


def other() -> int:
    return OTHER


class Square:
    """Equal sides."""

    SIDE = OTHER

    def area(self, side: float) -> float:
        """Of a square."""
        return side * side

    def edge(self) -> complex:
        return cmath.sqrt(self.SIDE)
'''


def digest(old: str = "", new: str = "", names: tuple[str, ...] = ("area", "Square.area")) -> str:
    assert not old or SOURCE.count(old) == 1
    return embedded._code_digest(SOURCE.replace(old, new), names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""What it does."""', '"""Something else."""'),
        ('"""What it does."""\n', ""),
        ('    """Of a circle."""\n', ""),
        ('        """Of a square."""', "        ..."),
        ("    # Archimedes knew it.\n", ""),
        ("    return math", "    # Of a whole circle.\n\n    return math"),
        ("math.pi * radius**POWER", "(\n        math.pi *   radius ** POWER  # layout\n    )"),
        # what the two functions don't name
        ("import cmath\n", "import os\n"),
        ("OTHER = 3", "OTHER = 4"),
        ("def other() -> int", "def another() -> int"),
        ("    return OTHER", "    return 2 * OTHER"),
        ("cmath.sqrt", "abs"),
        ("class Square:", "THIRD = 3\n\n\nclass Square:"),
    ],
)
def test_comments_layout_and_what_does_not_run_are_not_in_the_key(old: str, new: str) -> None:
    assert digest(old, new) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**POWER", "radius**-POWER"),
        ("math.pi * radius", "radius * math.pi"),
        ("(radius: float)", "(radius: float = 1.0)"),
        ("import math", "import cmath as math"),
        ("return math", "math"),
        ("POWER = TWO", "POWER = -TWO"),
        ("TWO: int = 2", "TWO: int = 3"),  # named by what is named
        ("LEFT, RIGHT = 1, 5", "LEFT, RIGHT = 2, 5"),
        ("side * side", "side + side"),
    ],
)
def test_code_that_runs_is_in_the_key(old: str, new: str) -> None:
    assert digest(old, new) != digest()


def test_a_name_that_is_gone_is_an_error_and_a_constant_may_be_named() -> None:
    with pytest.raises(KeyError, match=r"Square\.volume"):
        digest(names=("Square.volume",))
    assert digest("OTHER = 3", "OTHER = 4", ("OTHER",)) != digest(names=("OTHER",))


def test_the_code_of_every_file_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Any = recipe(DigitsConfig())
    assert set(whole["code"]) == set(CODE) and len(set(whole["code"].values())) == len(CODE)
    for changed in CODE:
        monkeypatch.setattr(embedded, "CODE", CODE | {changed: CODE[changed].rpartition(" ")[0]})
        assert recipe(DigitsConfig()) != whole


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, set[str]], list[Prompt]]:
    """File → functions of it that ran during a very small build; and the prompts that were encoded meanwhile."""
    ran: dict[str, set[str]] = {}
    prompts: list[Prompt] = []

    def look(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and code.co_name != "<module>":
            name = code.co_qualname.split(".<locals>")[0]  # 3.11 has comprehensions as functions of their own
            ran.setdefault(Path(code.co_filename).relative_to(ROOT).as_posix(), set()).add(name)
            if code is PromptEncoder.encode.__code__:
                prompts.append(frame.f_locals["prompt"])

    scenes.digit_pool.cache_clear()
    for file in CODE:  # classes of a module that is imported meanwhile would look like functions
        import_module("skyrl." + file.removesuffix(".py").replace("/", "."))
    cfg = DigitsConfig(warm_start_steps=2, reward_body_steps=1, reward_steps=1)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(training, "BATCH", 16)
        small.setattr(training, "PAIRS_PER_STEP", 4)
        threads = torch.get_num_threads()
        sys.setprofile(look)
        try:
            embedded._build(cfg, tmp_path_factory.mktemp("build"), lambda *_: None)
        finally:
            sys.setprofile(None)
            torch.set_num_threads(threads)
    return ran, prompts


def test_the_key_names_exactly_the_functions_that_run_while_the_models_are_built(
    traced: tuple[dict[str, set[str]], list[Prompt]],
) -> None:
    ran, listed = traced[0], {file: set(names.split()) for file, names in CODE.items()}
    constants = _imported_constants()
    for file in sorted(ran.keys() | listed.keys()):
        wanted = ran.get(file, set()) | constants.get(file, set())
        assert listed.get(file, set()) == wanted, f"CODE of {file} must be: {' '.join(sorted(wanted))}"


def _imported_constants() -> dict[str, set[str]]:
    """File → its constants that other listed files import."""
    found: dict[str, set[str]] = {}
    for file in CODE:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skyrl."):
                owner = import_module(str(node.module))
                names = {alias.name for alias in node.names if not callable(getattr(owner, alias.name))}
                path = Path(str(owner.__file__)).relative_to(ROOT).as_posix()
                if names:
                    found.setdefault(path, set()).update(names)
    return found


def test_models_see_no_scene_and_no_question_of_the_evaluation(
    traced: tuple[dict[str, set[str]], list[Prompt]],
) -> None:
    splits = {prompt.id.split("/")[0] for prompt in traced[1]}
    assert splits == {"train", "reward"}
    sums = [p.question.split("?")[0].removeprefix("What is ") for p in traced[1] if not p.images]
    assert sums and not any(held_out_sum([int(number) for number in text.split("+")]) for text in sums)


# ---------------------------------------------------------------- building


class Builds:
    """Stands in for the build: writes two small files and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.fail = False

    def __call__(self, cfg: DigitsConfig, folder: Path, show: Any) -> None:
        self.count += 1
        for name in ("policy", "reward"):
            (folder / name).mkdir()
            (folder / name / "weights").write_text(f"{cfg.model_seed} of build {self.count}")
            if self.fail:
                raise RuntimeError("no space left")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds()
    monkeypatch.setattr(embedded, "_build", made)
    return made


def config(tmp_path: Path, **settings: Any) -> Config:
    return Config(digits=DigitsConfig(cache_dir=str(tmp_path), **settings))


def test_the_second_call_finds_what_the_first_one_built(tmp_path: Path, builds: Builds) -> None:
    policy, reward = embedded_models(config(tmp_path))
    assert (policy.name, reward.name) == ("policy", "reward")
    assert policy.parent == reward.parent
    assert json.loads((policy.parent / DONE).read_text()) == recipe(config(tmp_path).digits)
    assert embedded_models(config(tmp_path)) == (policy, reward)
    assert builds.count == 1
    assert (policy / "weights").read_text() == "0 of build 1"
    assert [p.name for p in tmp_path.iterdir()] == [policy.parent.name]  # no temporary folder is left


@pytest.mark.parametrize("name", ["warm_start_steps", "reward_body_steps", "reward_steps", "model_seed"])
def test_another_setting_makes_other_models(tmp_path: Path, builds: Builds, name: str) -> None:
    cfg = config(tmp_path)
    changed = config(tmp_path, **{name: getattr(cfg.digits, name) + 1})
    assert embedded_models(cfg)[0] != embedded_models(changed)[0]
    assert builds.count == 2


def test_settings_that_do_not_shape_the_models_share_them(tmp_path: Path, builds: Builds) -> None:
    first = embedded_models(config(tmp_path))
    assert embedded_models(config(tmp_path, train_size=7, text_share=0.5, kinds=["max"])) == first
    assert builds.count == 1


def test_other_code_makes_other_models(tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded_models(config(tmp_path))
    monkeypatch.setattr(embedded, "_code_digest", lambda source, names: f"changed {len(source)}")
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
    def overtaken(cfg: DigitsConfig, folder: Path, show: Any) -> None:
        builds(cfg, folder, show)
        monkeypatch.setattr(embedded, "_build", builds)
        embedded_models(Config(digits=cfg))  # another process begins and ends meanwhile

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
    assert cache_folder(DigitsConfig(cache_dir=str(tmp_path / "set"))) == tmp_path / "set"
    assert cache_folder(DigitsConfig(cache_dir="~/set")) == tmp_path / "home" / "set"
    assert cache_folder(DigitsConfig()) == tmp_path / "home" / "from_environment"
    monkeypatch.setenv("SKYRL_CACHE", "")
    assert cache_folder(DigitsConfig()) == tmp_path / "home" / ".cache" / "skyrl"
    monkeypatch.delenv("SKYRL_CACHE")
    assert cache_folder(DigitsConfig()) == tmp_path / "home" / ".cache" / "skyrl"
