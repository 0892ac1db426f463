"""The page of a run's samples: what it chooses, marks and shows, and that nothing a model wrote acts in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from skyrl import show
from skyrl.checkpoint import SETTINGS
from skyrl.digits.scenes import DigitScenes
from skyrl.monitoring.records import write_json
from skyrl.monitoring.samples import SampleFiles
from skyrl.monitoring.selection import choose, marks_of
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup
from skyrl.settings import Config, KeptSamples
from skyrl.show import write_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u2029'\"`${alert(3)}\\<!--\0é😀"
IDS = np.zeros(5, np.int32)


class Page(HTMLParser):
    """Collects tags with their attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def shown(path: Path) -> dict[str, Any]:
    return json.loads(Page(path.read_text(encoding="utf-8")).scripts[0])


def make_run(folder: Path) -> Config:
    folder.mkdir()
    cfg = Config(run_dir=str(folder), name="n")
    cfg.digits.train_size, cfg.monitoring.samples = 40, KeptSamples.all
    write_json(folder / SETTINGS, cfg)
    return cfg


def sample(index: int, text: str, rule: float = 1.0, model: float | None = None, **more: Any) -> Sample:
    reward = None if more.get("error") else RewardParts(rule, 1.0, model, rule, {"numeric": rule})
    return Sample(index, IDS, None, text, more.pop("truncated", False), 3, reward=reward, **more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on digit scenes: two groups, a prompt that the data do not have, and hostile texts everywhere."""
    cfg = make_run(tmp_path / "run")
    scenes = DigitScenes("train", 40, cfg.digits.text_share, cfg.data.seed, cfg.digits.kinds)
    pictured = next(scenes[row] for row in range(40) if scenes[row].images)
    gone = Prompt(f"train/{HOSTILE}", HOSTILE, (), HOSTILE, "exact", HOSTILE)
    groups = [
        SampleGroup(pictured, IDS, [
            sample(0, "<think>I see 00/00.</think>", 0.0, claims=4, false_claims=4),
            sample(1, "b", truncated=True),
        ], checkable=True),
        SampleGroup(gone, IDS, [sample(0, HOSTILE, 0.0), sample(1, "d", error=HOSTILE)]),
    ]  # fmt: skip
    writer = SampleFiles(cfg)
    writer.evaluation(0, [SampleGroup(pictured, IDS, [sample(0, "e")])])  # no such id among the evaluation's
    writer.step(3, 3, groups, [])
    writer.wait()
    return tmp_path / "run"


def test_the_page_is_one_safe_file(run: Path) -> None:
    html = write_page(run).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.scripts) == 2 and [dict(a).get("type") for t, a in page.tags if t == "script"] == [
        "application/json",
        None,
    ]
    # The browser runs the one script whose digest the policy names; our own, to the letter.
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-" + digest + "'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    assert page.scripts[1] == (Path(show.__file__).parent / "monitoring" / "show.js").read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "img") and "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    inside = html[html.index('id="data">') :]
    assert inside.index("</script>") == inside.index("</script>\n<script>")  # nothing inside ends the element earlier
    assert "\u2028" not in html and "alert(1)</script>" not in html and "<img" not in html and "<!--" not in html
    texts = {row["text"] for row in shown(run / "samples.html")["samples"]}
    assert HOSTILE in texts  # and yet it is there whole


def test_the_script_makes_no_markup_of_a_text() -> None:
    script = (Path(show.__file__).parent / "monitoring" / "show.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(", script)


def test_rows_marks_pictures_and_claims(run: Path, tmp_path: Path) -> None:
    path = write_page(run, tmp_path / "elsewhere.html")
    assert path == tmp_path / "elsewhere.html" and not (run / "samples.html").exists()
    found = shown(path)
    by_text = {row["text"]: row for row in found["samples"]}
    first, cut, hostile, failed, evaluated = (
        by_text[text] for text in ("<think>I see 00/00.</think>", "b", HOSTILE, "d", "e")
    )
    assert first["marks"] == ["false claim"] and cut["marks"] == ["cut off"] and failed["marks"] == ["error"]
    assert hostile["marks"] == [] and evaluated["marks"] == []
    assert sorted(found["marks"]) == ["cut off", "error", "false claim"]
    assert first["rules"] == {"numeric": 0.0} and first["version"] == 3 and failed["rules"] == {}
    assert len(found["pictures"]) == 1 and first["picture"] == cut["picture"] == 0  # once for both
    assert hostile["picture"] is None and evaluated["picture"] is None
    assert Image.open(io.BytesIO(base64.b64decode(found["pictures"][0]))).size == (32, 32)
    spans = [[first["text"][a:b], true] for a, b, true in first["claim_spans"]]
    assert [text for text, _ in spans] == ["0", "0", "0", "0"] and not all(true for _, true in spans)
    html = path.read_text(encoding="utf-8")
    assert "5 of 5 samples of 2 files, steps 0 to 3" in html and "2 prompts are not in the data any more" in html


def test_data_that_are_gone_cost_the_pictures_only(run: Path) -> None:
    settings = json.loads((run / SETTINGS).read_text())
    settings["data"] |= {"source": "nowhere:data"}
    write_json(run / SETTINGS, settings)
    html = write_page(run).read_text(encoding="utf-8")
    assert "there are no pictures: data.source=nowhere:data" in html
    assert len(shown(run / "samples.html")["samples"]) == 5 and shown(run / "samples.html")["pictures"] == []


def test_pictures_have_a_limit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "PICTURE_BYTES", 10)
    html = write_page(run).read_text(encoding="utf-8")
    assert "2 samples are without their picture" in html and shown(run / "samples.html")["pictures"] == []


def test_a_folder_that_is_no_run_or_has_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"elsewhere has no config\.json; allowed is the folder of a run"):
        write_page(tmp_path / "elsewhere")
    make_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"samples holds no samples.*monitoring\.samples=off"):
        write_page(tmp_path / "run")
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "step_000001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"step_000001\.parquet can't be read"):
        write_page(tmp_path / "run")


def test_a_file_that_goes_meanwhile_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is going on removes old steps, and writes a step anew, between the two passes over its files."""
    real, calls = show._read, list[Path]()

    def removing(path: Path, columns: list[str]) -> pa.Table | None:
        calls.append(path)
        if len(calls) == 3:  # the second pass begins
            (run / "samples" / "step_000003.parquet").unlink()
        return real(path, columns)

    monkeypatch.setattr(show, "_read", removing)
    write_page(run)
    assert [row["text"] for row in shown(run / "samples.html")["samples"]] == ["e"]


def test_the_command(run: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "skyrl.show", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    done = command(str(run), "--limit", "2", "--output", str(run / "page.html"))
    assert done.returncode == 0 and done.stdout == f"{run / 'page.html'}\n", done.stderr
    assert len(shown(run / "page.html")["samples"]) == 2
    assert command(str(run), "--limit", "0").returncode == 2
    failed = command(str(run / "samples"))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and "has no config.json" in failed.stderr


# ---------------------------------------------------------------- the choice


def table(**columns: Any) -> pa.Table:
    size = len(columns["step"])
    empty = {
        "split": ["train"] * size, "origin": ["fresh"] * size, "tokens": [1] * size, "truncated": [False] * size,
        "rule": [1.0] * size, "model": [None] * size, "false_claims": [None] * size, "error": [None] * size,
        "kind": ["k"] * size,
    }  # fmt: skip
    schema = {"model": pa.float64(), "false_claims": pa.int32(), "error": pa.string(), "rule": pa.float64()}
    return pa.table({k: pa.array(v, schema.get(k)) for k, v in (empty | columns).items()})


def test_disagreement_by_hand() -> None:
    """Per step and split: median right of step 1 is 2, median wrong -1; step 2 has no wrong answer."""
    rules = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, None, 0.0]
    scores = [2.0, 5.0, -3.0, -1.0, 2.5, -4.0, -9.0, 9.0, 7.0, None]
    found = marks_of(table(step=[1, 1, 1, 1, 1, 1, 2, 2, 1, 1], rule=rules, model=scores))["disagree"]
    assert found.tolist() == [0.0, 0.0, 2.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    split = marks_of(table(step=[1, 1], split=["train", "eval"], rule=[1.0, 0.0], model=[0.0, 9.0]))["disagree"]
    assert split.tolist() == [0.0, 0.0]  # they are not compared with each other


def test_the_longest_are_a_twentieth_and_none_where_all_are_equal() -> None:
    lengths = list(range(1, 41))
    found = marks_of(table(step=[1] * 40, tokens=lengths))["longest"]
    assert np.flatnonzero(found).tolist() == [38, 39]
    assert not marks_of(table(step=[1] * 40))["longest"].any()
    assert not any(strength.any() for strength in marks_of(table(step=[])).values())


def test_every_mark_gets_its_turn() -> None:
    size = 1000
    steps = np.arange(size) // 100
    marks = {name: np.zeros(size) for name in ("error", "cut off", "disagree")}
    marks["cut off"][:500] = 1.0
    marks["error"][[3, 7]] = 1.0
    marks["disagree"][[20, 40, 60]] = [1.0, 3.0, 2.0]
    chosen = choose(marks, steps, 40)
    assert len(chosen) == 40 and (np.diff(chosen) > 0).all()
    assert {3, 7, 20, 40, 60} <= {*chosen.tolist()}  # the rare ones all
    cut_off = [place for place in chosen if place not in (3, 7, 20, 40, 60) and place < 500]
    plain = [place for place in chosen if place >= 500]
    assert abs(len(cut_off) - len(plain)) <= 5 and min(steps[cut_off]) == 4  # as many of each; the newest of equals
    assert len({*steps[plain].tolist()}) >= 4  # from all over the run
    assert choose(marks, steps, size).tolist() == list(range(size))
    assert choose(marks, steps, 40).tolist() == chosen.tolist()
