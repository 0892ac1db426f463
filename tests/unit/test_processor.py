"""Processors without torchvision, with code of their own, and models by a name of the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from skyrl.policy import hub
from skyrl.policy.module import load_policy
from skyrl.policy.processor import load_processor
from skyrl.records import ConfigError
from skyrl.settings import Config

TESTS = Path(__file__).parents[1]
ALONE = """
import sys
sys.path.insert(0, {models!r})
from pathlib import Path
from zoo import ARCHITECTURES  # puts the stand-in where torchvision would be
from skyrl.policy.processor import load_processor
import numpy as np
folder = Path({folder!r})
ARCHITECTURES["Qwen2-VL"].build(folder)
made = load_processor(str(folder))
assert made.image_processor.__class__.__name__ == "Qwen2VLImageProcessorPil"
picture = np.zeros((32, 32, 3), dtype=np.uint8)
print(made(text="<|image_pad|>", images=[picture], return_tensors="pt")["pixel_values"].shape)
import torchvision.transforms.v2.functional as functional
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
try:
    functional.resize(picture)
except Exception as error:
    print(type(error).__name__, error)
"""


def alone(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_without_torchvision_pictures_go_through_pil_and_nothing_else_can_be_called(tmp_path: Path) -> None:
    said = alone(ALONE.format(models=str(TESTS / "models"), folder=str(tmp_path / "policy")))
    assert "torch.Size([16, 384])" in said
    assert "ConfigError model.policy: its picture processor calls torchvision.transforms.v2.functional.resize" in said


def test_a_torchvision_that_can_not_be_imported_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    said = alone(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from skyrl.policy.torchvision_stand_in import stand_in_for_torchvision\n"
        "try:\n    stand_in_for_torchvision()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    assert "ConfigError torchvision is installed, but can't be imported beside this torch: operator" in said


def own_code(folder: Path) -> str:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoProcessor": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "mine.Mine"}}))
    (folder / "mine.py").write_text("raise SystemError('this was run')")
    return str(folder)


def test_code_of_a_folder_is_not_run_unless_asked(tmp_path: Path) -> None:
    folder = own_code(tmp_path)
    for load in (load_processor, lambda path: load_policy(path, "float32")):
        with pytest.raises(ConfigError, match=r"Python code of its own.*model\.trust_remote_code=true"):
            load(folder)
    with pytest.raises(SystemError, match="this was run"):
        load_policy(folder, "float32", trust_remote_code=True)


def test_an_architecture_that_transformers_does_not_know_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(ConfigError, match=r"config\.json can't be read: ValueError: .*never-heard-of"):
        load_policy(str(tmp_path), "float32")


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="its processor can't be made"):
        load_processor(str(tmp_path))


def test_a_name_of_the_hub_is_downloaded_and_a_folder_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return "/cache/model"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.model_folder("owner/some-model", "model.policy") == "/cache/model"
    assert hub.model_folder(str(tmp_path), "model.policy") == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "some-model").mkdir(parents=True)
    assert hub.model_folder("owner/some-model", "model.policy") == "owner/some-model"
    assert asked == ["owner/some-model"]


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hf download owner/no-such-model --local-dir FOLDER; then model\.policy="):
        hub.model_folder("owner/no-such-model", "model.policy")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = Config.model_validate({"model": {"policy": "~/policy", "reward": "~/reward"}})
    assert (cfg.model.policy, cfg.model.reward) == (f"{tmp_path}/policy", f"{tmp_path}/reward")


ROLES = {
    "LearnerStep": "from learner_plain import joined, plain_settings; joined(plain_settings(), folder)",
    "Rewarder": (
        "from skyrl.rewards.rewarder import Rewarder; from skyrl.settings import Config; "
        "Rewarder(Config(), folder, None, 1)"
    ),
}


@pytest.mark.parametrize("role", sorted(ROLES))
def test_a_role_that_begins_in_a_process_of_its_own_finds_the_stand_in(role: str, tmp_path: Path) -> None:
    """transformers looks for torchvision once: whatever a role imports, the processor must be asked for first."""
    models, folder = str(TESTS / "models"), str(tmp_path / "model")
    path = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {models!r}]; folder = {folder!r}; "
    alone(path + "from pathlib import Path; import zoo; zoo.ARCHITECTURES['Qwen2.5-VL'].build(Path(folder))")
    alone(path + ROLES[role])
