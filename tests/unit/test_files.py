"""Files of other layouts and forms, their pictures in every form, and paths that must not be followed."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from skyrl.data.files import FilePrompts
from skyrl.data.pictures import decode_picture, picture_file, picture_outline
from skyrl.data.reading import Reading
from skyrl.records import DataError, Prompt, Turn
from skyrl.settings import Layout

RED = np.full((2, 3, 3), (255, 0, 0), dtype=np.uint8)
MATH = Reading(verifier="math")


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


PNG = file_of(Image.fromarray(RED))
WEBP = file_of(Image.fromarray(RED), "WEBP", lossless=True)
TEXT = base64.b64encode(PNG).decode()


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path: Path, reading: Reading = MATH) -> Prompt:
    return FilePrompts(path, reading)[0]


@pytest.mark.parametrize(
    "stored",
    [
        [{"bytes": PNG, "path": None}],
        [{"bytes": PNG, "path": "elsewhere/red.png"}],  # as datasets writes it: the name is a note
        [{"bytes": None, "path": "red.png"}],
        {"bytes": PNG, "path": None},
        [PNG],
        PNG,
        ["red.png"],
        "red.png",
        [WEBP],
    ],
)
@pytest.mark.parametrize("column", ["images", "image"])
def test_pictures_of_parquet_files(tmp_path: Path, stored: Any, column: str) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    row = {"prompt": [{"role": "user", "content": "<image>\nWhich colour?"}], "solution": "red", column: stored}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    prompt = only(tmp_path / "p.parquet", Reading(verifier="exact"))
    assert len(prompt.images) == 1 and np.array_equal(prompt.images[0], RED)
    assert (prompt.turns, prompt.question) == ((), "\nWhich colour?")


@pytest.mark.parametrize("stored", ["red.png", TEXT, f"data:image/png;base64,{TEXT}", {"path": "red.png"}])
def test_pictures_of_json_lines(tmp_path: Path, stored: Any) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    for images in ([stored], stored):
        path = lines(tmp_path / "p.jsonl", {"prompt": "Which colour?", "answer": "red", "images": images})
        assert np.array_equal(only(path, Reading(verifier="exact")).images[0], RED)


def test_a_verl_file_with_pictures_in_place_and_its_columns(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A: <image> B: <image> Which?"}]
    row = {
        "data_source": "hiyouga/geometry3k",
        "prompt": said,
        "images": [{"bytes": PNG, "path": None}, {"bytes": WEBP, "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 7},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "v.parquet")
    read = FilePrompts(tmp_path / "v.parquet", MATH)
    prompt = read[0]
    assert read.layout is Layout.verl and read.verifiers() == ["math"]
    user = Turn("user", ("A: ", None, " B: ", None, " Which?"))
    assert prompt.turns == (Turn("system", ("Be brief.",)), user)
    assert (prompt.id, prompt.answer, prompt.verifier, prompt.kind) == ("v/0", "3", "math", "hiyouga-geometry3k")
    assert prompt.extra == {name: row[name] for name in ("data_source", "reward_model", "extra_info")}
    assert prompt.question == "A:  B:  Which?" and len(prompt.images) == 2


def test_marks_are_counted_when_the_row_is_read_if_pictures_stand_in_the_file(tmp_path: Path) -> None:
    row = {"question": "<image> or <image>?", "answer": "A", "verifier": "choice", "images": [PNG]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    read = FilePrompts(tmp_path / "p.parquet")
    for opened in (read.__getitem__, read.outline):
        with pytest.raises(DataError, match=r"row 0, column 'question': got 2 mark\(s\) <image> for 1 picture"):
            opened(0)
    assert [one.row for one in read.problems(lambda prompt: None)] == [0]
    with pytest.raises(DataError, match=r"row 0, column 'question': got 1 mark\(s\) <image> for 0 picture"):
        FilePrompts(lines(tmp_path / "p.jsonl", {"question": "<image>?", "answer": "A", "verifier": "choice"}))


def test_a_layout_can_be_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "1+1?", "reward_model": {"ground_truth": "3"}, "solution": "2"})
    assert only(path).answer == "3"
    assert only(path, Reading(layout=Layout.trl, verifier="math")).answer == "2"
    with pytest.raises(DataError, match="row 0, column 'messages': got null"):
        only(path, Reading(layout=Layout.swift, verifier="math"))


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    row = {"question": "?", "answer": 2, "verifier": "numeric"}
    read = FilePrompts(lines(tmp_path / "p.jsonl", row | {"id": 7}, row | {"id": "8"}))
    assert read.ids() == ["7", "8"] and read[0].id == "7"
    with pytest.raises(DataError, match="row 1, column 'id': got '7', which is also that of row 0"):
        FilePrompts(lines(tmp_path / "q.jsonl", row | {"id": 7}, row | {"id": "7"}))
    with pytest.raises(DataError, match=r"row 0, column 'id': got 7\.5; allowed: a text that isn't empty, or a whole"):
        FilePrompts(lines(tmp_path / "r.jsonl", row | {"id": 7.5}))


@pytest.mark.parametrize("column", ["id", "question", "answer", "kind"])
def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path, column: str) -> None:
    row = {"id": "a", "question": "?", "answer": "1", "kind": "k", "verifier": "exact"}
    with pytest.raises(DataError, match=rf"row 0, column '{column}': got .*ud800.*allowed: Unicode text"):
        FilePrompts(lines(tmp_path / "p.jsonl", row | {column: "half \ud800"}))


def test_every_problem_of_a_file_is_found(tmp_path: Path) -> None:
    good = {"id": 0, "question": "?", "answer": 2, "verifier": "numeric"}
    rows = [good, good | {"id": 1, "answer": "two"}, good | {"id": 2, "question": ""}, good | {"id": 3}]
    path = lines(tmp_path / "p.jsonl", *rows, good | {"id": 3}, good | {"id": 5, "kind": "a/b"})
    with path.open("a") as file:
        file.write("{broken\n")
    found = list(FilePrompts(path, check=False).problems())
    assert sorted((one.row, one.column) for one in found) == [
        (1, "answer"),
        (2, "question"),
        (4, "id"),
        (5, "kind"),
        (6, ""),
    ]
    with pytest.raises(
        DataError, match=r"row 1, column 'answer'.*\(python -m skyrl.data validate names all such rows\)"
    ):
        FilePrompts(path)


# ---------------------------------------------------------------- pictures that are refused


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("../secret.png", r"got '\.\./secret.png'; allowed: a path inside"),
        ("a/../../secret.png", "allowed: a path inside .*data.picture_root names another folder"),
        ("/etc/passwd", "got '/etc/passwd'; allowed: a path inside"),
        ("file:///etc/passwd", "allowed: a path inside"),
        ("https://host/a.png", "pictures are not downloaded"),
        ("absent.png", "has no such file"),
        ("fifo", "has no such file"),
        ("a\0b", "a.*b"),
        ("x" * 5000, "File name too long|no such file"),
        ("data:image/png;base64,@@@", "allowed: base64 of a picture file"),
        (3, "got a int; allowed: a picture"),
        ({"url": "x"}, "got a dict; allowed: a picture"),
        ({"bytes": None, "path": None}, "got null; allowed: a picture"),
    ],
)
def test_pictures_that_are_not_followed(tmp_path: Path, stored: Any, message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    os.mkfifo(folder / "fifo")
    with pytest.raises(DataError, match=message):
        FilePrompts(lines(folder / "p.jsonl", {"prompt": "?", "answer": "1", "images": [stored]}), MATH)


def test_pictures_of_a_folder_that_the_settings_name(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(PNG)
    root = str(tmp_path / "pictures")
    for name in ("red.png", f"{root}/red.png", f"file://{root}/red.png"):
        path = lines(tmp_path / "p.jsonl", {"prompt": "?", "answer": "1", "image": name})
        assert len(only(path, Reading(verifier="math", picture_root=root)).images) == 1
    with pytest.raises(DataError, match="allowed: a path inside"):
        picture_file("../p.jsonl", Path(root))


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a header and no more: whoever decodes it fails, whoever looks at its size does not."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + PNG[33:]


@pytest.mark.parametrize("look", [decode_picture, picture_outline])
def test_the_limit_on_pixels_is_looked_at_before_decoding(look: Any) -> None:
    with pytest.raises(DataError, match=r"x: got a picture of 15000x11800 pixels; data\.max_pixels allows 50000000"):
        look(bomb(15000, 11800), "x")
    with pytest.raises(DataError, match=r"3x2 pixels; data\.max_pixels allows 5"):
        look(PNG, "x", 5)
    assert look(PNG, "x", 6).shape == (2, 3, 3)


def test_outlines_have_the_size_that_the_decoded_picture_has() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    for kind in ("JPEG", "PNG", "WEBP"):
        for options in ({}, {"exif": exif}):
            content = file_of(Image.new("RGB", (30, 20), 7), kind, **options)
            outline = picture_outline(content, "x")
            assert outline.shape == decode_picture(content, "x").shape and outline.dtype == np.uint8
            assert outline.strides == (0, 0, 0)
    with pytest.raises(DataError, match="x: got 6 bytes that begin with b'GIF89a'; allowed: a PNG, JPEG or WebP file"):
        picture_outline(b"GIF89a", "x")
