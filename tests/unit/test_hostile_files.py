"""Folders that somebody else made: nothing in them is executed, nothing is as large as they say, a refusal names its
file. docs/hostile_inputs.md has the whole table; data, pictures and answers have their tests beside their readers."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import shutil
import struct
import tracemalloc
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from test_journal import groups_of, log_of, make, run_step

from skyrl import checkpoint
from skyrl.batch import journal
from skyrl.batch.batcher import Batcher
from skyrl.batch.journal import Journal
from skyrl.checkpoint import Checkpoints, find_checkpoint, read_state, verify
from skyrl.data.files import FilePrompts
from skyrl.data.pictures import decode_picture, picture_outline
from skyrl.data.reading import Reading
from skyrl.learner import files
from skyrl.learner.reference import Reference
from skyrl.learner.tensor_files import read_tree, write_tree
from skyrl.policy.hub import model_folder
from skyrl.policy.module import load_policy
from skyrl.records import ConfigError, DataError, SkyrlError
from skyrl.replay import saved
from skyrl.settings import Config


class Evil:
    """A pickle that leaves a file named ``executed`` in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def pickles(folder: Path) -> list[bytes]:
    """Evil in every form that a library of ours could unpickle."""
    found = [pickle.dumps(Evil(), protocol) for protocol in range(6)]
    for zipped in (True, False):
        torch.save({"step": Evil()}, folder / "torch", _use_new_zipfile_serialization=zipped)
        found.append((folder / "torch").read_bytes())
    np.save(folder / "array.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    return [*found, (folder / "array.npy").read_bytes()]


class Layer(torch.nn.Module):
    """A backend's model of one parameter."""

    collective = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.model = self

    def set_reference(self, parameters: Any) -> None:
        with torch.no_grad():
            for _, whole in parameters:
                self.weight.copy_(whole)


def load_buffer(path: Path) -> None:
    make("").load(path)


def load_reference(path: Path) -> None:
    Reference(Layer()).load(path.parent, 1, list)  # type: ignore[arg-type]


READERS: dict[str, Callable[[Path], Any]] = {
    "state.json": lambda path: read_state(path.parent),
    "COMPLETE.json": lambda path: verify(path.parent),
    "buffer.safetensors": load_buffer,
    "learner.json": lambda path: files.read_state(path.parent, Config()),
    "reference.safetensors": load_reference,
    "mp_rank_00_model_states.pt": lambda path: read_tree(path, ()),
}
"""Every file of a checkpoint → what reads it."""


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


# ---------------------------------------------------------------- every file of a checkpoint


@pytest.mark.parametrize("name", list(READERS))
def test_a_pickle_in_place_of_a_checkpoints_file(name: str, tmp_path: Path) -> None:
    for content in [*pickles(tmp_path), b"", b"[" * 10**6, b"\xff" * 100, struct.pack("<Q", 2**63) + b"{}"]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SkyrlError, match=name.replace(".", r"\.")):
            READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", list(READERS))
def test_a_pipe_a_device_and_a_folder_in_place_of_a_checkpoints_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for make_it in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        make_it(path)
        with pytest.raises(SkyrlError, match=f"{tmp_path}"):
            READERS[name](path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_names_in_the_manifest_stay_in_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nobody's business")
    with Checkpoints(tmp_path, 2).writing(1, {"step": 1}) as folder:
        (folder / "link").symlink_to(secret)
    (found,) = Checkpoints(tmp_path, 2).complete()
    with pytest.raises(SkyrlError, match="link leads out of it"):
        verify(found)
    digest = checkpoint._digest(secret)
    for name in ("../../secret", str(secret), "/dev/zero", "a\0b", "../../.."):
        (found / checkpoint.MANIFEST).write_text(json.dumps({"files": {name: digest}}))
        with pytest.raises(SkyrlError, match=r"leads out of it|is missing"):
            verify(found)
    for listed in ([], 3, None, "files"):
        (found / checkpoint.MANIFEST).write_text(json.dumps({"files": listed}))
        with pytest.raises(SkyrlError, match="lists no files"):
            verify(found)


def test_auto_takes_nothing_of_another_users_and_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("theirs", "mine"):
        run = tmp_path / name
        with Checkpoints(run, 2).writing(1, {"step": 1}):
            pass
        (run / "config.json").write_text('{"name": "one"}')
    assert find_checkpoint("auto", tmp_path / "new", "one") == tmp_path / "mine" / "checkpoints" / "step_000001"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("auto", tmp_path / "new", "one") is None
    assert f"2 run folders of other users, such as {tmp_path / 'mine'}; to go on with one" in caplog.text
    chosen = tmp_path / "theirs" / "checkpoints" / "step_000001"
    assert find_checkpoint(str(chosen), tmp_path / "new", "one") == chosen
    monkeypatch.undo()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("auto", tmp_path / "new", "one") is not None
    assert "pipe/config.json" in caplog.text


# ---------------------------------------------------------------- the buffer's state


def changed_tree(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the state's tree, with everything else of the file as it should be."""
    tensors = load_file(path)
    tree = json.loads(tensors[saved.TREE].tobytes())
    change(tree)
    tensors[saved.TREE] = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    save_file(tensors, path, metadata={"format": saved.FORMAT, "step": "3"})


@pytest.fixture
def buffer_file(tmp_path: Path) -> Path:
    one = make(tmp_path / "run")
    for step in (1, 2, 3):
        run_step(one, step)
    one.save(tmp_path / "buffer.safetensors", {4: 1}, {}, groups_of(4))
    return tmp_path / "buffer.safetensors"


def sample(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["buffer"]["samples"][0]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "giant shape": lambda tree: sample(tree).update(token_ids=["int32", 0, [2**62]]),
    "giant shape of nothing": lambda tree: sample(tree).update(token_ids=["int32", 0, [2**62, 0, 2**62]]),
    "negative shape": lambda tree: sample(tree).update(token_ids=["int32", 0, [-1]]),
    "negative place": lambda tree: sample(tree).update(token_ids=["int32", -5, [2]]),
    "place behind the end": lambda tree: sample(tree).update(token_ids=["int32", 2**70, [1]]),
    "no such array": lambda tree: sample(tree).update(token_ids=["object", 0, [1]]),
    "no array": lambda tree: sample(tree).update(token_ids=[1, 2, 3]),
    "no such picture": lambda tree: sample(tree).update(token_ids="picture.0"),
    "a text for a number": lambda tree: sample(tree).update(advantage="1.0"),
    "advantage that is none": lambda tree: sample(tree).update(advantage=float("nan")),
    "prompts that are none": lambda tree: tree["buffer"].update(prompts=[]),
    "negative place of a prompt": lambda tree: tree["buffer"].update(sample_prompts=["int64", 0, [0]]),
    "random state of another kind": lambda tree: tree["buffer"]["rng"].update(bit_generator="MT19937"),
    "random state that is none": lambda tree: tree["buffer"].update(rng={}),
    "giant random state": lambda tree: tree["buffer"]["rng"]["state"].update(state=2**4000),
    "another layout": lambda tree: tree["buffer"].update(layout=99),
    "score that is none": lambda tree: tree["margin"].update(window=[[float("inf"), None]]),
    "a class to build": lambda tree: tree.update(told={"__reduce__": ["os.system", "touch executed"]}),
    "groups that are none": lambda tree: tree.update(pending=[[4, 0, [{"prompt": None}]]]),
    "offline pairs": lambda tree: tree.update(pairs={"epoch": -1}),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_state_that_was_changed_by_hand(buffer_file: Path, name: str) -> None:
    changed_tree(buffer_file, CHANGES[name])
    one = make("")
    with pytest.raises(DataError, match=r"buffer\.safetensors|data\.pairs_path"):
        one.load(buffer_file)
    assert one._step == 0 and not one._pending


def test_a_small_file_does_not_become_a_large_state(buffer_file: Path) -> None:
    """A thousand samples that all say that they are one and the same large array."""

    def bomb(tree: dict[str, Any]) -> None:
        whole = ["float32", 0, [100_000]]
        tree["buffer"]["samples"] = [dict(sample(tree), logprobs=whole) for _ in range(1000)]

    tensors = {"float32": np.zeros(100_000, np.float32)}
    original = saved.pack

    def padded(*args: Any) -> dict[str, np.ndarray]:
        packed = original(*args)
        return packed | {"float32": np.concatenate([packed["float32"], tensors["float32"]])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "pack", padded)
        one = make("")
        run_step(one, 1)
        one.save(buffer_file, {}, {})
    changed_tree(buffer_file, bomb)
    tracemalloc.start()
    with pytest.raises(DataError, match="an array begins at 0 and has the shape"):
        make("").load(buffer_file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # not 400 MB


def fuzzed(content: bytes, chance: random.Random) -> bytes:
    broken = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        kind, place = chance.randrange(3), chance.randrange(len(broken))
        if kind == 0:
            broken[place] = chance.randrange(256)
        elif kind == 1:
            del broken[place : place + chance.randint(1, 50)]
        else:
            broken[place:place] = chance.randbytes(chance.randint(1, 50))
    return bytes(broken)


def test_fuzzed_states_are_read_or_refused(buffer_file: Path) -> None:
    whole, chance, refused = buffer_file.read_bytes(), random.Random(0), 0
    tree_at = whole.index(b'"layout"')
    for turn in range(300):
        broken = fuzzed(whole, chance) if turn % 3 else whole[:tree_at] + fuzzed(whole[tree_at:], chance)
        buffer_file.write_bytes(broken[: len(whole)].ljust(len(whole)) if turn % 2 else broken)
        try:
            make("").load(buffer_file)
        except DataError as error:
            refused += 1
            assert "buffer.safetensors" in str(error)
    assert refused > 200


def test_a_hostile_log(tmp_path: Path) -> None:
    one = make(tmp_path)
    for step in (1, 2):
        run_step(one, step)
    log, whole = log_of(tmp_path), log_of(tmp_path).read_bytes()
    (_, first), _ = journal._records(log)
    for content in pickles(tmp_path):
        log.write_bytes(whole[:first] + journal._head(content) + content)  # a record with a checksum that is right
        with pytest.raises(DataError, match=r"log_000000, at byte \d+ is damaged"):
            Journal(str(tmp_path)).recover(2)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(SkyrlError, match="can't go back to step 2"):
        Batcher.recover(make(tmp_path), None, 2)


# ---------------------------------------------------------------- the learner's files


class Scaler:
    def __init__(self) -> None:
        raise AssertionError("nobody constructs it")


def scaler() -> Scaler:
    made = object.__new__(Scaler)
    made.scale, made.kind = 2.0, torch.float16  # type: ignore[attr-defined]
    return made


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    flat = torch.arange(6, dtype=torch.float32)
    tree = {
        "views": [flat[:3], flat[3:], flat, flat],
        "half": torch.ones(2, 3, dtype=torch.bfloat16).T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
        "state": {0: {"step": torch.tensor(1.0)}, 1: {}},
        "order": OrderedDict(b=1, a=(1, None, True)),
        "size": torch.Size([2, 3]),
        "rest": [float("inf"), -0.0, 2**70, "\ud800", torch.float16],
        "object": scaler(),
    }
    write_tree(tmp_path / "x.pt", tree, (Scaler,))
    back = read_tree(tmp_path / "x.pt", (Scaler,))
    assert list(back) == list(tree) and list(back["order"].items()) == [("b", 1), ("a", (1, None, True))]
    assert isinstance(back["order"], OrderedDict) and back["state"].keys() == {0, 1} and back["rest"] == tree["rest"]
    assert back["size"] == tree["size"] and isinstance(back["size"], torch.Size)
    for name in ("half", "scalar", "empty"):
        assert back[name].dtype == tree[name].dtype and torch.equal(back[name], tree[name])
    for one, other in zip(back["views"], tree["views"], strict=True):
        assert torch.equal(one, other)
    assert type(back["object"]) is Scaler and vars(back["object"]) == {"scale": 2.0, "kind": torch.float16}
    with pytest.raises(SkyrlError, match=r"x\.pt: a checkpoint holds no builtins\.set"):
        write_tree(tmp_path / "x.pt", {1, 2}, ())


@pytest.mark.parametrize(
    "tree",
    [
        {"Popen": {"dict": [["args", "touch executed"]]}},
        {"Scaler": 3},
        {"Scaler": {"dict": [[1, 2]]}},
        {"dtype": "load"},
        {"dtype": "__class__"},
        {"tensor": "no_such"},
        {"tensor": ["tensor_0"]},
        {"dict": [[{"dict": []}, 1]]},
        {"dict": 3},
        {"size": ["x"]},
        {"tuple": 3},
        {},
        {"tuple": [], "dict": []},
    ],
    ids=str,
)
def test_trees_that_were_changed_by_hand(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "x.pt"
    save_torch({"tensor_0": torch.zeros(2)}, path, metadata={"tree": json.dumps([tree])})
    with pytest.raises(SkyrlError, match=r"x\.pt is damaged, or no checkpoint of this version"):
        read_tree(path, (Scaler,))


def test_fuzzed_trees_are_read_or_refused(tmp_path: Path) -> None:
    path, chance, refused = tmp_path / "x.pt", random.Random(0), 0
    write_tree(path, {"a": [torch.zeros(4), {"b": (1, 2)}], "c": scaler()}, (Scaler,))
    whole = path.read_bytes()
    for _ in range(300):
        path.write_bytes(fuzzed(whole, chance))
        try:
            read_tree(path, (Scaler,))
        except SkyrlError as error:
            refused += 1
            assert "x.pt" in str(error)
    assert refused > 200


# ---------------------------------------------------------------- folders of models


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    readers = (lambda: load_policy(str(tmp_path), "float32"), lambda: model_folder(str(tmp_path), "model.policy"))
    for content in pickles(tmp_path):
        (tmp_path / name).write_bytes(content)
        for read in readers:
            with pytest.raises(ConfigError, match=rf"has its weights in {name}, a pickle, .*safetensors"):
                read()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_folder(str(tmp_path), "model.policy") == str(tmp_path)  # nobody reads the pickle then


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skyrl.digits.architecture import build_processor

    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch executed').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path, processor: Path, template: str) -> None:
    from skyrl.policy.encode import PromptEncoder

    folder = shutil.copytree(processor, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="chat template"):
        PromptEncoder.from_pretrained(str(folder)).encode(groups_of(1)[0].prompt)


# ---------------------------------------------------------------- data


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)).save(file, format=kind)
    return file.getvalue()


def refused_rows(path: Path) -> bool:
    """Reads all; True if it or a row was refused."""
    try:
        found = FilePrompts(path, Reading(verifier="exact"))
        for row in range(len(found)):
            found[row]  # decodes its pictures
    except DataError as error:
        assert str(path) in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_fuzzed_rows_with_pictures_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Footer, pages, texts, JSON and pictures: whatever bytes are changed, an error names the file."""
    pictures = [picture(name) for name in ("PNG", "JPEG", "WEBP")]
    rows = [{"question": f"{row}?", "answer": str(row), "facts": '{"grid": [[1]]}'} for row in range(12)]
    whole, path = tmp_path / f"whole.{kind}", tmp_path / f"broken.{kind}"
    if kind == "parquet":
        table = pa.Table.from_pylist([each | {"images": [pictures[row % 3]]} for row, each in enumerate(rows)])
        pq.write_table(table, whole, row_group_size=4)
    else:
        whole.write_text("\n".join(json.dumps(each) for each in rows))
    content, chance, refused = whole.read_bytes(), random.Random(0), 0
    for _ in range(200):
        broken = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(4, len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        refused += refused_rows(path)
    assert refused > 50 and not refused_rows(whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_fuzzed_pictures_are_decoded_or_refused(kind: str) -> None:
    chance, refused = random.Random(0), 0
    for _ in range(300):
        content = fuzzed(picture(kind), chance)
        for look in (decode_picture, picture_outline):
            try:
                look(content, "here")
            except DataError as error:
                refused += 1
                assert str(error).startswith("here: ")
    assert refused > 50


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_in_pictures_are_not_unpacked_without_end(name: bytes) -> None:
    text = zlib.compress(bytes(2**25), 9)
    body = name + (b"k\0\1\0\0\0" if name == b"iTXt" else b"k\0\0") + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    png = picture("PNG")
    tracemalloc.start()
    with pytest.raises(DataError, match="Decompressed data too large"):
        decode_picture(png[:33] + chunk + png[33:], "here")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
