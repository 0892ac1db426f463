"""The samples of a run, as Parquet files in its folder: ``samples/step_000012.parquet`` has those that a step drew or
replayed, ``samples/eval_000010.parquet`` those of the evaluation after step 10. One row a sample, without pictures:
``python -m skyrl.show`` reads those from the data set, by the prompt's id.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skyrl.monitoring.records import unwritable
from skyrl.records import Prompt, Sample, SampleGroup, TrainItem
from skyrl.settings import Config, KeptSamples

logger = logging.getLogger(__name__)
FOLDER = "samples"
STEP, EVAL = "step", "eval"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("split", pa.string()),  # train or eval
        ("id", pa.string()),  # the prompt's
        ("kind", pa.string()),
        ("variant", pa.string()),  # "blind": asked without its pictures
        ("index", pa.int32()),  # place in its group
        ("origin", pa.string()),  # fresh or replayed
        ("version", pa.int32()),  # of the policy that drew it
        ("age", pa.int32()),  # versions that the learner was ahead of it
        ("question", pa.string()),
        ("truth", pa.string()),
        ("verifier", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),  # what the verifiers saw of it; null where nothing was found
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("rule", pa.float64()),
        ("rules", pa.string()),  # JSON: each verifier's score by its name
        ("format", pa.float64()),
        ("model", pa.float64()),
        ("total", pa.float64()),
        ("advantage", pa.float64()),
        ("rule_advantage", pa.float64()),
        ("claims", pa.int32()),  # null where nothing can be checked
        ("false_claims", pa.int32()),
        ("error", pa.string()),
    ]
)
"""Parts of the reward are null for a sample that could not be scored."""
_REPEATED = [field.name for field in SCHEMA if pa.types.is_string(field.type) and field.name not in ("text", "error")]


def sample_row(
    prompt: Prompt, sample: Sample, step: int, split: str, checkable: bool, age: int = 0, replayed: bool = False
) -> dict[str, Any]:
    """The row of one sample; nothing in it changes when the sample is changed later."""
    reward, checks = sample.reward, prompt.all_checks
    row = {
        "step": step,
        "split": split,
        "id": prompt.id,
        "kind": prompt.kind,
        "variant": prompt.variant,
        "index": sample.index,
        "origin": "replayed" if replayed else "fresh",
        "version": sample.policy_version,
        "age": age,
        "question": prompt.question,
        "truth": "\n".join(check.truth for check in checks),
        "verifier": ", ".join(check.verifier for check in checks),
        "text": sample.text,
        "answer": sample.answer,
        "tokens": len(sample.token_ids),
        "truncated": sample.truncated,
        "advantage": sample.advantage,
        "rule_advantage": sample.rule_advantage,
        "claims": sample.claims if checkable else None,
        "false_claims": sample.false_claims if checkable else None,
        "error": sample.error,
    }
    if reward is not None:
        row |= {name: getattr(reward, name) for name in ("rule", "format", "model", "total")}
        row["rules"] = json.dumps(dict(reward.rules))
    return {name: _writable(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _writable(text: str) -> str:
    """Without the lone halves of surrogate pairs, which UTF-8 has not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class SampleFiles:
    """Keeps samples as ``monitoring.samples`` says. Files appear when they are complete; a step that a resumed run does
    again replaces its file, and those of later steps, which will come again, go.

    Args:
        cfg: With the run's folder; without one nothing is kept.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.folder = cfg.monitoring, Path(cfg.run_dir) / FOLDER
        self.off = self.cfg.samples is KeptSamples.off or not cfg.run_dir
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._unkept, self._news = False, list[str]()

    def step(self, step: int, version: int, groups: Iterable[SampleGroup], replayed: Iterable[TrainItem]) -> None:
        """Write the samples of a training step, beside what the process does next: one step's at a time.

        Args:
            version: Weight updates that the learner has received.
        """
        if self.off:
            return
        drawn = [(group.prompt, sample, group.checkable, False) for group in groups for sample in group.samples]
        # A group's mark is not kept with its samples; facts mostly have a checker.
        old = [(item.prompt, item.sample) for item in replayed]
        drawn += [(prompt, sample, bool(prompt.images and prompt.facts), True) for prompt, sample in old]
        rows = [sample_row(p, s, step, "train", ok, version - s.policy_version, again) for p, s, ok, again in drawn]
        self.wait()
        self._writer = self._writer or ThreadPoolExecutor(1, "samples")
        self._writing = self._writer.submit(self._write, STEP, step, rows)

    def evaluation(self, step: int, groups: Iterable[SampleGroup]) -> None:
        """Write the samples of an evaluation."""
        if not self.off:
            rows = [sample_row(g.prompt, sample, step, "eval", g.checkable) for g in groups for sample in g.samples]
            self._write(EVAL, step, rows)

    def news(self) -> tuple[str, ...]:
        """What the user should read, once: that samples can't be written. The run goes on without them."""
        news, self._news = tuple(self._news), []
        return news

    def wait(self) -> None:
        """Until all is written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        path = self.folder / f"{name}_{step:06d}.parquet"
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                table = pa.Table.from_pylist(rows, SCHEMA)
                pq.write_table(table, part, compression="zstd", use_dictionary=_REPEATED)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            self._tidy(step)
            self._unkept = False
        except OSError as error:
            if not self._unkept:
                self._news.append(f"samples from step {step} on are not kept: {unwritable(path, error)}")
                logger.warning(self._news[-1])
            self._unkept = True

    def _tidy(self, step: int) -> None:
        """Remove what is later than ``step``, of a run that was resumed before it, and what is too old to be kept."""
        for name in (STEP, EVAL):
            files = sample_files(self.folder, name)
            old = files[: -self.cfg.samples_kept] if self.cfg.samples is KeptSamples.last else []
            for number, path in files:
                stays = name == EVAL and number == 0  # what the policy was like before training
                if number > step or ((number, path) in old and not stays):
                    path.unlink(missing_ok=True)


def sample_files(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Step and file of the kept samples, in order. ``name``: :data:`STEP` or :data:`EVAL`."""
    found = [(path.stem.removeprefix(f"{name}_"), path) for path in folder.glob(f"{name}_*.parquet")]
    return sorted((int(number), path) for number, path in found if number.isdigit())
