"""Modular reassembly: the joined model is the sum of its parts, or nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encoder, picture, random_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skyrl import assemble as module
from skyrl.assemble import assemble
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.module import freeze, load_policy, module_of
from skyrl.records import ConfigError, Prompt, SkyrlError
from skyrl.settings import Trainable

PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[assistant]"
"""A text model's template: it prints contents as they are."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A frame, and a language model of another width whose tokenizer knows no picture."""
    root = tmp_path_factory.mktemp("parts")
    frame, language = root / "frame", root / "language"
    random_model(seed=3).save_pretrained(frame)
    encoder().processor.save_pretrained(frame)
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(frame)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pictured = {"<fake_token_around_image>", "<image>", "<global-img>"}
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in pictured]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>",
                                   eos_token="<end_of_utterance>")  # fmt: skip
    bare.chat_template = PLAIN
    bare.add_tokens(["zebra"])  # so that the picture's tokens get other ids than in the frame
    assert "<image>" not in bare.get_vocab()
    end = bare.eos_token_id
    rows = max(bare.get_vocab().values()) + 1
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **{"pad_token_id": 0, "eos_token_id": end, "bos_token_id": None},
    )
    LlamaForCausalLM(config).save_pretrained(language)
    bare.save_pretrained(language)
    return frame, language


def test_the_joined_model_is_the_sum_of_its_parts(parts: tuple[Path, Path], tmp_path: Path) -> None:
    frame, language = parts
    report = assemble(frame, language, tmp_path / "out")
    model, tower, text = (load_policy(str(f), "float32") for f in (tmp_path / "out", frame, language))
    own, theirs = dict(model.named_parameters()), dict(tower.named_parameters())
    vision = [name for name in own if module_of(name) == "vision"]
    assert vision and all(torch.equal(own[name], theirs[name]) for name in vision)
    rows = text.config.vocab_size
    ids = torch.arange(1, 40).reshape(3, 13)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :rows], text(input_ids=ids).logits)
    embedding, known = model.get_input_embeddings().weight, text.get_input_embeddings().weight
    assert len(embedding) == rows + 3 and torch.equal(embedding[:rows], known)
    assert torch.allclose(embedding[rows:], known.mean(0).expand(3, -1))
    assert report["parameters"] == {
        part: sum(p.numel() for n, p in own.items() if module_of(n) == part)
        for part in ("vision", "adapter", "language")
    }
    assert json.loads((tmp_path / "out" / "assembled.json").read_text()) == report


def test_pictures_stand_where_the_languages_own_template_puts_the_text(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    assemble(*parts, tmp_path / "out")
    made = PromptEncoder.from_pretrained(str(tmp_path / "out"))
    asked = Prompt("a", "How many?", (picture(0), picture(255)), "1", "exact")
    assert made.chat_text(asked) == "[user] <image><image>How many?[assistant]"
    assert made.chat_text(Prompt("b", "How many?", (), "1", "exact")) == "[user] How many?[assistant]"
    ids, pictures = made.encode(asked)
    frame = PromptEncoder.from_pretrained(str(parts[0]))
    assert made.image_token_id != frame.image_token_id
    model = load_policy(str(tmp_path / "out"), "float32").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(np.asarray(ids)[None]), **pictures).logits
    assert logits.isfinite().all() and model.config.image_token_id == made.image_token_id
    freeze(model.named_parameters(), Trainable.adapter)
    assert {module_of(n) for n, p in model.named_parameters() if p.requires_grad} == {"adapter"}


def test_an_adapter_of_the_same_sizes_is_taken_and_another_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    assemble(*parts, tmp_path / "one", seed=1)
    assemble(*parts, tmp_path / "two", adapter=tmp_path / "one", seed=2)
    assemble(*parts, tmp_path / "three", seed=2)
    one, two, three = (
        dict(load_policy(str(tmp_path / n), "float32").named_parameters()) for n in ("one", "two", "three")
    )
    adapter = [name for name in one if module_of(name) == "adapter" and one[name].ndim > 1]
    assert adapter and all(torch.equal(one[n], two[n]) and not torch.equal(one[n], three[n]) for n in adapter)
    with pytest.raises(ConfigError, match=r"adapter: model\.connector\..* must be \[64, \d+\], got \[128, "):
        assemble(*parts, tmp_path / "four", adapter=parts[0])
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("broken", ["language", "vision"])
def test_what_is_not_the_sum_of_its_parts_is_not_written(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    put = module._put_language

    def spoiled(model: Any, text: Any) -> None:
        put(model, text)
        name = next(
            n for n, p in model.named_parameters() if module_of(n) == broken and p.ndim > 1 and "embed" not in n
        )
        model.get_parameter(name)[0, 0] += 1

    monkeypatch.setattr(module, "_put_language", spoiled)
    message = {"language": "text-only logits differ", "vision": "features that reach the adapter differ"}[broken]
    with pytest.raises(SkyrlError, match=message):
        assemble(*parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_named_together(parts: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skyrl.assemble", f"vision={tmp_path}", "tower=x", f"output={tmp_path}", "seed=-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for line in (
        "tower=x: must be one of vision=…, language=…",
        "language=: must be given",
        f"vision={tmp_path}: must be a Hugging Face folder; it has no config.json",
        f"output={tmp_path}: exists already",
        "seed=-1: must be 0 or more",
    ):
        assert line in done.stderr
    with pytest.raises(ConfigError, match="a LlamaForCausalLM has no vision tower"):
        assemble(parts[1], parts[1], tmp_path / "out")
