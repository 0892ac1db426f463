"""``python -m skyrl.data``: what it prints, writes and how it ends."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_models import processor, random_model

from skyrl.data.__main__ import run
from skyrl.data.files import FilePrompts
from skyrl.data.pictures import encode_png
from skyrl.data.reading import Reading
from skyrl.records import ConfigError, DataError, Turn

RED = np.full((20, 30, 3), (255, 0, 0), dtype=np.uint8)
GOOD = {"id": "a", "question": "1+1?", "answer": 2, "verifier": "numeric"}


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(*words: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    run([str(word) for word in words], console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def broken(tmp_path: Path) -> Path:
    return lines(
        tmp_path / "b.jsonl",
        GOOD,
        GOOD | {"id": "b", "answer": "two"},
        GOOD | {"id": "c", "images": ["bad.png"]},
        GOOD | {"id": "d", "question": "x" * 500},
        *(GOOD | {"id": f"e{n}", "kind": "a/b"} for n in range(30)),
    )


def refused(*words: Any) -> tuple[str, str]:
    """What was printed, and the error."""
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataError) as caught:
        run([str(word) for word in words], console)
    return console.file.getvalue(), str(caught.value)  # type: ignore[attr-defined]


def test_validate_sees_what_no_single_row_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (lines(tmp_path / f"{name}.jsonl", GOOD | {"verifier": "mine"}) for name in "ab")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_rewards.py").write_text("def mine(answer, truth):\n    return 1.0\n")
    good, gone = (f'reward.verifiers={{mine: "own_rewards:{name}"}}' for name in ("mine", "other"))
    assert "a.jsonl: 1 prompts of the layout skyrl, no errors\n" in said("validate", first, good)
    output = tmp_path / "found.json"
    text, error = refused("validate", first, second, gone, "--output", output)
    assert f"1 id(s) stand both in {first} and in {second}, first 'a'" in text
    assert "'own_rewards:other'" in text and error == "2 problem(s) that no single row shows"
    assert [one["file"] for one in json.loads(output.read_text())] == [None, None]


def test_a_prompt_that_is_too_long_is_no_columns_fault(tmp_path: Path) -> None:
    model = tmp_path / "policy"
    random_model().save_pretrained(model)
    processor().save_pretrained(model)
    path = lines(tmp_path / "long.jsonl", GOOD | {"question": "x" * 500})
    text, _ = refused("validate", path, f"model.policy={model}", "rollout.max_prompt_tokens=9")
    assert text.startswith(f"{path}, row 0: the prompt has ") and "allows 9" in text


def test_convert_writes_parquet_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .*x\.json: must end with \.parquet"):
        said("convert", lines(tmp_path / "a.jsonl", GOOD), "--output", tmp_path / "x.json")


def test_validate_names_every_bad_row(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    path, console = broken(tmp_path), Console(file=io.StringIO(), width=200)
    with pytest.raises(DataError, match=r"^32 problem\(s\) in 1 of 2 file\(s\)$"):
        run(
            ["validate", str(path), str(lines(tmp_path / "good.jsonl", GOOD)), "--output", str(tmp_path / "o.json")],
            console,
        )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{path}, row 1, column 'answer': " in text
    assert "row 2, column 'images': picture 0: got 10 bytes that begin with b'no pictu'; allowed: a PNG" in text
    assert "BytesIO" not in text
    assert f"{path}: and 12 more\n" in text and "good.jsonl: 1 prompts of the layout skyrl, no errors\n" in text
    found = json.loads((tmp_path / "o.json").read_text())
    assert [one["row"] for one in found] == [1, 2, *range(4, 34)] and {one["file"] for one in found} == {str(path)}


def test_a_broken_line_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "1?", "answer": "1", "verifier": "exact"}\n{broken\n')
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataError, match="1 problem"):
        run(["validate", str(path)], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(f"{path}, row 1: can't be read: JSONDecodeError") and text.count("row 1") == 1


def test_validate_measures_by_the_models_own_processor(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    random_model().save_pretrained(folder)
    processor().save_pretrained(folder)
    path, model = lines(tmp_path / "a.jsonl", GOOD, GOOD | {"id": "d", "question": "x" * 500}), f"model.policy={folder}"
    with pytest.raises(DataError, match=r"1 problem\(s\)"):
        said("validate", path, model, "rollout.max_prompt_tokens=50", "--output", tmp_path / "o.json")
    (one,) = json.loads((tmp_path / "o.json").read_text())
    assert one["row"] == 1 and "the prompt has 502 tokens; rollout.max_prompt_tokens allows 50" in one["problem"]
    assert "no errors, at most 900 tokens each" in said("validate", path, model, "rollout.max_prompt_tokens=900")
    said("stats", path, model, "rollout.max_prompt_tokens=900", "--output", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())[str(path)]["tokens"]["most"] == 502


def test_convert_writes_our_layout(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encode_png(RED, ""))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A<image>B"}]
    row = {"prompt": messages, "images": ["red.png"], "reward_model": {"ground_truth": "3"}, "data_source": "x"}
    source, out = lines(tmp_path / "v.jsonl", row), tmp_path / "out.parquet"
    assert f"{out}: 1 prompts" in said("convert", source, "reward.verifier=math", "--output", out)
    before, after = FilePrompts(out)[0], FilePrompts(source, Reading(verifier="math"))[0]
    assert np.array_equal(before.images[0], RED)
    assert before.turns == after.turns == (Turn("system", ("S",)), Turn("user", ("A", None, "B")))
    names = ("id", "question", "answer", "verifier", "kind", "extra", "checks")
    assert all(getattr(before, name) == getattr(after, name) for name in names)
    with pytest.raises(ConfigError, match="is one of the files that are read"):
        said("convert", source, "reward.verifier=math", "--output", source)
    with pytest.raises(ConfigError, match=r"convert: needs --output FILE\.parquet"):
        said("convert", source)


def test_show_escapes_what_the_data_say(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encode_png(RED, ""))
    evil = "<script>alert(1)</script>"
    rows = [
        GOOD
        | {"question": f"A <image> {evil}", "answer": evil, "verifier": "exact", "images": ["red.png"], "note": evil}
    ]
    rows += [GOOD | {"id": f"x{n}"} for n in range(9)]
    out = tmp_path / "page.html"
    assert f"open {out}" in said("show", lines(tmp_path / "a.jsonl", *rows), "--output", out, "--rows", "3")
    page = out.read_text()
    assert page.count("<article>") == 3 and "<script" not in page and "&lt;script&gt;" in page
    assert page.count('src="data:image/png;base64,') == 1 and "30×20" in page
    assert page.index("<figure>") < page.index("&lt;script&gt;")


def test_stats_count(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encode_png(RED, ""))
    rows = [GOOD, GOOD | {"id": "b", "kind": "k", "images": ["red.png"]}, GOOD | {"id": "c", "verifier": "exact"}]
    path = lines(tmp_path / "a.jsonl", *rows)
    table = said("stats", path, "--output", tmp_path / "s.json")
    assert "numeric" in table and "median" in table
    found = json.loads((tmp_path / "s.json").read_text())[str(path)]
    assert found["prompts"] == 3 and found["kind"] == {"default": 2, "k": 1}
    assert found["verifier"] == {"numeric": 2, "exact": 1} and found["pictures"] == {"0": 2, "1": 1}
    assert found["turns"] == {"user": 3} and found["picture pixels"]["most"] == 600
    assert found["question characters"] == {"least": 4, "median": 4, "p95": 4, "most": 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["look", "a.jsonl"], "look: there is no such command; allowed: validate, convert, show, stats"),
        (["stats"], r"stats: which file\? python -m skyrl.data stats FILE"),
        (["stats", "a", "data.layot=verl"], "data.layot: there is no such setting; did you mean data.layout"),
        (["stats", "a", "data.layout=verr"], "data.layout=verr: must be one of auto, skyrl, verl, trl, swift"),
        (["show", "a", "--rows", "0"], "--rows 0: must be 1 or more"),
        (["show", "a", "--fast"], "unrecognized arguments: --fast; see python -m skyrl.data --help"),
    ],
)
def test_wrong_command_lines(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        said(*words)


def test_exit_codes(tmp_path: Path) -> None:
    def status(*words: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "skyrl.data", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert status("validate", lines(tmp_path / "a.jsonl", GOOD)).returncode == 0
    done = status("validate", lines(tmp_path / "b.jsonl", GOOD | {"answer": "two"}))
    assert done.returncode == 1 and "row 0, column 'answer'" in done.stdout and "1 problem(s)" in done.stderr
    assert status("look").returncode == 2
