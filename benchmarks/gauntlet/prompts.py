"""Faults of prompts and of the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gauntlet.fault import Fault, replaced

ROWS = 64


def with_beginning(folder: Path) -> list[str]:
    """The embedded policy with a beginning of sequence that its chat template writes."""
    from benchmarks._system import embedded_models

    policy, reward = embedded_models()
    copy = folder / "policy"
    shutil.copytree(policy, copy)
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"bos_token": settings["eos_token"]}))
    template = copy / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    return [f"model.policy={copy}", f"model.reward={reward}"]


@contextmanager
def double_beginning() -> Iterator[None]:
    """The tokenizer adds the beginning to a text that has it."""
    from skyrl.policy.encode import PromptEncoder

    def added(encoder: Any) -> list[int]:
        bos = encoder.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def encode(original: Any, encoder: Any, prompt: Any) -> Any:
        ids, pictures = original(encoder, prompt)
        begins = added(encoder) if prompt.images else []  # else text_ids has it
        return np.concatenate([np.array(begins, dtype=np.int32), ids]), pictures

    with (
        replaced(
            PromptEncoder, "text_ids", lambda original, encoder, prompt: added(encoder) + original(encoder, prompt)
        ),
        replaced(PromptEncoder, "encode_anew", encode),
    ):
        yield


@contextmanager
def template_twice() -> Iterator[None]:
    """The data set holds rendered prompts."""
    from skyrl.digits.scenes import DigitScenes

    def scene(original: Any, scenes: Any, row: int) -> Any:
        prompt = original(scenes, row)
        return replace(prompt, question=f"<user>{prompt.question}<assistant>")

    with replaced(DigitScenes, "__getitem__", scene):
        yield


@contextmanager
def prompts_cut() -> Iterator[None]:
    """The rollout cuts prompts to a length, from the left."""
    from skyrl.rollout.sampler import Sampler

    def asked(original: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(*args, **kwargs)
        return replace(request, prompt_ids=request.prompt_ids[1:])

    with replaced(Sampler, "_asked", asked):
        yield


def scenes_in_files(folder: Path) -> list[str]:
    """Digit scenes as files: one to train on, another one to evaluate on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from skyrl.digits.scenes import DigitScenes

    for split in ("train", "eval"):
        scenes = DigitScenes(split, ROWS, 0.0, 0)
        rows = [scenes[row] for row in range(ROWS)]
        pq.write_table(
            pa.table(
                {
                    "id": [prompt.id for prompt in rows],
                    "question": [prompt.question for prompt in rows],
                    "answer": [prompt.answer for prompt in rows],
                    "verifier": [prompt.verifier for prompt in rows],
                    "images": [[_png(picture) for picture in prompt.images] for prompt in rows],
                }
            ),
            folder / f"{split}.parquet",
        )
    files = [f"data.{split}_path={folder / split}.parquet" for split in ("train", "eval")]
    return ["data=files", *files, "hallucination.probe_prompts=0"]


def _png(picture: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


@contextmanager
def evaluation_is_training() -> Iterator[None]:
    """Somebody gives the training file for the evaluation, too."""
    from skyrl import run

    def paths(original: Any, cfg: Any) -> Any:
        data = cfg.data.model_copy(update={"eval_path": cfg.data.train_path})
        return original(cfg.model_copy(update={"data": data}))

    with replaced(run, "with_absolute_paths", paths):
        yield


@contextmanager
def _position(changed: Any) -> Iterator[None]:
    """``changed(the saved state)`` is where a resumed run goes on."""
    from skyrl.data.stream import PromptStream

    with replaced(
        PromptStream, "load_state_dict", lambda original, stream, state: original(stream, changed(stream, state))
    ):
        yield


def prompts_skipped() -> Any:
    """The saved position is that of prompts that were asked for and not trained on."""
    return _position(lambda stream, state: state | {"position": state["position"] + 16})


def prompts_repeated() -> Any:
    """The position is not saved: the data begin again."""
    return _position(lambda stream, state: stream.state_dict())


FAULTS = [
    Fault(
        "double_bos",
        "prompts",
        "The chat template writes the beginning of the sequence, and the tokenizer adds another: both sides agree.",
        ("huggingface/open-r1#462", "huggingface/transformers#35950"),
        "DataError.*begins with .* twice",
        0,
        double_beginning,
        prepared=with_beginning,
    ),
    Fault(
        "evaluation_is_training",
        "prompts",
        "The evaluation file is the training file: accuracy rises by heart.",
        ("OpenRLHF/OpenRLHF#1089",),
        "evaluation_trained_on",
        0,
        evaluation_is_training,
        prepared=scenes_in_files,
    ),
    Fault(
        "resume_skips_prompts",
        "prompts",
        "A resumed run goes on behind prompts that were asked for and never trained on.",
        ("NVIDIA-NeMo/RL#3599", "NVIDIA-NeMo/RL#2519"),
        "prompts_skipped",
        3,
        prompts_skipped,
        resumes=True,
    ),
    Fault(
        "resume_repeats_prompts",
        "prompts",
        "A resumed run begins with the first prompts again.",
        ("hiyouga/EasyR1#57",),
        "prompts_skipped|same_prompts",
        3,
        prompts_repeated,
        resumes=True,
        further=True,
    ),
    Fault(
        "template_twice",
        "prompts",
        "The data hold prompts that the chat template was applied to already.",
        (),
        "DataError.*ends with .* twice",
        0,
        template_twice,
        further=True,
    ),
    Fault(
        "prompts_cut",
        "prompts",
        "The rollout cuts the beginning of prompts off; the learner trains on whole ones.",
        ("2U1/Qwen-VL-Series-Finetune#152",),
        "DataError.*the rollout saw",
        0,
        prompts_cut,
        further=True,
    ),
]
