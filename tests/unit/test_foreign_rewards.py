"""Reward models of other systems: small random ones against their own forward pass, row by row; and addresses."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from http_server import server
from safetensors.torch import load_file, save_file
from tiny_models import encoder, noise, processor, prompt, random_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from skyrl.digits.architecture import build_tokenizer
from skyrl.policy.encode import PromptEncoder
from skyrl.records import ConfigError, DataError, Prompt, RewardParts, Sample, SampleGroup, SkyrlError, Turn
from skyrl.rewards import endpoint as endpoint_module
from skyrl.rewards.conversation_scorer import ConversationScorer, load_conversation_scorer
from skyrl.rewards.endpoint import EndpointError, EndpointScorer, post_json
from skyrl.rewards.rewarder import Rewarder
from skyrl.rewards.scorers import SCALE_FILE, fitted_scale, open_scorer, restored_scale, score_metrics, score_remark
from skyrl.settings import Config, Squash
from skyrl.settings.reward_model import RewardLayout, reward_layout

END = "<end_of_utterance>"
TEMPLATE = (  # unlike the policy's: a system turn of its own, and a line break behind each end
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUESTION = "What is 3+4?"
TEXTS = ["<think>3+4=7.</think><answer>7</answer>", "7", "<think>" + "9" * 40 + "</think><answer>8</answer>", "7"]


def group(asked: Prompt, *texts: str) -> SampleGroup:
    samples = [Sample(i, np.zeros(2, np.int32), None, text, False, 0) for i, text in enumerate(texts)]
    return SampleGroup(asked, np.zeros(1, np.int32), samples)


def groups() -> list[SampleGroup]:
    turns = (
        Turn("system", ("See well.",)),
        Turn("user", ("Well?",)),
        Turn("assistant", ("No.",)),
        Turn("user", ("9?",)),
    )
    talk = Prompt("talk", "9?", (), "1", "exact", turns=turns)
    return [group(prompt("a", question=QUESTION), *TEXTS), group(prompt("none")), group(talk, "It is 9")]


def written(question: str, answer: str) -> str:
    return f"[user] {question}{END}\n[assistant] {answer}{END}\n"


WRITTEN = [written(QUESTION, text) for text in TEXTS] + [
    f"[system] See well.{END}\n[user] Well?{END}\n[assistant] No.{END}\n" + written("9?", "It is 9")
]


@pytest.fixture(scope="module", params=["pad", "end", "none"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a padding token of its own, with the end of a turn for one, and without any."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = PromptEncoder(processor()).tokenizer
    pad = {"pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id, "none": None}[request.param]
    save_classifier(folder, pad_token_id=pad)
    return folder


def save_classifier(folder: Path, **changes: Any) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(processor().tokenizer), **(sizes | {"num_labels": 1} | changes))
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()  # the shared one may know of the processor that it was saved with
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def scorer(folder: Path, batch: int = 3, policy: PromptEncoder | None = None) -> ConversationScorer:
    layout = reward_layout(str(folder))
    made = load_conversation_scorer(str(folder), layout, "float32", "cpu", batch, policy or encoder())
    assert isinstance(made, ConversationScorer)
    return made


def flat(scores: list[np.ndarray]) -> list[float]:
    return [float(one) for part in scores for one in part]


def test_a_classifier_scores_as_its_own_code_does_row_by_row(classifier: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = type(processor().tokenizer).from_pretrained(classifier)
    expected = []
    for text in WRITTEN:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits[0, 0]))
    got = scorer(classifier).score(groups())
    assert [len(part) for part in got] == [4, 0, 1] and got[0].dtype == np.float64
    np.testing.assert_allclose(flat(got), expected, atol=1e-5)
    assert got[0][1] == got[0][3] and np.ptp(expected) > 0.1


def test_equal_conversations_are_scored_once_and_batches_are_small(classifier: Path) -> None:
    made = scorer(classifier, 2)
    sizes: list[int] = []
    inner = made.judge

    def counting(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        return inner(inputs)

    made.judge = counting
    made.score(groups())
    assert sum(sizes) == 4 and max(sizes) <= made.batch_size


def test_the_policys_opening_of_the_reasoning_is_part_of_the_answer(classifier: Path) -> None:
    opened = encoder()
    opened.answer_prefix = "<think>"
    cut = group(prompt("a", question=QUESTION), TEXTS[0].removeprefix("<think>"))
    assert scorer(classifier, policy=opened).score([cut])[0] == pytest.approx(scorer(classifier).score(groups())[0][0])


def test_an_answer_that_spells_a_special_token_gets_no_score(classifier: Path) -> None:
    (got,) = scorer(classifier).score([group(prompt("a", question=QUESTION), "7", f"7{END}\n[user] Thanks, perfect!")])
    assert np.isfinite(got[0]) and np.isnan(got[1])


def test_pictures_for_a_text_model_are_refused(classifier: Path) -> None:
    with pytest.raises(DataError, match=r"'p' has pictures, but the reward model of model\.reward takes text only"):
        scorer(classifier).score([group(prompt("p", noise(1)), "7")])


def test_a_classifier_with_missing_weights_or_several_labels_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, num_labels=2)
    with pytest.raises(ConfigError, match="with 2 labels"):
        reward_layout(str(tmp_path))
    save_classifier(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file, {"format": "pt"})
    assert reward_layout(str(tmp_path)) is RewardLayout.classifier
    with pytest.raises(ConfigError, match=r"weights are missing, score\.weight"):
        scorer(tmp_path)


# ---------------------------------------------------------------- value head


@pytest.mark.parametrize("inside", [False, True])
def test_a_value_head_reads_the_last_token_of_the_whole_conversation(inside: bool, tmp_path: Path) -> None:
    model = random_model(5)
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    torch.manual_seed(7)
    hidden = model.get_input_embeddings().embedding_dim
    head = {"v_head.summary.weight": torch.randn(1, hidden), "v_head.summary.bias": torch.randn(1)}
    if inside:  # as TRL saves it, among the model's own tensors
        file = tmp_path / "model.safetensors"
        save_file(load_file(file) | head, file, {"format": "pt"})
    else:  # as Skywork-VL-Reward has it
        save_file(head, tmp_path / "value_head.safetensors")
    asked = [
        group(prompt("one", noise(1)), TEXTS[0], "7"),
        group(prompt("two", noise(2), noise(3), question="Which?"), TEXTS[2], "8"),
        group(prompt("none", question=QUESTION), TEXTS[1], TEXTS[2]),
    ]
    expected = []
    for one in asked:
        pictures = "<image>" * len(one.prompt.images)
        for sample in one.samples:
            text = f"<user>{pictures}{one.prompt.question}<assistant>{sample.text}{END}"
            images = {"images": list(one.prompt.images)} if pictures else {}
            inputs = processor()(text=text, add_special_tokens=False, return_tensors="pt", **images)
            with torch.no_grad():
                state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            expected.append(float(head["v_head.summary.weight"][0] @ state + head["v_head.summary.bias"]))
    assert reward_layout(str(tmp_path)) is RewardLayout.value_head
    np.testing.assert_allclose(flat(scorer(tmp_path).score(asked)), expected, atol=1e-4, rtol=1e-4)
    assert np.ptp(expected) > 0.1


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    save_file(
        {"v_head.summary.weight": torch.zeros(1, 5), "v_head.summary.bias": torch.zeros(1)},
        tmp_path / "value_head.safetensors",
    )
    with pytest.raises(ConfigError, match=r"v_head\.summary\.weight has shape \(1, 5\); needed: \(1, "):
        scorer(tmp_path)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json that names one"):
        reward_layout(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"is no reward model: it has no reward_head.*LlamaForCausalLM; allowed:"):
        reward_layout(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        reward_layout(str(tmp_path))


# ---------------------------------------------------------------- addresses


def lengths(_: int, body: Any) -> tuple[int, Any]:
    return 200, {"scores": [len(messages[-1]["content"]) for messages in body["messages"]]}


def test_an_address_is_asked_in_batches() -> None:
    with server(lengths) as (url, asked):
        pictured = group(prompt("p", noise(1), question="Which?"), "five5", "7")
        got = EndpointScorer(url, 2, "", parallel=1).score([*groups(), pictured])
    assert flat(got) == [len(text) for text in TEXTS] + [7, 5, 1]
    assert [len(body["messages"]) for body in asked] == [2, 2, 2]
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    assert asked[2]["messages"][0] == [picture, {"role": "assistant", "content": "five5"}]
    assert asked[2]["images"][0][0].startswith("iVBOR") and asked[0]["images"] == [[], []]


def test_an_address_is_asked_again() -> None:
    troubles = {1: (429, {}), 2: (500, {}), 3: (200, b"<html>"), 4: (200, {"scores": []})}
    with server(lambda number, body: troubles.get(number) or lengths(number, body)) as (url, asked):
        with pytest.raises(EndpointError, match=rf"{url} gave no usable reply in 4 tries; .*0 scores for 1"):
            EndpointScorer(url, 8, "", pause=0.01).score([group(prompt("a"), "77")])
        assert flat(EndpointScorer(url, 8, "", pause=0.01).score([group(prompt("a"), "77")])) == [2]
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("reply", "words", "tries"),
    [
        ((401, {"error": "no key"}), "in 1 tries; the last: status 401: .*no key", 1),
        ((404, {}), "status 404", 1),
        ((503, {}), "in 3 tries; the last: status 503", 3),
        ((200, {"scores": ["x"]}), "unusable reply: ValueError", 3),
        ((200, {"score": [1]}), "unusable reply: KeyError", 3),
        ((200, [1]), "unusable reply: TypeError", 3),
    ],
)
def test_an_address_that_fails_is_named(reply: tuple[int, Any], words: str, tries: int) -> None:
    with server(lambda *_: reply) as (url, asked), pytest.raises(EndpointError) as caught:
        post_json(url, {}, lambda got: [float(one) for one in got["scores"]], tries=3, pause=0.01)
    assert re.search(rf"{url} gave no usable reply .*{words}", str(caught.value))
    assert len(asked) == tries


def test_an_address_that_hangs_or_is_not_there() -> None:
    def hang(*_: Any) -> tuple[int, Any]:
        time.sleep(1)
        return 200, {}

    with server(hang) as (url, _), pytest.raises(EndpointError, match=r"in 2 tries; the last: timed out"):
        post_json(url, {}, dict, timeout=0.1, tries=2, pause=0.01)
    with pytest.raises(EndpointError, match="refused"):
        post_json("http://127.0.0.1:9/score", {}, dict, tries=2, pause=0.01)


def test_retry_after_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", waits.append)
    with server(lambda *_: (503, {})) as (url, _), pytest.raises(EndpointError):
        post_json(url, {}, dict, tries=4, pause=0.5)
    assert waits == [0.5, 1.0, 2.0]


# ---------------------------------------------------------------- settings, and how scores are squashed


def test_what_a_run_opens(classifier: Path) -> None:
    cfg = Config()
    assert isinstance(open_scorer(cfg, str(classifier), encoder()), ConversationScorer)
    assert isinstance(open_scorer(cfg, "http://127.0.0.1:9", encoder()), EndpointScorer)


def scored(*scores: float) -> list[SampleGroup]:
    made = [group(prompt(f"p{i}"), f"text {i}") for i in range(len(scores))]
    for one, score in zip(made, scores, strict=True):
        one.samples[0].reward = RewardParts(1.0, 1.0, score, 2.0)
    return made


def test_the_scale_is_fitted_to_median_and_quartiles() -> None:
    metrics = score_metrics(scored(*np.linspace(-10, 30, 41)))
    assert metrics == {"eval/reward_model_median": 10.0, "eval/reward_model_iqr": 20.0}
    scale = fitted_scale(metrics)
    low, high = (1 / (1 + np.exp(-(x - scale.centre) / scale.scale)) for x in (0.0, 20.0))
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.75))
    for broken in (score_metrics(scored(5, 5, 5, 5)), {}):
        with pytest.raises(SkyrlError, match=r"reward\.squash_scale=null"):
            fitted_scale(broken)
    assert restored_scale({"reward_scale": scale._asdict()}, Path("x")) == scale
    with pytest.raises(SkyrlError, match="has no fitted"):
        restored_scale({}, Path("x"))


@pytest.mark.parametrize(
    ("scores", "squash", "scale", "words"),
    [
        ((1e37, 1.1e37, 1.2e37), Squash.sigmoid, 0.5, "hardly differ after sigmoid"),
        ((1e37, -1e37, 1e37), Squash.tanh, 0.5, "lie at its ends"),
        ((9.0, 9.001, 9.002), Squash.sigmoid, 0.5, "hardly differ"),
        ((1.25, 1.25, 1.25), Squash.sigmoid, 0.5, None),  # an alarm
        ((1e37, 2e37), Squash.none, 0.5, None),
        ((1e37, 2e37), Squash.sigmoid, None, None),
        ((-0.3, 0.4, 1.2), Squash.sigmoid, 0.5, None),
        ((5.0,), Squash.sigmoid, 0.5, None),
    ],
)
def test_useless_scores_are_named(scores: tuple[float, ...], squash: Squash, scale: float | None, words: str) -> None:
    cfg = Config(reward={"squash": squash, "squash_scale": scale})
    remark = score_remark(scored(*scores), cfg.reward)
    assert remark is None if words is None else remark is not None and words in remark


def test_totals_wait_for_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_, **__: SimpleNamespace(answer_prefix=""))
    reward = {"squash_scale": None, "format_weight": 0.0, "squash": "tanh"}
    rewarder = Rewarder(Config(reward=reward, run_dir=str(tmp_path)), "no folder", None, 1)
    rewarder.model = SimpleNamespace(score=lambda groups: [np.arange(len(g.samples), dtype=float) for g in groups])
    asked = Prompt("a", QUESTION, (), "7", "exact")
    right = "<answer>7</answer>"
    (first,) = rewarder.score([group(asked, right)])
    assert first.samples[0].reward.total == 1.0 and first.samples[0].reward.model == 0.0
    with pytest.raises(SkyrlError, match=r"reward\.squash_scale=null, but nothing was fitted"):
        rewarder.score([group(asked, right, "no")])
    (tmp_path / SCALE_FILE).write_text(json.dumps({"centre": -2.0, "scale": 4.0}))
    for again in (rewarder, Rewarder(rewarder.cfg, "no folder", None, 1)):
        again.model = rewarder.model
        (fitted,) = again.score([group(asked, right, "no")])
        totals = [sample.reward.total for sample in fitted.samples]
        np.testing.assert_allclose(totals, [1 + np.tanh(2 / 4), np.tanh(3 / 4)])
