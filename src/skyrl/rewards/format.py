"""The ``<think>…</think><answer>…</answer>`` form: is it kept, and what is the answer inside?

Plain ``find`` and ``count`` instead of regular expressions: the text comes from the policy, and these are linear
in its length whatever it writes.
"""

from __future__ import annotations

_THINK = ("<think>", "</think>")
_ANSWER = ("<answer>", "</answer>")


def extract_answer(text: str) -> str | None:
    """Content of the last complete ``<answer>…</answer>``, stripped of surrounding whitespace; ``None`` if there is
    none, for example because it was cut off. The policy then gave no answer: its rule reward is an honest 0, no error.
    """
    end = text.rfind(_ANSWER[1])
    start = text.rfind(_ANSWER[0], 0, max(end, 0))
    return text[start + len(_ANSWER[0]) : end].strip() if start >= 0 else None


def format_reward(text: str) -> float:
    """1.0 if the text is one ``<think>…</think>`` and then one ``<answer>…</answer>`` with content, else 0.0.

    Whitespace around and between the two is allowed, anything else outside of them is not, nor is a second tag of
    either kind anywhere.
    """
    text = text.strip()
    if any(text.count(tag) != 1 for tag in _THINK + _ANSWER):
        return 0.0
    if not text.startswith(_THINK[0]) or not text.endswith(_ANSWER[1]):
        return 0.0
    think_end, answer_start = text.find(_THINK[1]) + len(_THINK[1]), text.find(_ANSWER[0])
    if think_end > answer_start or text[think_end:answer_start].strip():
        return 0.0
    return 1.0 if text[answer_start + len(_ANSWER[0]) : -len(_ANSWER[1])].strip() else 0.0
