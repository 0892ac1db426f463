"""Preference pairs from Parquet files: what is read, what is refused with which words, and the batches made of them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skyrl.batch.batcher import BufferService
from skyrl.batch.offline import OfflinePairs
from skyrl.data.preference_pairs import ParquetPairs, TextPair, main, write_pairs
from skyrl.records import DataError, PreferencePair, Prompt, SkyrlError
from skyrl.settings import AlgorithmConfig, BufferConfig, DataConfig, RolloutConfig
from tests.tiny_models import answer_ids, encoder, noise, picture, processor

GOOD, BAD = "<think>I see 31/41.</think><answer>9</answer>", "<think>I see 11/41.</think><answer>7</answer>"
QUESTION = "What is the sum of the digits?"
ROW: dict[str, Any] = {"question": QUESTION, "chosen": GOOD, "rejected": BAD}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def pairs(count: int) -> list[TextPair]:
    """Every other one without a picture; the margin is the row."""
    return [
        TextPair(Prompt(f"mine/{i}", QUESTION, (noise(i),) * (i % 2), "", "exact", "sum"), f"{GOOD}{i}", BAD, float(i))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    processor().save_pretrained(folder)
    return str(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = [*pairs(70), TextPair(Prompt("last", "?", (picture(0), noise(1)), "", "exact"), GOOD, BAD)]
    write_pairs(tmp_path / "p.parquet", written)
    read = ParquetPairs(tmp_path / "p.parquet")
    assert len(read) == 71
    for row in (0, 69, 70, 1):
        got, want = read[row], written[row]
        assert (got.chosen, got.rejected, got.prompt.id) == (want.chosen, want.rejected, want.prompt.id)
        assert (got.prompt.question, got.prompt.kind) == (want.prompt.question, want.prompt.kind)
        assert len(got.prompt.images) == len(want.prompt.images)
        assert all(map(np.array_equal, got.prompt.images, want.prompt.images))
        assert got.margin == want.margin or (math.isnan(got.margin) and row == 70)
    with pytest.raises(DataError, match="row 71 does not exist; it has 71 rows"):
        read[71]


def test_defaults_and_margins_of_any_number_type(tmp_path: Path) -> None:
    read = ParquetPairs(write(tmp_path / "mine.parquet", [ROW, ROW | {"margin": 3}]))
    assert (read[1].prompt.id, read[1].prompt.kind, read[1].prompt.images) == ("mine/1", "default", ())
    assert math.isnan(read[0].margin) and read[1].margin == 3.0 and isinstance(read[1].margin, float)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": None}, "row 1, column 'chosen': got null; allowed: a text"),
        ({"rejected": " "}, "row 1, column 'rejected': got ' '; allowed: a text that isn't empty"),
        ({"rejected": GOOD}, "row 1, column 'rejected': got '<think>.*which is also the chosen answer; allowed: two"),
        ({"margin": math.inf}, "row 1, column 'margin': got inf; allowed: a finite number, or null or nan"),
        ({"id": "a"}, "row 1, column 'id': got 'a', which is also that of row 0"),
        ({"question": ""}, "row 1, column 'question': got ''"),
    ],
)
def test_broken_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = ROW | {"id": "a", "margin": 1.0}
    path = write(tmp_path / "p.parquet", [good, good | {"id": "b"} | row])
    with pytest.raises(DataError, match=f"^{path}, {message}"):
        ParquetPairs(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": ["?"], "chosen": ["a"]},
            "column 'rejected' is missing; got question, chosen; needed: question, ",
        ),
        ({k: [v] for k, v in ROW.items()} | {"margin": ["1"]}, "'margin': got type string; allowed: float or integer"),
        ({k: [v] for k, v in ROW.items()} | {"image": [["a.png"]]}, "column 'image' is unknown; did you mean 'images'"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=message):
        ParquetPairs(tmp_path / "p.parquet")


def test_texts_that_the_learner_could_not_take_are_named(tmp_path: Path) -> None:
    def check(row: dict[str, Any], prompt: int | None = None, answer: int | None = None) -> None:
        ParquetPairs(write(tmp_path / "p.parquet", [ROW, ROW | row])).check_tokens(encoder(), prompt, answer)

    longest = len(answer_ids(GOOD))
    check({}, answer=longest)
    with pytest.raises(DataError, match=f"row 0, column 'chosen': got {longest} tokens; allowed: up to {longest - 1}"):
        check({}, answer=longest - 1)
    with pytest.raises(
        DataError, match=f"row 1, column 'rejected': got {longest + 2} tokens; allowed: up to {longest}"
    ):
        check({"rejected": f"{GOOD}12"}, answer=longest)
    size = len(encoder().text_ids(Prompt("x", QUESTION, (), "", "exact")))
    check({}, prompt=size)
    with pytest.raises(DataError, match=f"row 0, column 'question': got {size} tokens; allowed: up to {size - 1}"):
        check({}, prompt=size - 1)
    for token in ("<image>", "<pad>", "<end_of_utterance>"):
        with pytest.raises(DataError, match=f"row 1, column 'chosen': got the special token '{token}'"):
            check({"chosen": f"a{token}b"})
    with pytest.raises(DataError, match="the question contains the picture placeholder '<image>'"):
        check({"question": "<image>?"})


def test_a_batch_of_pairs(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(5))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=3)
    batch = OfflinePairs(data, policy_folder, RolloutConfig()).batch(7)
    assert (batch.step, batch.grpo_samples, batch.grpo_tokens, len(batch.items)) == (7, 0, 0, 6)
    rows = [int(pair.margin) for pair in batch.pairs]
    assert len(set(rows)) == 3
    assert batch.pairs == [PreferencePair(2 * k, 2 * k + 1, float(row)) for k, row in enumerate(rows)]
    for k, row in enumerate(rows):
        for item, text in ((batch.items[2 * k], f"{GOOD}{row}"), (batch.items[2 * k + 1], BAD)):
            assert (item.grpo_weight, item.replayed, item.sample.text) == (0.0, False, text)
            assert np.array_equal(item.sample.token_ids, answer_ids(text))
            assert item.sample.logprobs.shape == item.sample.token_ids.shape and np.isnan(item.sample.logprobs).all()
            assert item.prompt.id == f"mine/{row}#pair" and len(item.prompt.images) == row % 2
            # What the learner's collation compares with its own.
            assert np.array_equal(item.prompt_ids, encoder().encode(item.prompt)[0])
            assert (item.prompt_ids == encoder().image_token_id).sum() == 4 * (row % 2)


def test_a_prompt_that_its_pictures_make_too_long_is_named(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(2)[1:])
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=1)
    limit = len(encoder().text_ids(pairs(2)[0].prompt)) + 1
    offline = OfflinePairs(data, policy_folder, RolloutConfig(max_prompt_tokens=limit))
    with pytest.raises(DataError, match=rf"pair 'mine/1#pair' has a prompt of \d+ tokens .* allows {limit}"):
        offline.batch(1)
    with pytest.raises(DataError, match=r"column 'chosen': got .* tokens; allowed: up to 5"):
        OfflinePairs(data, policy_folder, RolloutConfig(max_new_tokens=5))


def test_the_service_goes_on_where_its_state_was_saved(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(5))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=2)

    def service() -> BufferService:
        return BufferService(BufferConfig(), AlgorithmConfig(), 0, data, policy_folder, RolloutConfig())

    def margins(of: BufferService, steps: range) -> list[float]:
        return [pair.margin for step in steps for pair in of.offline(step)[0].pairs]

    one, two, three = service(), service(), service()
    everything = margins(one, range(1, 6))
    assert set(everything[:5]) == {0, 1, 2, 3, 4} and len(everything) == 10
    assert margins(two, range(1, 4)) == everything[:6]
    three.load_state_dict(pickle.loads(pickle.dumps(two.state_dict())))
    assert margins(three, range(4, 6)) == everything[6:]
    assert three.offline(6)[1] == {"batch/items": 4.0, "rollout_samples": 0.0, "rollout_tokens": 0.0}

    without = BufferService(BufferConfig(), AlgorithmConfig(), 0, DataConfig(), policy_folder)
    with pytest.raises(SkyrlError, match=r"data\.pairs_path: a Parquet file of pairs; got null"):
        without.offline(1)
    with pytest.raises(DataError, match=r"a run with data\.pairs_path, this run is one without it"):
        without.load_state_dict(two.state_dict())
    with pytest.raises(DataError, match=r"a run without data\.pairs_path, this run is one with it"):
        two.load_state_dict(without.state_dict())
    with pytest.raises(SkyrlError, match=r"data.pairs_path=.* needs the policy's folder"):
        BufferService(BufferConfig(), AlgorithmConfig(), 0, data)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(5))
    assert main([str(tmp_path / "p.parquet")]) == 0
    assert "5 pairs with 2 pictures, no errors" in capsys.readouterr().out
    write(tmp_path / "q.parquet", [ROW | {"images": [b"GIF"]}])
    assert main([str(tmp_path / "q.parquet"), str(tmp_path / "p.parquet")]) == 1
    assert "row 0, column 'images', picture 0: got 3 bytes" in capsys.readouterr().err
    assert main([]) == 2


def test_fewer_pairs_than_a_step_takes_are_refused(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(2))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=3)
    with pytest.raises(DataError, match=r"has 2 pairs, but data\.pairs_per_step=3"):
        OfflinePairs(data, policy_folder, None)
