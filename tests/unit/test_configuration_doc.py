"""docs/configuration.md says what config.py and the validation say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", DOCS / "generate_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_document_agrees_with_the_code(generator: ModuleType) -> None:
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == generator.markdown(), (
        "run: python docs/generate_configuration.py > docs/configuration.md"
    )


@pytest.mark.parametrize(
    ("key", "kind", "text"),
    [
        ("rollout.num_workers", "int", "1 or more"),
        ("rollout.samples_per_prompt", "int", "2 or more"),
        ("learner.zero_stage", "int", "0, 1, 2 or 3"),
        ("buffer.mix", "float", "in 0 … 1"),
        ("model.dtype", "str", "one of float32, bfloat16, float16"),
        ("name", "str", "a name that isn't empty"),
        ("data.kinds", "list[str]", "one or more of sum, max, min, count, row_difference"),
        ("monitoring.wandb_project", "str", ""),
    ],
)
def test_limits_come_from_the_validation(generator: ModuleType, key: str, kind: str, text: str) -> None:
    assert generator.limit(key, kind) == text


def test_every_row_of_the_tables_has_five_cells(generator: ModuleType) -> None:
    for line in generator.markdown().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 6, line
