"""The report, its charts and its gallery, from hand-made data."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyrl.monitoring.gallery import FALSE_CLAIM, FIRST, RULE, add_after, gallery_entries, marked_text, picture_base64
from skyrl.monitoring.records import read_metrics, write_json
from skyrl.monitoring.report import smoothing_window, write_report
from skyrl.monitoring.sinks import JsonlSink
from skyrl.monitoring.summary import write_summary
from skyrl.monitoring.svg import BOTTOM, HEIGHT, TOP, Series, line_chart, nice_ticks, running_mean
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup
from skyrl.rewards.claims import CHECKERS, Claim
from skyrl.settings import Config

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and the text of marks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marks: list[tuple[str | None, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks.append((dict(attrs)["class"], ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            kind, text = self.marks[-1]
            self.marks[-1] = (kind, text + data)


def check_digits(text: str, digits: str) -> list[Claim]:
    """Each digit after ``I see`` must be among the facts."""
    seen = re.search(r"I see (\d+)", text)
    if seen is None:
        return []
    return [Claim(i, i + 1, text[i], text[i] in digits) for i in range(seen.start(1), seen.end(1))]


@pytest.fixture(autouse=True)
def checker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(CHECKERS, "digits", check_digits)
    yield


def group(row: int, text: str, rule: float = 1.0, picture: bool = True, error: str | None = None) -> SampleGroup:
    images = (np.full((32, 32, 3), row, np.uint8),) if picture else ()
    facts = {"digits": "31"} if picture else {}
    prompt = Prompt(f"eval/{row}", f"Question {row}?", images, "9", "numeric", "sum", facts)
    reward = None if error else RewardParts(rule, 1.0, 0.0, rule)
    empty = np.zeros(0, np.int32)
    return SampleGroup(prompt, empty, [Sample(0, empty, empty.astype(np.float32), text, False, 0, reward, error=error)])


def make_run(folder: Path, entries: list[dict[str, Any]], steps: int = 20) -> None:
    hostile = Config().model_copy(update={"name": HOSTILE})  # even if no setting lets it through
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(steps + 1):
        metrics = {"reward/rule": step / 40, "time/rollout": 1.0, "time/learner": 2.0, "loss/total": -0.1 * step}
        metrics |= {"buffer/effective_share": 0.5, "grpo/ratio_max": float("inf"), "time/step": 3.0}
        if step in (0, steps):
            metrics |= {"eval/accuracy": 0.4 + step / 100, "eval/hallucination": 0.2, "eval/accuracy/<b>": 0.5}
        sink.log(step, metrics)
    sink.close()
    write_summary(folder / "summary.json", read_metrics(folder / "metrics.jsonl"), config=hostile)
    write_json(folder / "gallery.json", entries)


def test_report_is_one_safe_file(tmp_path: Path) -> None:
    text = f"<think>I see 371.{HOSTILE}</think><answer>9</answer>"
    before = [group(0, text, rule=0.0), group(1, "hm & <b>", picture=False, error=HOSTILE)]
    after = [group(0, "<think>I see 31.</think><answer>9</answer>"), group(1, HOSTILE, picture=False)]
    entries = add_after(gallery_entries(before, 12), after)
    entries[0] |= {"question": HOSTILE, "truth": HOSTILE, "kind": HOSTILE, "id": '"><script>'}
    entries[1] |= {"picture": '"><script>'}
    make_run(tmp_path, entries)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    assert page.marks[2:] == [("true", "3"), ("false", "7"), ("true", "1"), ("true", "3"), ("true", "1")]
    assert page.marks[:2] == [("true", "true"), ("false", "false")]  # the legend
    assert RULE[:40] in html and "40.0% →</span> 60.0%" in html and "learner.trainable" in html
    assert "prefers-color-scheme: dark" in html
    assert "Time per phase" in html and "without SSB" not in html.split("Scenes")[0].split('class="legend"')[-1]


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl").close()
    html = write_report(tmp_path, title="broken").read_text(encoding="utf-8")
    Page(html)
    assert "no summary" in html and "<h1>broken</h1>" in html
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_report(tmp_path / "elsewhere")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)


def test_marks_stand_at_the_right_characters() -> None:
    text = 'I see 3<7/"1" & so on'
    claims = [
        {"start": 8, "end": 9, "text": "7", "true": False},
        {"start": 6, "end": 7, "text": "3", "true": True},
        {"start": 8, "end": 12, "text": "overlaps", "true": True},
        {"start": 15, "end": 99, "text": "beyond", "true": False},
    ]
    html = marked_text(text, claims)
    assert html == (
        'I see <mark class="true" title="true claim about the picture">3</mark>&lt;'
        '<mark class="false" title="false claim about the picture">7</mark>/&quot;1&quot; &amp; so on'
    )


def test_gallery_follows_its_rule() -> None:
    texts = ["I see 3", "I see 9", "I see 1", "I see 1", "I see 8", "none", "I see 7", "I see 6"]
    before = [group(row, text, rule=0.0) for row, text in enumerate(texts)]
    after = [group(row, "I see 3") for row in reversed(range(len(texts)))]
    entries = add_after(gallery_entries(before, 4), after)
    assert [(e["id"], e["chosen"]) for e in entries] == [
        ("eval/0", FIRST),
        ("eval/1", FIRST),
        ("eval/4", FALSE_CLAIM),
        ("eval/6", FALSE_CLAIM),
    ]
    assert entries[1]["before"]["claims"] == [{"start": 6, "end": 7, "text": "9", "true": False}]
    assert not entries[1]["before"]["right"] and entries[1]["after"]["right"]
    json.dumps(entries, allow_nan=False)


def test_gallery_in_two_halves_and_its_errors() -> None:
    before, after = [group(0, "I see 3"), group(1, "", error="timeout")], [group(0, "I see 1"), group(1, "x")]
    chosen = gallery_entries(before, 12)
    stored = json.loads(json.dumps(chosen))
    assert [e["after"] for e in stored] == [None, None]
    assert stored[1]["before"]["error"] == "timeout" and not stored[1]["before"]["right"]
    assert add_after(stored, after) == add_after(chosen, after)
    assert [(e["before"]["text"], e["after"]["text"]) for e in add_after(stored, after)] == [
        ("I see 3", "I see 1"),
        ("", "x"),
    ]
    with pytest.raises(DataError, match="eval/1"):
        add_after(stored, after[:1])
    before[0].samples.clear()
    with pytest.raises(DataError, match="0 samples"):
        gallery_entries(before, 12)


def test_gallery_judges_the_claims_about_digit_scenes() -> None:
    sample = group(0, "<think>I see 31/47.</think>")
    sample.prompt = Prompt("eval/0", "?", (), "9", "numeric", "sum", {"grid": [[3, 1], [4, 1]]})
    claims = gallery_entries([sample], 12)[0]["before"]["claims"]
    assert [(c["text"], c["true"]) for c in claims] == [("3", True), ("1", True), ("4", True), ("7", False)]


def test_picture_is_a_png() -> None:
    def size(encoded: str | None) -> tuple[int, int]:
        assert encoded is not None
        return Image.open(io.BytesIO(base64.b64decode(encoded))).size

    assert picture_base64(()) is None
    scene = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    encoded = picture_base64((scene,))
    assert encoded is not None
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))) == scene).all()
    assert size(picture_base64((scene, scene[:16]))) == (68, 32)
    assert max(size(picture_base64((np.zeros((900, 1800, 3), np.uint8),)))) == 512


def test_chart() -> None:
    lines = [Series("a <b>", [(float(i), i / 100) for i in range(2000)]), Series("empty", [])]
    html = line_chart("Title", lines, unit="share", window=10)
    Page(html)
    assert "a &lt;b&gt;" in html and "empty" not in html
    assert html.count('class="hover"') <= 150 and "step 1999\na &lt;b&gt;: 1999.0%" in html
    assert ">1994.5%</text>" in html  # the mean of the last ten
    assert line_chart("Title", [Series("x", [])], unit="-") == ""
    Page(line_chart("one point", [Series("x", [(3.0, 0.0)], smooth=False)], unit="s"))


@pytest.mark.parametrize("sign", [1, -1])
def test_end_labels_do_not_cover_each_other(sign: int) -> None:
    lines = [Series(str(i), [(0.0, 0.0), (1.0, sign * 0.001 * i)]) for i in range(6)]
    html = line_chart("Title", [*lines, Series("far", [(0.0, 0.0), (1.0, float(sign))])], unit="-", from_zero=False)
    places = sorted(float(y) for y in re.findall(r'class="last" x="\d+" y="([-\d.]+)"', html))
    assert len(places) == 7 and min(b - a for a, b in pairwise(places)) > 12.5
    assert places[0] >= TOP and places[-1] <= HEIGHT - BOTTOM + 4  # a baseline stands 4 below its label's middle


def test_ticks_and_running_mean() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.5, 1.0]) or nice_ticks(0, 1) == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    for low, high in ((0.0, 0.37), (-3.2, 8.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 2e-7), (-4.0, -4.0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    assert running_mean([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]
    assert smoothing_window([]) == 1 and smoothing_window([{}] * 70) == 7 and smoothing_window([{}] * 9999) == 25
