"""docs/configuration.md says what the fields of the settings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from skyrl.settings import all_settings

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
    "line",
    [
        "| `rollout.num_workers` | a whole number, 1 or more | `1` | Workers, each in a Ray actor of its own. ",
        "| `algorithm.mpo.threshold.kind` | one of off, fixed, quantile, risk_controlled | `risk_controlled` | ",
        "| `algorithm.gate.kind` | one of off, fixed, quantile, risk_controlled | `off` | How the threshold τ on ",
        "|  | `k2` |  | d² / 2. |",
        '| `run_dir` | text | `""` | Folder of everything that a run writes; set by `conf/config.yaml`. ',
        "| `learner.betas` | a list of 2, each a number, 0 or more and below 1 | `[0.9, 0.99]` | Decay rates of ",
    ],
)
def test_rows_hold_key_limits_default_and_text(generator: ModuleType, line: str) -> None:
    assert sum(row.startswith(line) for row in generator.markdown().splitlines()) == 1


def test_each_setting_has_a_row_in_the_section_of_its_group(generator: ModuleType) -> None:
    group, rows = "", []
    for line in generator.markdown().splitlines():
        group = line[3:] if line.startswith("## ") else group
        if line.startswith("| `"):
            rows.append(line.split("`")[1])
            assert (rows[-1].rpartition(".")[0] or "Top level") == group
    assert rows == list(all_settings())


def test_every_row_of_the_tables_has_four_cells(generator: ModuleType) -> None:
    for line in generator.markdown().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line
