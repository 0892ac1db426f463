"""The report, its charts and its gallery, from hand-made data."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skyrl.monitoring.charts import charts_with_data, running_mean, smoothing_window
from skyrl.monitoring.gallery import FALSE_CLAIM, FIRST, RULE, add_after, gallery_entries, marked, picture_base64
from skyrl.monitoring.records import read_metrics, write_json
from skyrl.monitoring.report import write_report
from skyrl.monitoring.sinks import JsonlSink
from skyrl.monitoring.summary import write_summary
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
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "http:" not in html and "https:" not in html and "url(" not in html.replace("url(#", "")
    assert "@import" not in html and HOSTILE not in html and html.count(escape(HOSTILE)) >= 8
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = re.findall(r'(?:href="|url\()#(\w+)', html)  # what charts point to stands once in the page
    assert used and set(used) <= set(ids) and len(set(ids)) == len(ids)
    assert page.marks[2:] == [("true", "3"), ("false", "7"), ("true", "1"), ("true", "3"), ("true", "1")]
    assert page.marks[:2] == [("true", "true"), ("false", "false")]  # the legend
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in html
    assert RULE[:40] in html and "40.0% →</span> 60.0%" in html and "learner.trainable" in html
    assert "prefers-color-scheme: dark" in html
    assert "Time per phase" in html and "with SSB" in html and "without SSB" not in html and "MPO" not in html
    write_report(tmp_path)
    assert path.read_text(encoding="utf-8") == html  # to the last digit


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
    assert [piece for piece in marked(text, claims) if piece[1]] == [
        ("", "I see "),
        ("true", "3"),
        ("", "<"),
        ("false", "7"),
        ("", '/"1" & so on'),
    ]
    assert [piece for piece in marked("<think>3</answer>", []) if piece[1]] == [
        ("tag", "<think>"),
        ("", "3"),
        ("tag", "</answer>"),
    ]


def test_marks_are_escaped_in_the_page(tmp_path: Path) -> None:
    before = group(0, '<think>I see 3</think>\n<i>&amp;</i> "')
    make_run(tmp_path, gallery_entries([before], 12))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert (
        '<p><span class="tag">&lt;think&gt;</span>I see '
        '<mark class="true" title="true claim about the picture">3</mark>'
        '<span class="tag">&lt;/think&gt;</span>\n&lt;i&gt;&amp;amp;&lt;/i&gt; &#34;</p>'
    ) in html


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


BOLD, FAINT = "stroke-width: 2", "stroke-opacity: 0.35"


def places(svg: str, colour: int, style: str) -> list[list[tuple[float, float]]]:
    """The pieces of a line in the picture, each its points."""
    (path,) = re.findall(rf'<path d="([^"]*)" clip-path="[^>]*stroke: var\(--s{colour}\); {style};', svg)
    pieces = [re.findall(r"([-\d.]+) ([-\d.]+)", piece) for piece in path.split("M")[1:]]
    return [[(float(x), float(y)) for x, y in piece] for piece in pieces]


def assert_drawn(points: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """Both axes of the picture are linear; y grows downwards."""
    for axis, sign in ((0, 1), (1, -1)):
        drawn, wanted = [p[axis] for p in points], [e[axis] for e in expected]
        slope, start = np.polyfit(wanted, drawn, 1)
        assert slope * sign > 0 and np.polyval((slope, start), wanted) == pytest.approx(drawn, abs=0.01)


def test_chart() -> None:
    values = [0.5, 0.9, 0.1, 0.6, 0.8, 0.7, 0.3, 0.35, 0.4, 0.9]
    history = [{"step": step, "buffer/effective_share_fresh": v} for step, v in enumerate(values * 2, start=1)]
    ((chart, (line,), svg),) = charts_with_data(history)
    assert chart.title == "Effective share of the rollout batch" and chart.unit == "share"
    assert line.label == "without SSB (fresh)" and line.colour == 1  # the other line would have the first
    mean = [values[0], *((a + b) / 2 for a, b in zip((values * 2)[:-1], (values * 2)[1:], strict=True))]
    assert line.last == pytest.approx((0.4 + 0.9) / 2)
    assert_drawn(places(svg, 1, BOLD)[0], list(enumerate(mean, start=1)))
    assert_drawn(places(svg, 1, FAINT)[0], list(enumerate(values * 2, start=1)))
    assert ">0%</text>" in svg and ">step</text>" in svg and "#0000" not in svg  # every colour is the page's
    assert charts_with_data([]) == charts_with_data([{"step": 1, "time/step": 1.0}]) == []


def test_gaps_are_not_drawn() -> None:
    known = {1: 4.0, 2: 5.0, 5: 4.5, 7: 4.2, 8: 4.4, 9: 5.0}
    history = [{"step": step, "reward/model": known.get(step)} for step in range(10)]
    history += [{"step": 10}]  # neither None nor nothing is a number
    ((_, (line,), svg),) = charts_with_data(history)
    pieces = [piece for piece in places(svg, 1, BOLD) if len(piece) > 1]
    assert [len(piece) for piece in pieces] == [2, 3]
    assert_drawn([*pieces[0], *pieces[1]], [(step, known[step]) for step in (1, 2, 7, 8, 9)])
    assert svg.count("<use ") == 1  # a step without neighbours
    ticks = [float(tick) for tick in re.findall(r"text-anchor: end[^>]*>([^<]*)</text>", svg)]
    assert len(ticks) > 2 and min(ticks) > 3.5 and line.last == 5.0  # a score need not begin at 0


def test_evaluations_are_dots() -> None:
    history = [{"step": step} | ({"eval/accuracy": step / 100} if step % 10 == 0 else {}) for step in range(41)]
    ((chart, (line,), svg),) = charts_with_data(history)
    dots = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--s0\)', svg)
    expected = [(step, step / 100) for step in range(0, 50, 10)]
    assert chart.title == "Accuracy" and line.last == 0.4  # no mean
    assert_drawn([(float(x), float(y)) for x, y in dots], expected)
    assert_drawn(places(svg, 0, BOLD)[0], expected)
    ((_, _, svg),) = charts_with_data([{"step": 3, "eval/accuracy": 0.0}])
    assert svg.count("<use ") == 1


def test_losses_of_own_terms_are_among_the_losses(tmp_path: Path) -> None:
    own = {"loss/total": 1.0, "loss/mpo": 2.0, "loss/preference": 3.0, "loss/length": 0.4567}
    drawn = {chart.title: lines for chart, lines, _ in charts_with_data([{"step": k, **own} for k in (1, 2)])}
    assert {title: [(line.label, line.colour) for line in lines] for title, lines in drawn.items()} == {
        "Loss": [("total", 0), ("MPO", 2), ("loss/length", 3)],
        "MPO terms, before their weights": [("preference (DPO)", 0)],
    }
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, own)
    sink.close()
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<i style="background: var(--s3)"></i>loss/length\n<b>0.457</b>' in html and '"unit">nats<' in html


def test_a_long_run_stays_small() -> None:
    noise = np.random.default_rng(0)
    history = [{"step": step, "reward/total": float(noise.normal())} for step in range(20000)]
    ((_, _, svg),) = charts_with_data(history)
    assert len(svg) < 400_000


def test_running_mean() -> None:
    nan = math.nan
    np.testing.assert_allclose(running_mean(np.array([1.0, 3.0, 5.0]), 2), [1, 2, 4])
    np.testing.assert_allclose(running_mean(np.array([nan, 1.0, nan, 3.0, 5.0]), 3), [nan, 1, nan, 2, 4])
    assert smoothing_window([]) == 1 and smoothing_window([{}] * 70) == 7 and smoothing_window([{}] * 9999) == 25


def test_matplotlib_is_imported_to_draw_only() -> None:
    code = "import sys, skyrl.monitoring.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
