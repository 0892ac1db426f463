"""Preference pairs from Parquet files: what is read, what is refused with which words, and the batches made of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skyrl.batch.offline import OfflinePairs
from skyrl.data.preference_pairs import ParquetPairs, TextPair, main, write_pairs
from skyrl.digits.architecture import CHAT_TEMPLATE
from skyrl.records import DataError, PreferencePair, Prompt
from skyrl.settings import DataConfig, RolloutConfig
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
        assert got.margin == want.margin and got.prompt.variant == "pair"
    assert read[70].margin is None
    with pytest.raises(DataError, match="row 71 does not exist; it has 71 rows"):
        read[71]


def test_defaults_and_margins_of_any_number_type(tmp_path: Path) -> None:
    read = ParquetPairs(write(tmp_path / "mine.parquet", [ROW, ROW | {"margin": 3}]))
    assert (read[1].prompt.id, read[1].prompt.kind, read[1].prompt.images) == ("mine/1", "default", ())
    assert read[0].margin is None and read[1].margin == 3.0 and isinstance(read[1].margin, float)
    read = ParquetPairs(write(tmp_path / "nan.parquet", [ROW | {"margin": math.nan}, ROW | {"margin": -1.5}]))
    assert [read[row].margin for row in (0, 1)] == [None, -1.5]


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
    for token in ("<image>", "<pad>"):
        with pytest.raises(DataError, match=f"prompt 'p/1': the question contains the .* '{token}'"):
            check({"question": f"{token}?"})


def stopping(path: Path, template: str, stops: list[str]) -> str:
    """A copy of the policy's folder with another chat template, whose configuration names these stop tokens."""
    made = copy.deepcopy(processor())
    made.chat_template = template
    made.save_pretrained(path)
    ids = made.tokenizer.convert_tokens_to_ids(stops)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(path)


def test_answers_end_as_the_chat_template_ends_them(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<end_of_utterance>", "<global-img>\n")
    folder = stopping(tmp_path / "policy", template, ["<end_of_utterance>", "<fake_token_around_image>"])
    write_pairs(tmp_path / "p.parquet", pairs(2))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=2)
    offline = OfflinePairs(data, folder, RolloutConfig())
    end, eos, fake = processor().tokenizer.convert_tokens_to_ids(
        ["<global-img>", "<end_of_utterance>", "<fake_token_around_image>"]
    )
    for item in offline.batch(1, 0, {}).items:
        assert item.sample.token_ids.tolist() == [*answer_ids(item.sample.text, end=False), end]
    assert set(offline.encoder.stop_token_ids) == {end, eos, fake}
    for token in ("<global-img>", "<end_of_utterance>", "<fake_token_around_image>"):  # an end within is none
        for text in (f"a{token}b", f"a{token}"):
            path = write(tmp_path / "q.parquet", [ROW, ROW | {"rejected": text}])
            with pytest.raises(DataError, match=f"row 1, column 'rejected': got the special token '{token}'"):
                ParquetPairs(path).check_tokens(offline.encoder)


def test_answers_with_tags_that_the_template_writes_or_that_end_them(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    folder = stopping(tmp_path / "policy", template, ["<end_of_utterance>", "</answer>"])
    write_pairs(tmp_path / "p.parquet", [TextPair(Prompt("a", QUESTION, (), "", "exact"), GOOD, "no tags")])
    offline = OfflinePairs(
        DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=1), folder, RolloutConfig()
    )
    chosen, rejected = (item.sample.token_ids.tolist() for item in offline.batch(1, 0, {}).items)
    assert chosen == answer_ids(GOOD.removeprefix("<think>"), end=False).tolist()
    assert rejected == answer_ids("no tags").tolist()
    path = write(tmp_path / "q.parquet", [ROW | {"chosen": f"{GOOD} and more"}])
    with pytest.raises(DataError, match="row 0, column 'chosen': got the special token '</answer>'"):
        ParquetPairs(path).check_tokens(offline.encoder)


def test_variables_of_the_chat_template(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant>{{ mood }}{% endif %}")
    folder = stopping(tmp_path / "policy", template, ["<end_of_utterance>"])
    write_pairs(tmp_path / "p.parquet", pairs(1))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=1)
    ids = OfflinePairs(data, folder, RolloutConfig(), {"mood": "7"}).batch(1, 0, {}).items[0].prompt_ids
    assert ids.tolist() == [*encoder().encode(pairs(1)[0].prompt)[0], processor().tokenizer.convert_tokens_to_ids("7")]


def test_a_batch_of_pairs(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(5))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=3)
    batch = OfflinePairs(data, policy_folder, RolloutConfig()).batch(7, 4, {"grpo": 0.0, "mpo": 0.5})
    assert (batch.step, batch.version, batch.weights) == (7, 4, {"grpo": 0.0, "mpo": 0.5})
    assert (batch.grpo_samples, batch.grpo_tokens, len(batch.items)) == (0, 0, 6)
    rows = [int(pair.margin) for pair in batch.pairs]
    assert len(set(rows)) == 3
    assert batch.pairs == [PreferencePair(2 * k, 2 * k + 1, float(row)) for k, row in enumerate(rows)]
    for k, row in enumerate(rows):
        for item, text in ((batch.items[2 * k], f"{GOOD}{row}"), (batch.items[2 * k + 1], BAD)):
            assert (item.grpo_weight, batch.off_policy(item), item.sample.text) == (0.0, False, text)
            assert np.array_equal(item.sample.token_ids, answer_ids(text))
            assert item.sample.logprobs is None and item.sample.mask.shape == item.sample.token_ids.shape
            assert item.sample.mask.all() and not item.sample.truncated
            assert item.prompt.key == (f"mine/{row}", "pair") and len(item.prompt.images) == row % 2
            # What the learner's collation compares with its own.
            assert np.array_equal(item.prompt_ids, encoder().encode(item.prompt)[0])
            assert (item.prompt_ids == encoder().image_token_id).sum() == 4 * (row % 2)


def test_a_prompt_that_its_pictures_make_too_long_is_named(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(2)[1:])
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=1)
    limit = len(encoder().text_ids(pairs(2)[0].prompt)) + 1
    offline = OfflinePairs(data, policy_folder, RolloutConfig(max_prompt_tokens=limit))
    with pytest.raises(DataError, match=rf"pair 'mine/1' has a prompt of \d+ tokens .* allows {limit}"):
        offline.batch(1, 0, {})
    with pytest.raises(DataError, match=r"column 'chosen': got .* tokens; allowed: up to 5"):
        OfflinePairs(data, policy_folder, RolloutConfig(max_new_tokens=5))


def test_the_pairs_go_on_where_their_state_was_saved(tmp_path: Path, policy_folder: str) -> None:
    write_pairs(tmp_path / "p.parquet", pairs(5))
    data = DataConfig(pairs_path=str(tmp_path / "p.parquet"), pairs_per_step=2)

    def margins(of: OfflinePairs, steps: range) -> list[float | None]:
        return [pair.margin for step in steps for pair in of.batch(step, step - 1, {}).pairs]

    one, two, three = (OfflinePairs(data, policy_folder, RolloutConfig()) for _ in range(3))
    everything = margins(one, range(1, 6))
    assert set(everything[:5]) == {0, 1, 2, 3, 4} and len(everything) == 10
    assert margins(two, range(1, 4)) == everything[:6]
    three.stream.load_state_dict(pickle.loads(pickle.dumps(two.stream.state_dict())))
    assert margins(three, range(4, 6)) == everything[6:]
    other = OfflinePairs(data.model_copy(update={"seed": 3}), policy_folder, RolloutConfig())
    with pytest.raises(DataError, match="seed"):
        other.stream.load_state_dict(two.stream.state_dict())


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
        OfflinePairs(data, policy_folder, RolloutConfig())
