"""What lies beside an exported policy: a model card for the Hugging Face hub, and the settings and results as JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from skyrl.monitoring.console import duration
from skyrl.monitoring.records import jsonable, write_json, write_text_atomically
from skyrl.monitoring.samples import EVAL, FOLDER, sample_files
from skyrl.redaction import HIDDEN, SETTING
from skyrl.settings import Config
from skyrl.settings.system import paths_of

CARD, SETTINGS, RESULTS = "README.md", "skyrl_settings.json", "skyrl_results.json"
OF_THE_MACHINE = (
    "run_dir",
    "resume",
    "cluster",
    "filter",
    "evaluate",
    "monitoring",
    "digits.cache_dir",
    "controller.timeout",
)
"""Settings, or groups, that say nothing of how the policy came about: not handed on."""
SAID = ("rollout.num_workers", "reward.num_workers")
"""The command says these in any case: ``conf/model/digits.yaml`` gives them other values than the settings do."""


@dataclass(slots=True, frozen=True)
class Measured:
    """A share of an evaluation's answers, with the limits of its 95 % interval (Wilson's)."""

    count: int
    of: int
    low: float
    high: float

    @classmethod
    def at(cls, count: int, of: int) -> Measured | None:
        """None of nothing."""
        from scipy.stats import binomtest

        if of == 0:
            return None
        interval = binomtest(count, of).proportion_ci(method="wilson")
        return cls(count, of, float(interval.low), float(interval.high))

    @property
    def share(self) -> float:
        return self.count / self.of


def write_model_card(folder: Path, run_dir: Path, cfg: Config, summary: Mapping[str, Any]) -> None:
    """Write :data:`CARD`, :data:`SETTINGS` and :data:`RESULTS` into the folder of an exported policy. Absolute paths
    are cut to their last part, and secrets left out.

    Args:
        run_dir: Whose kept samples give the intervals; without them the card has the plain figures.
        summary: What :func:`skyrl.monitoring.summary.write_summary` returned.
    """
    settings = portable(jsonable(cfg))
    usual = _flat(portable(jsonable(Config())))
    changed = {key: value for key, value in _flat(settings).items() if key in SAID or value != usual.get(key)}
    evaluations = sample_files(run_dir / FOLDER, EVAL)
    before = measured(evaluations[0][1]) if evaluations and evaluations[0][0] == 0 else {}
    after = measured(evaluations[-1][1]) if len(evaluations) > 1 and evaluations[-1][0] == summary["steps"] else {}
    data = [*paths_of(cfg.data.train_path), cfg.data.pool_path, cfg.data.pairs_path]
    base = base_model(cfg.model.policy)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if takes_pictures(folder) else "text-generation",
        "base_model": base if base and "/" in base else None,
        "license": _front_matter(Path(cfg.model.policy) / CARD).get("license"),
        "tags": ["skyrl", "reinforcement-learning", "grpo", *(["mpo"] if cfg.algorithm.mpo.weight > 0 else [])],
    }
    plain = Environment(
        loader=PackageLoader("skyrl.monitoring", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # Markdown: what comes from data passes through `code`
    plain.filters |= {"code": _code, "duration": duration}
    card = plain.get_template("model_card.jinja").render(
        front=yaml.safe_dump({key: value for key, value in front.items() if value is not None}, sort_keys=False),
        name=cfg.name,
        base=base,
        cfg=cfg,
        data=[Path(path).name for path in data if path],
        command=" \\\n    ".join(
            ["python -m skyrl.launch", *(_override(key, value) for key, value in changed.items())]
        ),
        summary=summary,
        kinds=sorted({*summary["accuracy_by_kind_before"], *summary["accuracy_by_kind_after"]}),
        before=before,
        after=after,
        versions=summary["versions"],
    )
    write_text_atomically(folder / CARD, card)
    write_json(folder / SETTINGS, settings)
    kept = {key: value for key, value in summary.items() if key not in ("config", "platform")}
    sides = {"before": before, "after": after}
    intervals = {
        side: {name: {"share": m.share, "low": m.low, "high": m.high, "answers": m.of} for name, m in found.items()}
        for side, found in sides.items()
    }
    write_json(folder / RESULTS, kept | {"intervals_95": intervals})


def measured(file: Path) -> dict[str, Measured]:
    """``accuracy`` of the scored answers of an evaluation, ``hallucination`` of those whose claims can be checked, both
    as the metrics have them; what has no answers is left out."""
    table = pq.read_table(file, columns=["variant", "rule", "error", "false_claims"])
    table = table.filter(pc.equal(table["variant"], ""))
    rules = [
        rule for rule, error in zip(*(table[n].to_pylist() for n in ("rule", "error")), strict=True) if error is None
    ]
    claims = table["false_claims"].drop_null().to_pylist()
    found = {
        "accuracy": Measured.at(sum(rule >= 1 for rule in rules if rule is not None), len(rules)),
        "hallucination": Measured.at(sum(count > 0 for count in claims), len(claims)),
    }
    return {name: one for name, one in found.items() if one is not None}


def portable(settings: Any, key: str = "") -> Any:
    """Settings as they can be handed on: without :data:`OF_THE_MACHINE`, secrets and the folders of paths."""
    if isinstance(settings, Mapping):
        keys = {name: f"{key}.{name}".removeprefix(".") for name in settings}
        return {n: portable(value, keys[n]) for n, value in settings.items() if keys[n] not in OF_THE_MACHINE}
    if isinstance(settings, list):
        return [portable(value, key) for value in settings]
    if not isinstance(settings, str):
        return settings
    if SETTING.search(key):
        return HIDDEN
    if settings.startswith(("/", "~", "./", "../")):
        return Path(settings).name
    return re.sub(r"//[^/@\s]+@", "//", settings)


def base_model(policy: str) -> str | None:
    """``organisation/name`` if the folder lies in a cache of the Hugging Face hub, or if it is such a name; else the
    name of the folder. None for an embedded model."""
    if policy == "digits":
        return None
    cached = [part for part in Path(policy).parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    return Path(policy).name if Path(policy).is_dir() or policy.startswith(("/", "~", ".")) else policy


def takes_pictures(folder: Path) -> bool:
    """True if the folder has a processor of pictures."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    file = folder / "processor_config.json"
    return file.is_file() and '"image_processor' in file.read_text(encoding="utf-8")


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if there is none that can be read."""
    if not card.is_file():
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _override(key: str, value: Any) -> str:
    """A setting as a word of the command line."""
    return shlex.quote(f"{key}={_hydra(value)}")


def _hydra(value: Any) -> str:
    """A value in the grammar of the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra(key)}:{_hydra(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_][\w./+-]*", value, re.ASCII) and value.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    ):
        return value
    # Backslashes count before a quote only; a dollar would begin an interpolation.
    return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value).replace("${", r"\${") + '"'


def _code(text: Any) -> str:
    """Text from elsewhere as a code span in a table cell: no mark of it acts."""
    return "`" + re.sub(r"[`|\r\n]+", " ", str(text)).strip() + "`"
