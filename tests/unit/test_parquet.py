"""Prompts from Parquet files of our own layout: what is read, and what is refused with which words."""

from __future__ import annotations

import io
import json
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from skyrl.data import rows as rows_module
from skyrl.data.files import FilePrompts
from skyrl.data.parquet import write_parquet
from skyrl.data.reading import Reading
from skyrl.digits.scenes import DigitScenes
from skyrl.records import Check, DataError, Prompt, Turn

RED = np.full((2, 3, 3), (255, 0, 0), dtype=np.uint8)
ROW: dict[str, Any] = {"question": "1+1?", "answer": "2", "verifier": "numeric"}


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


PNG = file_of(Image.fromarray(RED))


def write(path: Path, rows: list[dict[str, Any]], types: dict[str, pa.DataType] | None = None) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows], (types or {}).get(name)) for name in names}
    pq.write_table(pa.table(columns), path)
    return path


def scenes(size: int, text_share: float = 0.0) -> list[Prompt]:
    dataset = DigitScenes("train", size, text_share, 0)
    return [dataset[row] for row in range(size)]


def same(a: Prompt, b: Prompt) -> bool:
    plain = all(getattr(a, n) == getattr(b, n) for n in ("id", "question", "answer", "verifier", "kind", "facts"))
    return plain and len(a.images) == len(b.images) and all(map(np.array_equal, a.images, b.images))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prompts = [*scenes(150, text_share=0.3), Prompt("two", "?", (RED, RED[:1]), "B", "choice", "mine")]
    write_parquet(tmp_path / "p.parquet", prompts)
    read = FilePrompts(tmp_path / "p.parquet")
    assert len(read) == 151 and read.ids() == [prompt.id for prompt in prompts]
    for row in np.random.default_rng(0).permutation(151).tolist():
        assert same(read[row], prompts[row])
        assert all(picture.dtype == np.uint8 and picture.flags.writeable for picture in read[row].images)
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_only_a_few_row_groups_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "p.parquet", scenes(200))
    monkeypatch.setattr(rows_module, "CACHED_BYTES", 1)
    read = FilePrompts(tmp_path / "p.parquet")
    assert [read[row].id for row in (0, 199, 64, 63)] == ["train/0", "train/199", "train/64", "train/63"]
    assert len(read.rows.groups.kept) == 1

    size = max(table.nbytes for table, _ in read.rows.groups.kept.values())
    monkeypatch.setattr(rows_module, "CACHED_BYTES", 2.5 * size)
    for row in (0, 64, 128, 70, 199, 0):  # of groups 0, 1, 2, 1, 3, 0
        assert read[row].id == f"train/{row}"
    assert [*read.rows.groups.kept] == [1, 3, 0]  # group 3 has only 8 rows
    assert read.rows.groups._bytes == sum(table.nbytes for table, _ in read.rows.groups.kept.values())


def test_defaults(tmp_path: Path) -> None:
    prompt = FilePrompts(write(tmp_path / "mine.parquet", [ROW, ROW]))[1]
    assert same(prompt, Prompt("mine/1", "1+1?", (), "2", "numeric", "default", {}))


def test_nulls_of_optional_columns_and_other_string_types(tmp_path: Path) -> None:
    rows = [
        ROW | {"kind": None, "facts": None, "images": None},
        ROW | {"kind": "k", "facts": '{"a": 1}', "images": [PNG]},
    ]
    types = {
        "question": pa.large_string(),
        "verifier": pa.dictionary(pa.int8(), pa.string()),
        "images": pa.large_list(pa.large_binary()),
    }
    read = FilePrompts(write(tmp_path / "m.parquet", rows, types))
    assert same(read[0], Prompt("m/0", "1+1?", (), "2", "numeric"))
    assert same(read[1], Prompt("m/1", "1+1?", (RED,), "2", "numeric", "k", {"a": 1}))


@pytest.mark.parametrize("images", [None, []])
def test_optional_columns_may_be_empty_in_every_row(tmp_path: Path, images: list[bytes] | None) -> None:
    # pyarrow types such columns null and list<null>.
    path = write(tmp_path / "m.parquet", [ROW | {"kind": None, "facts": None, "images": images}] * 2)
    read = FilePrompts(path)
    assert same(read[1], Prompt("m/1", "1+1?", (), "2", "numeric"))
    large = write(tmp_path / "l.parquet", [ROW | {"images": images}], {"images": pa.large_list(pa.null())})
    assert FilePrompts(large)[0].images == ()
    with pytest.raises(DataError, match="row 0, column 'answer': got null; allowed: a truth for 'numeric', in the col"):
        FilePrompts(write(tmp_path / "n.parquet", [ROW | {"answer": None}]))


def test_a_null_among_paths_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    path = write(tmp_path / "p.parquet", [ROW, ROW | {"images": ["red.png", None]}])
    with pytest.raises(DataError, match="row 1, column 'images': got null among the pictures; allowed: a picture"):
        FilePrompts(path)


def test_pictures_by_path_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(PNG)
    path = write(tmp_path / "p.parquet", [ROW | {"images": ["pictures/red.png"]}, ROW])
    read = FilePrompts(path)
    assert np.array_equal(read[0].images[0], RED) and read[1].images == ()
    (tmp_path / "pictures" / "red.png").unlink()
    with pytest.raises(DataError, match=r"row 0, column 'images': picture 0: .* no such file"):
        read[0]
    with pytest.raises(
        DataError, match=r"row 0, column 'images': picture 0: got 'pictures/red.png', and .* no such file"
    ):
        FilePrompts(path)


def test_pictures_become_rgb(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    turned = Image.new("L", (3, 2), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    files = [file_of(clear), file_of(turned, "JPEG", exif=exif), file_of(Image.new("1", (1, 1), 1))]
    images = FilePrompts(write(tmp_path / "p.parquet", [ROW | {"images": files}]))[0].images
    assert np.array_equal(images[0], np.full((2, 3, 3), 255))
    assert images[1].shape == (3, 2, 3) and np.array_equal(images[2], np.full((1, 1, 3), 255))


def test_limit_and_pickle(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet", scenes(9))
    read = pickle.loads(pickle.dumps(FilePrompts(tmp_path / "p.parquet", limit=4)))
    assert len(read) == 4 and same(read[3], scenes(9)[3])
    assert len(FilePrompts(tmp_path / "p.parquet", limit=40)) == 9
    for row in (-1, 4):
        with pytest.raises(DataError, match=f"row {row} does not exist; it has 4 rows"):
            read[row]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None}, "row 1, column 'messages': got null; allowed: question, a text, or messages"),
        ({"question": " \n"}, r"row 1, column 'question': got ' \\n'; allowed: a text that isn't empty"),
        ({"answer": None}, "row 1, column 'answer': got null"),
        ({"answer": "two"}, "row 1, column 'answer': the truth 'two' of a 'numeric' prompt is not a number"),
        ({"kind": "math/algebra"}, "row 1, column 'kind': got 'math/algebra'; allowed: no slash"),
        ({"verifier": "nummeric"}, "row 1, column 'verifier': unknown verifier 'nummeric'; allowed: exact, numeric"),
        ({"facts": "{"}, r"row 1, column 'facts': got '\{'; allowed: a JSON object"),
        ({"facts": '{"grid": "x"}'}, "row 1, column 'facts': fact 'grid' is 'x'; allowed: rows of digits"),
        ({"facts": "[1]"}, r"row 1, column 'facts': got '\[1\]'; allowed: a JSON object"),
        ({"id": "a"}, "row 1, column 'id': got 'a', which is also that of row 0; allowed: unique ids"),
        ({"id": None}, "row 1, column 'id': got null"),
    ],
)
def test_broken_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = ROW | {"id": "a", "facts": "{}"}
    path = write(tmp_path / "p.parquet", [good, good | {"id": "b"} | row])
    with pytest.raises(DataError, match=f"^{path}, {message}"):
        FilePrompts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a", "got 6 bytes that begin with b'GIF89a'; allowed: a PNG, JPEG or WebP file"),
        (b"", "got 0 bytes"),
        (PNG[:40], "got 40 bytes that begin with"),
        (file_of(Image.new("I;16", (2, 2))), "got a picture with more than 8 bits per channel; allowed: 8 bits"),
    ],
)
def test_broken_pictures(tmp_path: Path, content: bytes, message: str) -> None:
    types = {"images": pa.list_(pa.binary())}
    path = write(tmp_path / "p.parquet", [ROW, ROW | {"images": [PNG, content]}], types)
    read = FilePrompts(path)  # pictures are decoded when asked for
    assert read[0].images == ()
    with pytest.raises(DataError, match=f"^{path}, row 1, column 'images': picture 1: {message}"):
        read[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": ["?"], "answer": ["2"]},
            "row 0, column 'verifier': the row names none; allowed: such a column, or",
        ),
        ({"instruction": ["?"]}, "got the columns instruction, which are no layout's; allowed: question"),
        (
            {k: [v] for k, v in ROW.items()} | {"imagess": [[PNG]]},
            "column 'imagess' is unknown; did you mean 'images'?",
        ),
        ({k: pa.array([], pa.string()) for k in ROW}, "got 0 rows; allowed: 1 or more"),
        *(
            ({k: [v] for k, v in ROW.items()} | {name: [value]}, f"column '{name}' looks like pictures, which are read")
            for name, value in (
                ("image_path", "red.png"),
                ("image_bytes", PNG),
                ("picture", {"bytes": PNG, "path": None}),
                ("img", [PNG]),
                ("decoded_IMAGE", "red.png"),
                ("photoUrl", "http://localhost/red.png"),
            )
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=message):
        FilePrompts(tmp_path / "p.parquet")


def test_other_columns_are_ignored(tmp_path: Path) -> None:
    others = {"source": "web", "image_count": 1, "has_picture": False, "level": 3.0}
    assert FilePrompts(write(tmp_path / "p.parquet", [ROW | others]))[0].images == ()
    beside = {"images": [PNG], "image_path": "red.png"}  # where the pictures are read, a note on them is harmless
    assert len(FilePrompts(write(tmp_path / "q.parquet", [ROW | beside]))[0].images) == 1


def test_verifiers_of_the_settings_are_known_and_travel_to_other_processes(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [ROW, ROW | {"verifier": "close"}])
    with pytest.raises(DataError, match="row 1, column 'verifier': unknown verifier 'close'; allowed: exact, numeric"):
        FilePrompts(path)
    read = pickle.loads(pickle.dumps(FilePrompts(path, Reading(verifiers={"close": "my_verifiers:close_enough"}))))
    assert read.verifiers() == ["close", "numeric"]


def test_rows_that_name_no_verifier_get_the_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"question": "1+1?", "answer": 2}])
    read = FilePrompts(path, Reading(verifier="numeric"))
    assert same(read[0], Prompt("p/0", "1+1?", (), "2", "numeric")) and read.verifiers() == ["numeric"]
    with pytest.raises(DataError, match="unknown verifier 'nummeric'"):
        FilePrompts(path, Reading(verifier="nummeric"))
    # A function of one's own may need no truth, a built-in verifier does.
    bare = write(tmp_path / "b.parquet", [{"question": "1+1?"}])
    own = FilePrompts(bare, Reading(verifier="mine", verifiers={"mine": "a:b"}))
    assert (own[0].answer, own[0].verifier) == ("", "mine")
    with pytest.raises(DataError, match="column 'answer': got null; allowed: a truth for 'exact'"):
        FilePrompts(bare, Reading(verifier="exact"))


def test_turns_checks_and_further_columns_survive_a_round_trip(tmp_path: Path) -> None:
    turns = (Turn("system", ("S",)), Turn("user", (None, "a", None, "b")))
    checks = (Check("numeric", "2", 2.0), Check("exact", "two"))
    prompt = Prompt(
        "x", "ab", (RED, RED[:1]), "2", "numeric", "k", {"a": 1}, turns=turns, checks=checks, extra={"s": [1]}
    )
    write_parquet(tmp_path / "p.parquet", [prompt])
    read = FilePrompts(tmp_path / "p.parquet")[0]
    assert same(read, prompt)
    assert (read.turns, read.checks, read.extra) == (turns, checks, {"s": [1]})


def test_system_prompt_and_suffix_of_the_settings(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "p.parquet", [ROW, {"messages": json.dumps(own), "answer": "2", "verifier": "numeric"}])
    read = FilePrompts(path, Reading(system_prompt="S.", suffix="Use tags."))
    asked = Turn("user", ("1+1?\nUse tags.",))
    assert read[0].turns == (Turn("system", ("S.",)), asked) and read[0].question == "1+1?\nUse tags."
    assert read[1].turns == (Turn("system", ("Own.",)), asked)
    plain = FilePrompts(path, Reading(suffix=" Go."))[0]
    assert plain.turns == () and plain.question == "1+1? Go."


def test_further_columns_go_to_reward_functions_without_binary_ones(tmp_path: Path) -> None:
    row = ROW | {
        "level": 3,
        "tags": ["a"],
        "raw": b"x",
        "when": datetime(2026, 1, 2),
        "source": {"url": "u", "b": b"x"},
    }
    extra = FilePrompts(write(tmp_path / "p.parquet", [row]))[0].extra
    assert extra == {
        "level": 3,
        "tags": ["a"],
        "raw": None,
        "when": "2026-01-02 00:00:00",
        "source": {"url": "u", "b": None},
    }


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("text", "absent", ""):
        with pytest.raises(DataError, match=str(tmp_path)):
            FilePrompts(tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            Prompt("x", "?", (RED.astype(np.float32),), "1", "exact"),
            r"prompt 'x': got a picture of float32 \[2, 3, 3\]",
        ),
        (Prompt("x", "?", (RED[:, :, 0],), "1", "exact"), r"uint8 \[2, 3\]; allowed: uint8 \[h, w, 3\]"),
        (Prompt("x", "?", (), "1", "exact", facts={"a": {1}}), "prompt 'x': facts can't be written as JSON"),
    ],
)
def test_prompts_that_cannot_be_written_leave_no_file(tmp_path: Path, prompt: Prompt, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_parquet(tmp_path / "p.parquet", [prompt])
    assert not list(tmp_path.iterdir())
