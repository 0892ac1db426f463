"""What the built wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import skyrl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "-o", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    assert file.name == f"skyrl_r1v2-{skyrl.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def files(folder: Path, *endings: str) -> set[str]:
    found = (path for path in folder.rglob("*") if path.suffix in endings and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_every_module_and_settings_file_is_in(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"skyrl/{name}" for name in files(ROOT / "src" / "skyrl", ".py", ".css", ".js", ".jinja")} <= names
    settings = {f"skyrl/conf/{name}" for name in files(ROOT / "conf", ".yaml")}
    assert "skyrl/conf/config.yaml" in settings and settings <= names
    assert wheel.read("skyrl/conf/config.yaml") == (ROOT / "conf" / "config.yaml").read_bytes()


def test_nothing_else_is_in(wheel: zipfile.ZipFile) -> None:
    info = f"skyrl_r1v2-{skyrl.__version__}.dist-info/"
    assert not [name for name in wheel.namelist() if not name.startswith(("skyrl/", info)) or "__pycache__" in name]


def test_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"skyrl_r1v2-{skyrl.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Name: skyrl-r1v2\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "skyrl = skyrl.launch:main" in wheel.read(f"{info}/entry_points.txt").decode()
