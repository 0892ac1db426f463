"""The prompt pool: what a group says about its prompt, the file, the choice of rows, and the pass without Ray."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from skyrl.data.files import FilePrompts
from skyrl.data.parquet import write_parquet
from skyrl.data.pool import PoolRow, pool_rows, write_pool
from skyrl.digits.scenes import DigitScenes
from skyrl.digits.settings import PICTURE_KINDS
from skyrl.filter_prompts import IN_FLIGHT, STEP, print_summary, roll_out
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, DataConfig
from skyrl.system import System

RATES = (0.0, 0.25, None, 1.0, 0.5, 0.75, 1.0)
DATA = DataConfig()


def scenes(size=9, seed=0):
    return DigitScenes("train", size, 0.15, seed)


def limits(low, high):
    return DATA.model_copy(update={"pool_min": low, "pool_max": high})


def rows_of(rates=RATES):
    return [PoolRow(row, f"train/{row}", "sum", 4, 0, rate, 1.0, None) for row, rate in enumerate(rates)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "pool.parquet"
    write_pool(file, rows_of(), DATA, scenes(), policy="/m", samples_per_prompt=4, temperature=1.0, seed=3)
    return file


def rewrite(path, change):
    """Replace the table by ``change(table)``, keeping the metadata unless it changes them."""
    pq.write_table(change(pq.read_table(path)), path)


def sample(index, rule, total=0.0, claims=0, false_claims=0):
    ids, logprobs = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
    made = Sample(index, ids, logprobs, "", False, 0, claims=claims, false_claims=false_claims)
    if rule is None:
        made.error = "timed out"
    else:
        made.reward = RewardParts(rule, 0.0, None, total)
    return made


def group(samples, pictured=True, facts=True):
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    prompt = Prompt("p", "?", (picture,) if pictured else (), "", "exact", "sum", {"grid": [[1]]} if facts else {})
    return SampleGroup(prompt, np.zeros(1, dtype=np.int32), samples, checkable=pictured and facts)


# ---------------------------------------------------------------- one prompt


def test_a_row_by_hand():
    scored = [sample(0, 1.0, 2.0, 3, 1), sample(1, 0.5, 1.0, 2, 0), sample(2, None, 0, 4, 4), sample(3, 1.0, 0.0)]
    # Half a point is not right; the failed one counts in no mean of rewards, but its claims were made.
    want = PoolRow(7, "p", "sum", 4, 1, 2 / 3, 1.0, 0.5)
    assert PoolRow.of(7, group(scored)) == want
    assert PoolRow.of(7, group(scored, pictured=False)) == dataclasses.replace(want, hallucination_rate=None)
    assert PoolRow.of(7, group(scored, facts=False)) == dataclasses.replace(want, hallucination_rate=None)
    assert PoolRow.of(0, group([sample(0, None), sample(1, None)])) == PoolRow(0, "p", "sum", 2, 2, None, None, 0.0)


# ---------------------------------------------------------------- the file


def test_the_file_has_the_columns_and_how_it_was_made(path, tmp_path):
    table = pq.read_table(path)
    kinds = {"row": "int64", "samples": "int64", "errors": "int64", "id": "string", "kind": "string"}
    assert {field.name: str(field.type) for field in table.schema} == kinds | dict.fromkeys(
        ("pass_rate", "mean_reward", "hallucination_rate"), "double"
    )
    assert table.to_pylist() == [dataclasses.asdict(row) for row in rows_of()]
    assert table.column("pass_rate").null_count == 1
    assert json.loads(table.schema.metadata[b"skyrl"]) == {
        **{"rows": 9, "data": {"source": "digits", "seed": 0, "text_share": 0.15, "kinds": list(PICTURE_KINDS)}},
        **{"policy": "/m", "samples_per_prompt": 4, "temperature": 1.0, "seed": 3},
    }
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, tmp_path, monkeypatch):
    before = path.read_bytes()

    def cut_off(writer, table):
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_pool(path, rows_of((0.5,)), DATA, scenes())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("low", "high", "rows"), [(0.0, 1.0, [1, 4, 5]), (0.25, 0.75, [4]), (0.2, 0.75, [1, 4]), (0.5, 1.0, [5])]
)
def test_the_limits_are_strict_and_what_was_not_scored_is_left_out(path, low, high, rows):
    rewrite(path, lambda table: table.take(list(reversed(range(7)))))  # the order of the file does not matter
    chosen = pool_rows(path, limits(low, high), scenes())
    assert chosen.tolist() == rows and chosen.dtype == np.int64


def test_an_empty_choice_names_the_limits_and_the_distribution(path):
    message = (
        "no prompt has a pass rate above 0.8 and below 0.9: of 7 prompts 1 are always wrong, 2 always right, 3 in "
        "between, 1 were not scored; quartiles of the pass rate 0.31, 0.62, 0.94"
    )
    with pytest.raises(DataError) as caught:
        pool_rows(path, limits(0.8, 0.9), scenes())
    assert message in str(caught.value)


def without_metadata(table):
    return table.replace_schema_metadata(None)


def with_column(name, values):
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["pass_rate"]), "column 'pass_rate' is missing; got row, id"),
        (with_column("pass_rate", ["1"] * 7), "column 'pass_rate': got type string; allowed: float or integer"),
        (
            with_column("row", [0, 1, 2, 3, 4, 5, 5]),
            "column 'row' has repeats or is out of range; allowed: each of 0 … 8",
        ),
        (with_column("row", [0, 1, 2, 3, 4, 5, 9]), "column 'row' has repeats or is out of range"),
        (with_column("row", [0, 1, 2, 3, 4, 5, None]), "row 6, column 'row': got null; allowed: a number"),
        (with_column("row", [0.0, 1, 2, 3, 4, 5, 6.5]), "column 'row': got type double; allowed: integer"),
        (with_column("id", ["train/0"] * 7), "got 'train/0', which is also that of row 0; allowed: unique ids"),
        (
            with_column("id", [f"train/{row}" for row in (1, 0, 2, 3, 4, 5, 6)]),
            "row 0 is 'train/1', in the training data it is 'train/0'",
        ),
        (without_metadata, "not a prompt pool; python -m skyrl.filter_prompts writes one"),
    ],
)
def test_a_broken_file_is_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(DataError) as caught:
        pool_rows(path, DATA, scenes())
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_another_data_set_is_refused(path, tmp_path):
    with pytest.raises(DataError, match=r"made from other data \(9 rows of .*; this run: 10 rows of "):
        pool_rows(path, DATA, scenes(10))
    with pytest.raises(DataError, match=r"made from other data \(.*'seed': 0.*this run: .*'seed': 1"):
        pool_rows(path, DATA, scenes(seed=1))
    with pytest.raises(DataError, match=r"made from other data .*'files'"):
        pool_rows(path, DataConfig(source="files"), scenes())
    with pytest.raises(DataError, match=r"'kinds': .*this run: 9 rows of {'source': 'digits'}"):
        pool_rows(path, DATA, [scenes()[row] for row in range(9)])  # the same ids, but nothing says what made them
    (tmp_path / "text").write_text("no parquet")
    for name in ("text", "nothing"):
        with pytest.raises(DataError, match=f"{name}: not a readable Parquet file"):
            pool_rows(tmp_path / name, DATA, scenes())


def test_every_id_of_a_parquet_data_set_is_compared(tmp_path):
    def prompts(ids):
        file = tmp_path / "data.parquet"
        write_parquet(file, [Prompt(name, "1 + 1?", (), "2", "numeric") for name in ids])
        return FilePrompts(file)

    ids = [f"q{i}" for i in range(600)]
    data, file = DataConfig(source="files"), tmp_path / "pool.parquet"
    pooled = [PoolRow(i, name, "k", 2, 0, 0.5, 0.0, None) for i, name in enumerate(ids)]
    write_pool(file, pooled, data, prompts(ids))
    assert len(pool_rows(file, data, prompts(ids))) == 600
    ids[433] = "other"
    with pytest.raises(DataError, match="row 433 is 'q433', in the training data it is 'other'"):
        pool_rows(file, data, prompts(ids))


# ---------------------------------------------------------------- the pass, without Ray


class FakeCrew:
    """Stands for both crews; promises are the values."""

    def __init__(self):
        self.asked, self.fetched = [], []

    def __len__(self):
        return 1

    def deal(self, function, parts, pieces=1):
        if function is Rewarder.score:
            return parts
        assert function is Sampler.generate and pieces == 1
        self.asked += parts
        return [[self.group(row, request) for row in request.rows] for request in parts]

    def group(self, row, request):
        made = group([sample(i, 1.0) for i in range(request.samples_per_prompt)])
        made.prompt = dataclasses.replace(made.prompt, id=f"train/{row}")
        return made

    def fetch(self, promises):
        self.fetched.append(len(self.asked))
        return promises


def test_the_pass_asks_in_chunks_two_at_a_time_and_keeps_the_order():
    crew, cfg = FakeCrew(), Config()
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.controller.seed = 4, 3, 8
    found = roll_out(cfg, System(crew, crew), range(10), Console(file=io.StringIO()))
    assert [request.rows for request in crew.asked] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    asked = {(one.split, one.step, one.samples_per_prompt, one.greedy, one.seed, one.blind) for one in crew.asked}
    assert asked == {("train", STEP, 3, False, 8, False)}
    assert [row.row for row in found] == list(range(10)) and {row.samples for row in found} == {3}
    assert [row.id for row in found] == [f"train/{row}" for row in range(10)]
    assert crew.fetched == [IN_FLIGHT, 3, 3]  # chunk 2 was asked for before chunk 1 was waited for


def test_the_summary_counts_and_says_how_to_go_on(tmp_path):
    shown = Console(file=io.StringIO(), width=60)
    print_summary(rows_of(), 20, tmp_path / "a long name of a pool.parquet", shown)
    text = shown.file.getvalue()
    lines = [line.split() for line in text.splitlines()]
    for row in (["always", "right", "2", "28.6%"], ["always", "wrong", "1", "14.3%"], ["effective", "3", "42.9%"]):
        assert row in lines, text
    assert ["not", "scored", "1", "14.3%"] in lines and ["all", "7"] in lines
    assert "only the first 7 of 20 training rows" in " ".join(text.split())
    assert f"python -m skyrl.launch data.pool_path={tmp_path / 'a long name of a pool.parquet'}" in text
    print_summary(rows_of((0.0, 1.0)), 2, tmp_path / "p", shown)
    assert "no prompt is effective" in shown.file.getvalue()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "skyrl.filter_prompts", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("filter.rwos=3", "filter.rwos: there is no such setting; did you mean filter.rows?"),
        ("filter.rows=0", "filter.rows=0: must be null, or a whole number, 1 or more"),
        (
            "--fast",
            "unrecognized arguments: --fast; allowed are key=value, group=option, --cfg job, --config-dir DIR and "
            "--help",
        ),
        ("filter.output=/", "filter.output=/: must be a file in a folder that can be written to"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(argument, message):
    done = run(argument)
    assert done.returncode == 2
    assert done.stderr == f"wrong settings:\n{message}\n"


def test_help_names_the_settings_and_nothing_heavy_is_imported():
    shown = run("--help")
    assert shown.returncode == 0 and "filter.output=pool.parquet" in shown.stdout and "Usage:" in shown.stdout
    heavy = (
        "import sys, skyrl.filter_prompts; print({'torch', 'ray', 'vllm', 'deepspeed', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
