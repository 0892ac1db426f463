"""Rows of every kind of file: random access, all in order, broken ones, and bounded memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skyrl.data import rows as module
from skyrl.data.rows import Rows, open_rows
from skyrl.records import DataError

VALUES: list[dict[str, Any]] = [
    {"question": f"{n}+1?", "answer": n + 1, "images": [{"bytes": bytes([n % 256]) * 50, "path": None}]}
    for n in range(3000)
]


def saved(folder: Path, values: list[dict[str, Any]], as_file: bool = False) -> Path:
    """A folder as ``datasets.save_to_disk`` writes it: Arrow streams (or files), ``state.json`` with their order."""
    folder.mkdir()
    names = ["data-00001.arrow", "data-00000.arrow"]  # the list decides, not the names
    for place, name in enumerate(names):
        table = pa.Table.from_pylist(values[place * 2000 : place * 2000 + 2000])
        make = pa.ipc.new_file if as_file else pa.ipc.new_stream
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def parquet(path: Path, values: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(values), path, **options)
    return path


def lines(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in values) + "\n\n")
    return path


PLAIN = [{name: value for name, value in one.items() if name != "images"} for one in VALUES]


@pytest.fixture(params=["parquet", "one_group", "stream", "file", "jsonl", "json", "json_lines"])
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows, list[dict]]:
    """Rows of a kind of file, and what it should hold."""
    if request.param == "parquet":
        return open_rows(parquet(tmp_path / "a.parquet", VALUES, row_group_size=100)), VALUES
    if request.param == "one_group":
        monkeypatch.setattr(module, "GROUP_BYTES", 1000)
        return open_rows(parquet(tmp_path / "a.parquet", VALUES)), VALUES
    if request.param in ("stream", "file"):
        return open_rows(saved(tmp_path / "a", VALUES, request.param == "file")), VALUES
    if request.param == "json":
        (tmp_path / "a.json").write_text(json.dumps(PLAIN))
        return open_rows(tmp_path / "a.json"), PLAIN
    return open_rows(lines(tmp_path / ("a.json" if request.param == "json_lines" else "a.jsonl"), PLAIN)), PLAIN


def test_random_access_and_all_in_order(both: tuple[Rows, list[dict[str, Any]]]) -> None:
    rows, values = both
    assert len(rows) == 3000 and rows.names == list(values[0])
    for row in random.Random(0).sample(range(3000), 200):
        assert rows[row] == values[row]
    assert [row for batch in rows.batches() for row in batch] == values
    answers = [{"answer": one["answer"]} for one in values]
    assert [row for batch in rows.batches({"question", "images"}) for row in batch] == answers
    assert rows.inline <= {"images"} and bool(rows.inline) == ("images" in values[0])


def test_a_large_row_group_is_copied_once_and_the_copy_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 1000)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    rows = open_rows(parquet(tmp_path / "a.parquet", VALUES))
    assert rows[5] == VALUES[5] and rows[2999] == VALUES[2999]
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 and nothing more", "a.parquet: can't be read: "),
        ("a.parquet", b"", "a.parquet: got b'' as its first bytes; allowed: a Parquet, .jsonl"),
        ("a.csv", b"a,b", "a.csv: got b'a,b' as its first bytes; allowed"),
        ("a.json", b"[1]", "a.json, row 0: got a int; allowed: a JSON object"),
        ("a.json", b"[{", "a.json: can't be read: JSONDecodeError"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_rows(tmp_path / name)
    assert message in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .*; allowed: a file, or a folder by datasets"):
        open_rows(tmp_path)
    saved(tmp_path / "train", VALUES[:3])
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=f"holds several splits; allowed: the folder of one, {tmp_path}/train"):
        open_rows(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        open_rows(tmp_path / "absent")


def test_a_broken_line_is_one_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "1"}\n{"question"\n\xff\n[1]\n{"question": "2"}\n')
    rows = open_rows(tmp_path / "a.jsonl")
    assert rows[4] == {"question": "2"}
    found = [row for batch in rows.batches() for row in batch]
    assert [isinstance(row, DataError) for row in found] == [False, True, True, True, False]
    assert "row 1: can't be read: JSONDecodeError" in str(found[1])


def test_endless_nesting_is_a_broken_row(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(DataError, match="can't be read: RecursionError"):
            open_rows(tmp_path / name)[0]


def test_fuzzed_parquet_is_read_or_refused(tmp_path: Path) -> None:
    """Whatever bytes are changed: rows, or a DataError that names the file; no other exception and no crash."""
    whole = parquet(tmp_path / "a.parquet", VALUES[:200], row_group_size=50).read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(4, len(broken))] = chance.randrange(256)
        (tmp_path / "b.parquet").write_bytes(broken)
        try:
            rows = open_rows(tmp_path / "b.parquet")
            assert sum(len(batch) for batch in rows.batches()) >= 0
            for row in range(0, min(len(rows), 200), 60):
                rows[row]
        except DataError as error:
            refused += 1
            assert "b.parquet" in str(error)
    assert refused > 20


GROWTH = """
import resource, sys
from skyrl.data.files import FilePrompts
from skyrl.data.reading import Reading
FilePrompts(sys.argv[2], Reading(verifier="exact"))  # imports what is needed
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
read = FilePrompts(sys.argv[1], Reading(verifier="exact"))
for row in range(0, len(read), len(read) // 50):
    assert read[row].answer == str(row)
print(len(read), peak() - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """100,000 rows of about 2,000 characters, 200 MB of text, are opened, checked and read in less; 32 MB are kept."""
    text, schema = "What is it? " * 166, pa.schema([("question", pa.string()), ("answer", pa.string())])
    small, large = tmp_path / f"small.{kind}", tmp_path / f"large.{kind}"
    for path, size in ((small, 100), (large, 100_000)):
        chunks = (range(start, min(size, start + 1000)) for start in range(0, size, 1000))
        if kind == "jsonl":
            with path.open("w") as file:
                for chunk in chunks:
                    file.writelines(json.dumps({"question": text + str(n), "answer": str(n)}) + "\n" for n in chunk)
        else:
            with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
                for chunk in chunks:
                    values = [[text + str(n) for n in chunk], [str(n) for n in chunk]]
                    writer.write_table(pa.table(values, schema=schema))
    assert large.stat().st_size > 190e6
    done = subprocess.run([sys.executable, "-c", GROWTH, large, small], capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == 100_000 and grown < 120, f"{grown} MB"
