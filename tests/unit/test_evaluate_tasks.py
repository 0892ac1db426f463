"""Benchmarks in the formats of their official files, made by hand: what is asked, and which answers are right."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from skyrl.evaluation.tasks.files import files_in
from skyrl.evaluation.tasks.graders import GRADERS
from skyrl.evaluation.tasks.prompts import TaskPrompts, located, open_tasks
from skyrl.evaluation.tasks.table import TASKS
from skyrl.records import ConfigError, DataError, Prompt
from skyrl.rewards.verifiers import load_verifier, verifier_reference
from skyrl.settings import AnswerPlace, Config, EvaluateConfig


def png(shade: int, side: int = 4) -> dict[str, Any]:
    """A picture as ``datasets`` writes it."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def shades(prompt: Prompt) -> list[int]:
    return [int(picture[0, 0, 0]) for picture in prompt.images]


def opened(
    folder: Path, name: str, file: str, rows: list[dict[str, Any]], place: AnswerPlace | None = None
) -> TaskPrompts:
    """The task's prompts from a folder with one file of these rows."""
    path = folder / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return TaskPrompts(name, files_in(folder / name, TASKS[name].files), place, None)


def score(prompt: Prompt, answer: str) -> float:
    return float(load_verifier(verifier_reference(prompt.verifier, GRADERS))(answer, prompt.answer))


def check(prompt: Prompt, right: list[str], wrong: list[str]) -> None:
    assert [(answer, score(prompt, answer)) for answer in right] == [(answer, 1.0) for answer in right]
    assert [(answer, score(prompt, answer)) for answer in wrong] == [(answer, 0.0) for answer in wrong]


# ---------------------------------------------------------------- mathematics


def test_aime_in_the_columns_of_its_three_files(tmp_path: Path) -> None:
    rows = [{"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "…", "Answer": 33}]
    one = opened(tmp_path / "a", "aime24", "aime_2024_problems.parquet", rows)[0]
    assert (one.id, one.answer, one.verifier) == ("aime24/2024-II-4", "33", "math")
    assert one.question == "Find $m+n$.\n\nReason step by step, and put the final answer alone in \\boxed{}."
    check(one, ["33", "033", "33."], ["34", "3", ""])
    rows = [{"id": 60, "problem": "Q", "solution": "…", "answer": "025", "url": "…", "year": "2024"}]
    assert opened(tmp_path / "b", "aime24", "train-00000-of-00001.parquet", rows)[0].answer == "25"
    rows = [{"id": 60, "problem": "Q", "solution": "\\boxed{204}", "url": "…"}]
    assert opened(tmp_path / "c", "aime24", "test.jsonl", rows)[0].answer == "204"
    with pytest.raises(DataError, match=r"row 0, column 'Answer': got '1000'; allowed: a whole number from 0 to 999"):
        opened(tmp_path / "d", "aime24", "x.jsonl", [{"ID": "1", "Problem": "Q", "Answer": 1000}])


def test_math500(tmp_path: Path) -> None:
    row = {
        "problem": "Convert $(0,3)$ to polar coordinates.",
        "solution": "…",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    prompts = opened(tmp_path, "math500", "test.jsonl", [row, row | {"answer": "p - q", "unique_id": "2"}])
    assert (prompts[0].id, prompts[0].kind) == ("math500/test/precalculus/807.json", "Precalculus")
    check(prompts[0], ["(3, \\frac{\\pi}{2})", "(3, \\pi/2)"], ["(3, \\pi)", "3", "(\\frac{\\pi}{2}, 3)"])
    check(prompts[1], ["p-q", "-q+p"], ["q-p", "p"])


def test_gsm8k(tmp_path: Path) -> None:
    rows = [
        {"question": "How much?", "answer": "Janet sells <<16-3-4=9>>9.\n#### 18"},
        {"question": "And?", "answer": "It is\n#### -1,234,500"},
    ]
    prompts = opened(tmp_path, "gsm8k", "main/test-00000-of-00001.parquet", rows)
    assert [prompt.id for prompt in (prompts[0], prompts[1])] == ["gsm8k/0", "gsm8k/1"] == prompts.ids()
    check(prompts[0], ["18", "$18", "18.0", "\\$18", "18 dollars"], ["180", "9", "18 000", "1.8", ""])
    check(prompts[1], ["-1234500", "-1,234,500"], ["1234500", "-1"])
    with pytest.raises(DataError, match=r"test.jsonl, row 0, column 'answer': nothing follows ####"):
        opened(tmp_path / "b", "gsm8k", "test.jsonl", [{"question": "Q", "answer": "18"}])


def test_olympiadbench(tmp_path: Path) -> None:
    row = {
        "id": 1606,
        "question": "Find $x$ in <image_1>.",
        "solution": ["…"],
        "final_answer": ["$\\frac{1}{2}$"],
        "context": None,
        "image_1": png(7),
        "image_2": None,
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
    }
    near = row | {"id": 2, "final_answer": ["3.14"], "error": "1e-2", "unit": "m", "context": "A stone falls."}
    both = row | {"id": 3, "final_answer": ["$1$,$-2$"], "is_multiple_answer": True}
    pair = row | {"id": 4, "final_answer": ["$1$,$-2$"], "is_multiple_answer": True, "error": "0.1"}
    file = "OE_MM_maths_en_COMP/OE_MM_maths_en_COMP.parquet"
    prompts = opened(tmp_path, "olympiadbench", file, [row, near, both, pair])
    first = prompts[0]
    assert (first.id, first.kind) == ("olympiadbench/OE_MM_maths_en_COMP/1606", "OE_MM_maths_en_COMP")
    assert first.question.startswith("Find $x$ in image 1.") and shades(first) == [7]
    assert first.turns[0].parts[:2] == ("Find $x$ in ", None)
    check(first, ["1/2", "0.5", "\\frac{1}{2}"], ["2", "1"])
    assert prompts[1].question.startswith(
        "A stone falls.\n\nFind $x$ in image 1.\n\nGive the number alone; its unit is m."
    )
    check(prompts[1], ["3.14", "3.15", "3.13"], ["3.16", "3.12", "314", "x"])
    check(prompts[2], ["1, -2", "-2, 1"], ["1", "-2", "1, 2"])
    check(prompts[3], ["1, -2", "-2.05, 1.05"], ["1", "1, -2, 0", "1, 2"])
    with pytest.raises(DataError, match="column 'final_answer': got None; allowed: a list of texts"):
        opened(tmp_path / "b", "olympiadbench", file, [row | {"final_answer": None}])


# ---------------------------------------------------------------- pictures


def test_mmmu_has_pictures_in_question_and_options(tmp_path: Path) -> None:
    row = {
        "id": "validation_Art_Theory_3",
        "question": "Which of <image 1> and <image 2> is older? See <image 1>.",
        "options": "['<image 2>', 'both', \"it's neither\"]",
        "explanation": "",
        **{f"image_{number}": png(number) if number <= 3 else None for number in range(1, 8)},
        "img_type": "['Paintings']",
        "answer": "C",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Art Theory",
    }
    number = row | {
        "id": "validation_Math_1",
        "question": "How many?",
        "question_type": "open",
        "answer": "['24/7', '3.429']",
    }
    word = number | {"id": "validation_Math_2", "answer": "Oxygen"}
    tiny = number | {"id": "validation_Math_3", "answer": "0.001"}
    whole = number | {"id": "validation_Math_4", "answer": "200"}
    prompts = opened(tmp_path, "mmmu", "Art_Theory/validation-00000-of-00001.parquet", [row, number, word, tiny, whole])
    first = prompts[0]
    assert (first.kind, shades(first)) == ("Art_Theory", [3, 1, 2])  # the third is mentioned nowhere, so it comes first
    head, *parts = first.turns[0].parts
    assert first.turns[0].role == "user" and head is None and parts[:4] == ["Which of ", None, " and ", None]
    assert parts[4] is not None and parts[4].startswith(
        " is older? See image 1.\n\nA. image 2\nB. both\nC. it's neither\n\n"
    )
    assert len(parts) == 5 and "Answer with the letter of one option." in parts[4]
    check(first, ["C", "(C)", "it's neither", "C. it's neither"], ["A", "both", "A or C", "B, C", ""])
    assert prompts[1].turns == () and shades(prompts[1]) == [1, 2, 3]
    check(prompts[1], ["24/7", "3.43", "3.429"], ["3.5", "24", ""])
    check(prompts[2], ["oxygen", " Oxygen "], ["hydrogen", "oxygen or hydrogen"])
    check(prompts[3], ["0.001", "1e-3"], ["0", "0.002"])
    check(prompts[4], ["200", "200.0"], ["201", "20"])
    with pytest.raises(DataError, match=r"column 'options': got '\[oops'; allowed: a list"):
        opened(tmp_path / "b", "mmmu", "validation-0.parquet", [row | {"options": "[oops"}])
    with pytest.raises(DataError, match=r"row 0: got the truth 'D' and 3 options"):
        opened(tmp_path / "c", "mmmu", "validation-0.parquet", [row | {"answer": "D"}])


def test_mathvista(tmp_path: Path) -> None:
    row = {
        "pid": "1",
        "question": "When a spring does work …?",
        "image": "images/1.jpg",
        "decoded_image": png(9),
        "choices": None,
        "unit": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"task": "textbook question answering", "category": "math-targeted-vqa"},
        "query": "Hint: …",
    }
    whole = row | {"pid": "2", "answer": "12", "answer_type": "integer", "precision": None, "unit": "m"}
    choice = row | {
        "pid": "3",
        "question_type": "multi_choice",
        "answer_type": "text",
        "answer": "145°",
        "choices": ["135°", "140°", "145°"],
    }
    several = row | {"pid": "4", "answer_type": "list", "answer": "[2007, 2008]"}
    prompts = opened(
        tmp_path, "mathvista", "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", [row, whole, choice, several]
    )
    assert (prompts[0].kind, shades(prompts[0])) == ("textbook question answering", [9])
    assert "Answer with a number of 1 digits after the point." in prompts[0].question
    check(prompts[0], ["1.2", "1.24", "1.20"], ["1.3", "12", ""])
    assert "(Unit: m)" in prompts[1].question and "a whole number" in prompts[1].question
    check(prompts[1], ["12", "12.0"], ["12.4", "120", "1 2"])
    check(prompts[2], ["C", "145°"], ["B", "140°", "A, B or C"])
    check(prompts[3], ["[2007, 2008]", "2007, 2008"], ["[2008, 2007]", "2007", "[2007, 2008, 2009]"])
    with pytest.raises(DataError, match="column 'answer': got '145°'; allowed: one of the choices"):
        opened(tmp_path / "b", "mathvista", "testmini-0.parquet", [choice | {"choices": ["1", "2"]}])


def test_mathvision(tmp_path: Path) -> None:
    row = {
        "id": "4",
        "question": "Which number should be written?\n<image1>",
        "options": ["A", "B", "C"],
        "image": "images/4.jpg",
        "decoded_image": png(5),
        "answer": "B",
        "solution": None,
        "level": 2,
        "subject": "analytic geometry",
    }
    free = row | {"id": "5", "options": [], "answer": "\\frac{8}{3}", "question": "<image1> and <image2>?"}
    prompts = opened(tmp_path, "mathvision", "data/test-00000-of-00001-3532b8d3f1b4047a.parquet", [row, free])
    assert prompts[0].turns[0].parts[:2] == ("Which number should be written?\n", None)
    check(prompts[0], ["B", "b", "(B)"], ["A", "C", ""])
    # There is one picture only: the other mark is a word.
    assert prompts[1].turns[0].parts[0] is None and str(prompts[1].turns[0].parts[1]).startswith(" and image 2?")
    check(prompts[1], ["8/3", "\\frac83"], ["3/8", "2.67"])


def test_pope(tmp_path: Path) -> None:
    row = {
        "id": "0",
        "question_id": "1",
        "question": "Is there a snowboard in the image?",
        "answer": "yes",
        "image_source": "COCO_val2014_000000310196",
        "image": png(3),
        "category": "adversarial",
    }
    rows = [row, row | {"category": "random", "answer": "no"}]
    prompts = opened(tmp_path, "pope", "data/test-00000-of-00003.parquet", rows)
    assert prompts.ids() == ["pope/adversarial/1", "pope/random/1"] and prompts[0].kind == "adversarial"
    assert prompts[0].turns == () and shades(prompts[0]) == [3]
    check(prompts[0], ["yes", "Yes.", "Yes, there is one."], ["no", "yes and no", "I say yes", "", "yesterday"])
    check(prompts[1], ["No", "no, there is not"], ["yes", "not", "No or yes"])


# ---------------------------------------------------------------- programs

LCB = {
    "question_title": "Add",
    "question_content": "Add two numbers.",
    "platform": "atcoder",
    "question_id": "abc1",
    "contest_id": "abc",
    "contest_date": "2024-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
HIDDEN = json.dumps([{"input": "10 5\n", "output": "15\n", "testtype": "stdin"}])


def packed(content: Any) -> str:
    """As the official files hold their hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def test_livecodebench_from_stdin(tmp_path: Path) -> None:
    rows = [LCB | {"private_test_cases": packed(HIDDEN)}, LCB | {"private_test_cases": HIDDEN, "question_id": "2"}]
    prompts = opened(tmp_path, "livecodebench", "test6.jsonl", rows)
    assert prompts[0].answer == prompts[1].answer and "prints the answer" in prompts[0].question
    assert [case["output"] for case in json.loads(prompts[0].answer)["stdin"]] == ["3\n", "15\n"]
    check(
        prompts[0],
        ["Here:\n```python\nprint(sum(map(int, input().split())))\n```"],
        ["```python\nprint(3)\n```", "```python\nprint(int(input()))\n```", "I can't."],
    )


def test_livecodebench_with_a_function(tmp_path: Path) -> None:
    public = [{"input": '[1, 2]\n"ab"', "output": "[3, 2]", "testtype": "functional"}]
    row = LCB | {
        "starter_code": "class Solution:\n    def both(self, a: List[int], b: str) -> List[int]:\n        ",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(json.dumps([{"input": '[]\n""', "output": "[0, 0]", "testtype": "functional"}])),
        "metadata": '{"func_name": "both"}',
    }
    prompt = opened(tmp_path, "livecodebench", "test.jsonl", [row])[0]
    assert "Begin with this:\n```python\nclass Solution:" in prompt.question
    body = "class Solution:\n    def both(self, a: List[int], b: str) -> List[int]:\n        return {}\n"
    check(
        prompt,
        [
            f"```python\n{body.format('[reduce(operator.add, a, 0), len(b)]')}```",
            f"```python\n{body.format('(sum(a), len(b))')}```",
        ],
        [f"```python\n{body.format('[3, 2]')}```", "```python\ndef other(a, b): return [3, 2]\n```"],
    )


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('unpickled').touch()",)


@pytest.mark.parametrize("content", [_Runs(), [HIDDEN], {"a": HIDDEN}, 3])
def test_hidden_tests_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"row 0, column 'private_test_cases': ValueError: the pickle"):
        opened(tmp_path, "livecodebench", "test.jsonl", [LCB | {"private_test_cases": packed(content)}])
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("stored", ["!!", base64.b64encode(b"no zlib").decode(), "[1]", packed("no JSON")])
def test_broken_hidden_tests_are_refused(tmp_path: Path, stored: str) -> None:
    with pytest.raises(DataError, match="column 'private_test_cases'"):
        opened(tmp_path, "livecodebench", "test.jsonl", [LCB | {"private_test_cases": stored}])


def test_humaneval(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/53",
        "prompt": 'def helper(x: int):\n    return x + 1\n\n\ndef add(x: int, y: int):\n    """Add."""\n',
        "canonical_solution": "    return x + y\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(0, helper(0)) == 1\n    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    }
    prompt = opened(tmp_path, "humaneval", "HumanEval.jsonl.gz", [row])[0]
    assert prompt.id == "humaneval/53" and "Complete this Python function" in prompt.question
    whole = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    check(
        prompt,
        [whole, "```python\ndef add(x, y): return x + y\n```"],
        ["```python\ndef add(x, y): return 1\n```", "x + y"],
    )


def test_mbpp_in_both_layouts(tmp_path: Path) -> None:
    row = {
        "task_id": 11,
        "text": "Write a function to find the larger root.",
        "code": "…",
        "test_list": ["assert root(4) == math.sqrt(4)", "assert root(9) == 3"],
        "test_setup_code": "import math",
        "challenge_test_list": [],
    }
    prompt = opened(tmp_path / "full", "mbpp", "full/test-00000-of-00001.parquet", [row])[0]
    assert (
        "It must pass these tests:\n```python\nassert root(4) == math.sqrt(4)\nassert root(9) == 3\n```"
        in prompt.question
    )
    check(prompt, ["```python\ndef root(x): return x ** 0.5\n```"], ["```python\ndef root(x): return 2\n```"])
    sanitized = {"source_file": "…", "task_id": 2, "prompt": "Write it.", "code": "…", "test_imports": ["import math"]}
    rows = [sanitized | {"test_list": row["test_list"]}]
    again = opened(tmp_path / "sanitized", "mbpp", "sanitized/test-00000-of-00001.parquet", rows)[0]
    assert again.question.startswith("Write it.") and again.answer == prompt.answer
    # A name that Python has too, and objects of the program's own class.
    own = row | {"test_list": ["assert sum(1, 2) == 12"], "test_setup_code": ""}
    made = row | {
        "task_id": 3,
        "test_list": ["assert root(pair) == 2"],
        "test_setup_code": "pair = Pair(2)\npair.b = 3",
    }
    prompts = opened(tmp_path / "c", "mbpp", "full/test-0.parquet", [own, made])
    check(prompts[0], ["```python\ndef sum(a, b): return 10 * a + b\n```"], ["```python\ndef sum(a, b): return a\n```"])
    pair = "class Pair:\n    def __init__(self, a): self.a = a\n"
    check(prompts[1], [f"{pair}def root(p): return p.a"], [f"{pair}def root(p): return p.b", "def root(p): return 2"])


def test_ifeval(tmp_path: Path) -> None:
    row = {
        "key": 1000,
        "prompt": "Write about cats without any commas, in at least 5 words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 5, "relation": "at least"}],
    }
    prompt = opened(tmp_path, "ifeval", "ifeval_input_data.jsonl", [row])[0]
    assert prompt.question == row["prompt"]  # nothing is added: the instructions are what is asked
    check(prompt, ["Cats sleep a lot every day"], ["Cats, they sleep a lot every day", "Cats sleep"])
    with pytest.raises(DataError, match="column 'kwargs': got 1 for 2 instructions"):
        opened(tmp_path / "b", "ifeval", "ifeval_input_data.jsonl", [row | {"kwargs": [{}]}])


# ---------------------------------------------------------------- files, places, settings


def test_the_question_asks_for_the_place_where_the_answer_is_looked_for(tmp_path: Path) -> None:
    rows = [{"question": "How much?", "answer": "#### 18"}]
    said = {place: opened(tmp_path, "gsm8k", "test.jsonl", rows, place) for place in AnswerPlace}
    assert all(prompts.place is place for place, prompts in said.items())
    assert "<answer>" in said[AnswerPlace.tags][0].question and "####" in said[AnswerPlace.hashes][0].question
    row = {"key": 1, "prompt": "Hi", "instruction_id_list": [], "kwargs": []}
    own = opened(tmp_path, "ifeval", "input_data.jsonl", [row], AnswerPlace.boxed)
    assert own.place is AnswerPlace.whole and own[0].question == "Hi"


def test_rows_are_named_in_errors(tmp_path: Path) -> None:
    row = {"problem": "Q", "answer": "1", "subject": "Algebra", "unique_id": "a"}
    with pytest.raises(
        DataError, match=r"math500/test.jsonl, row 1: id 'a' is also that of .*row 0; allowed: unique ids"
    ):
        opened(tmp_path, "math500", "test.jsonl", [row, row])
    with pytest.raises(DataError, match=r"row 1: no text in column 'answer'; got ' '"):
        opened(tmp_path, "math500", "test.jsonl", [row, row | {"unique_id": "b", "answer": " "}])
    with pytest.raises(DataError, match=r"row 0: no text in column 'unique_id'; columns are problem"):
        opened(tmp_path, "math500", "test.jsonl", [{"problem": "Q"}])
    with pytest.raises(DataError, match=r"have 0 rows; allowed: 1 or more"):
        opened(tmp_path, "math500", "test.jsonl", [])
    (tmp_path / "math500" / "test.jsonl").write_text('{"problem": "Q"\n')
    with pytest.raises(DataError, match=r"test.jsonl: can't be read: Expecting"):
        TaskPrompts("math500", [tmp_path / "math500" / "test.jsonl"], None, None)
    with pytest.raises(DataError, match=r"math500: holds none; looked for aime_2024\*.parquet or"):
        files_in(tmp_path / "math500", ("aime_2024*.parquet", "*.parquet"))


def settings(**own: Any) -> Config:
    return Config(evaluate=EvaluateConfig(**own))


def test_where_a_task_lies(tmp_path: Path) -> None:
    file = tmp_path / "data" / "gsm8k" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"question": str(i), "answer": f"#### {i}"}) + "\n" for i in range(3)))
    cfg = located(settings(tasks=["gsm8k", "training"], data_dir=str(tmp_path / "data"), limit=2))
    assert cfg.evaluate.tasks == [f"gsm8k:{file.parent}", "training"]
    found = open_tasks(cfg)
    assert list(found) == ["gsm8k", "training"] and len(found["gsm8k"]) == 2
    assert located(settings(tasks=[f"gsm8k:{file}"])).evaluate.tasks == [f"gsm8k:{file}"]
    with pytest.raises(ConfigError, match="there is no task 'gsm9k'; allowed: training, aime24"):
        located(settings(tasks=["gsm9k"]))
    with pytest.raises(ConfigError, match="gsm8k stands in it 2 times"):
        located(settings(tasks=["gsm8k", f"gsm8k:{file}"]))
    with pytest.raises(ConfigError, match=r"evaluate.tasks=\[\]: nothing to ask"):
        located(settings())
    with pytest.raises(DataError, match=r"gsm8k:/nowhere/at/all: no such file or folder"):
        located(settings(tasks=["gsm8k:/nowhere/at/all"]))
    with pytest.raises(DataError, match=r"data/math500: does not exist; looked for test.jsonl"):
        open_tasks(located(settings(tasks=["math500"], data_dir=str(tmp_path / "data"))))


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"openai/gsm8k could not be had .* give its folder: evaluate.data_dir=…"):
        located(settings(tasks=["gsm8k"]))


def test_pictures_come_from_the_right_row_group(tmp_path: Path) -> None:
    row = {"question": "?", "answer": "yes", "category": "random"}
    rows = [row | {"question_id": str(i), "image": png(10 * i)} for i in range(5)]
    prompts = opened(tmp_path, "pope", "test-00000-of-00001.parquet", rows)  # groups of 2, 2 and 1 rows
    assert [shades(prompts[i]) for i in (4, 0, 3, 1, 2)] == [[40], [0], [30], [10], [20]]
    copy = pickle.loads(pickle.dumps(prompts))
    assert shades(copy[3]) == [30] and copy.digest == prompts.digest


def test_every_task_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert [name for name in TASKS if f"`{name}`" not in text] == []
    assert [task.hub for task in TASKS.values() if task.hub not in text] == []
