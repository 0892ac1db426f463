"""How fast weights travel from the learner into vLLM on one CPU host, against a memcpy of as many bytes.

``python -m benchmarks.sync_bandwidth [--model 135m|digits] [--rounds 7] [--json FILE]``: a random Llama of the shape of
SmolLM2-135M (538 MB in float32), or the embedded policy. Every round does each of these once, so a load that comes and
goes meets all of them; medians of wall and of CPU seconds:

* ``memcpy``: one copy of all bytes into memory that is there; ``flat``: of all parameters into one new buffer, which a
  snapshot used to be and no longer is;
* ``snapshot``: the learner's part; ``store``: put into Ray's object store and map it again, as a rollout worker does;
  ``load``: vLLM takes it, and packs every layer for its kernels; ``whole``: all three;
* ``merged``, ``adapter``: the same way for a sync with LoRA of rank 8 on all layers, after the first: the layers with
  factors merged by the learner, or the factors alone, merged by the rollout worker.

``ratio`` is memcpy's time over that of the row, for as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = 8
STARTED = "SKYRL_SYNC_BANDWIDTH"
"""Set in the process that measures: vLLM and malloc want their environment at its start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["135m", "digits"], default="135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    if STARTED not in os.environ:
        from skyrl.crew.ray_executor import COMMON_ENVIRONMENT
        from skyrl.rollout.engine import rollout_environment
        from skyrl.settings import Config

        own = COMMON_ENVIRONMENT | rollout_environment(Config().rollout, arguments.threads) | {STARTED: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.sync_bandwidth", *sys.argv[1:]], os.environ | own)
    with tempfile.TemporaryDirectory() as work:
        result = measure(arguments.model, Path(work), arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


def made_policy(name: str, folder: Path) -> tuple[Any, str]:
    """The learner's model and its folder."""
    import torch

    from skyrl.policy.module import load_policy
    from skyrl.run import model_folders
    from skyrl.settings import Config

    if name == "digits":
        own = model_folders(Config())[0]
        return load_policy(own, "float32"), own
    from transformers import LlamaConfig, LlamaForCausalLM

    from skyrl.digits.architecture import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_policy(str(folder), "float32"), str(folder)


def measure(name: str, work: Path, rounds: int) -> dict[str, Any]:
    import numpy as np
    import ray

    from skyrl.policy.lora import add_lora
    from skyrl.rollout.vllm_engine import VllmEngine
    from skyrl.settings import Config
    from skyrl.settings.system import LoraConfig, LoraSync
    from skyrl.sync.incoming import Incoming
    from skyrl.sync.outgoing import Outgoing
    from skyrl.sync.snapshot import take_snapshot

    model, folder = made_policy(name, work / "policy")
    engine = VllmEngine(Config(), folder)
    plain = LoraConfig()
    whole, place = Outgoing(model, plain), list(model.named_parameters())
    kinds = {"whole": (whole, place, Incoming(plain))}
    for sync in LoraSync:
        own, lora = made_policy(name, work / sync.value)[0], LoraConfig(rank=RANK, sync=sync)
        add_lora(own, lora, {"vision", "adapter", "language"})
        kinds[sync.value] = Outgoing(own, lora), list(own.named_parameters()), Incoming(lora)
    source = np.concatenate([p.detach().numpy().reshape(-1).view(np.uint8) for _, p in place])
    target = np.zeros_like(source)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    megabytes = {"memcpy": source.nbytes / 1e6, "flat": source.nbytes / 1e6}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = call()
        seconds[what].append((time.perf_counter() - wall, time.process_time() - cpu))
        return made

    def one(kind: str, base: int | None) -> None:
        out, named, incoming = kinds[kind]
        chosen = [(n, p) for n, p in named if base is None or n in out.changing]
        layout = out.sent_layout(base is not None)
        snapshot = timed(f"{kind} snapshot", lambda: take_snapshot(out.sent(chosen), layout, 1, base))
        stored = timed(f"{kind} store", lambda: ray.get(ray.put(snapshot)))
        timed(f"{kind} load", lambda: engine.load(incoming.tensors(stored), 1, base is None))
        incoming.version = 1
        megabytes[kind] = snapshot.megabytes

    for turn in range(rounds + 1):  # the first is not counted: memory is mapped
        if turn == 1:
            seconds.clear()
        timed("memcpy", lambda: np.copyto(target, source))
        timed("flat", lambda: np.concatenate([p.detach().numpy().reshape(-1).view(np.uint8) for _, p in place]))
        one("whole", None)
        for sync in LoraSync:
            if turn == 0:
                one(sync.value, None)
            one(sync.value, 1)
    rows = {what: [statistics.median(column) for column in zip(*own, strict=True)] for what, own in seconds.items()}
    for kind in kinds:
        parts = [rows[f"{kind} {part}"] for part in ("snapshot", "store", "load")]
        rows[f"{kind} in all"] = [sum(column) for column in zip(*parts, strict=True)]
        rows[f"{kind} transport"] = [a + b for a, b in zip(*parts[:2], strict=True)]
    return {"model": name, "rounds": rounds, "load": os.getloadavg()[0], "megabytes": megabytes, "seconds": rows}


def table(result: dict[str, Any]) -> str:
    rows, megabytes = result["seconds"], result["megabytes"]
    rate = megabytes["memcpy"] / rows["memcpy"][0]
    rate_cpu = megabytes["memcpy"] / rows["memcpy"][1]
    lines = [f"{result['model']}, {result['rounds']} rounds, load {result['load']:.1f}; memcpy {rate / 1e3:.1f} GB/s"]
    lines.append(f"{'':18} {'MB':>8} {'wall ms':>9} {'CPU ms':>9} {'ratio':>6} {'by CPU':>6}")
    for what, (wall, cpu) in sorted(rows.items()):
        size = megabytes[what.split()[0]]
        ratios = f"{size / rate / wall:6.2f} {size / rate_cpu / max(cpu, 1e-9):6.2f}" if size > 100 else ""
        lines.append(f"{what:18} {size:8.1f} {wall * 1e3:9.1f} {cpu * 1e3:9.1f} {ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
