"""Asking other machines: one JSON request with retries, and a reward model behind an address."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from skyrl.records import Prompt, SampleGroup, SkyrlError

REPLY_LIMIT = 64 << 20
"""Bytes of a reply."""
_AGAIN = {408, 409, 425, 429, *range(500, 600)}
"""Statuses that may pass by themselves."""


class EndpointError(SkyrlError):
    """An address gave no usable reply, after all tries; the message names it."""


class UnusableReply(EndpointError):
    """The last reply came, but not in the form that was asked for."""


def post_json(
    url: str,
    body: Mapping[str, Any],
    check: Callable[[Any], Any],
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    tries: int = 4,
    pause: float = 1.0,
    before: Callable[[], None] = lambda: None,
) -> Any:
    """POST ``body`` and give back what ``check`` makes of the reply.

    Args:
        check: Takes the parsed reply; a :class:`ValueError` of its own, ``KeyError``, ``IndexError`` or ``TypeError``
            says that it is unusable, and it is asked for again.
        timeout: Seconds for one try.
        tries: At most so many.
        before: Called before each try; what it raises ends the tries.
        pause: Seconds before the second try, doubled before each further one; ``Retry-After`` may ask for more, up to a
            minute.

    Raises:
        EndpointError: after the last try, :class:`UnusableReply` if one came; at once for a status such as 401 or 404,
            which does not pass by itself.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}, method="POST"
    )
    problem, kind = "", EndpointError
    for number in range(tries):
        wait, final, kind = pause * 2**number, False, EndpointError
        before()
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return check(json.loads(reply.read(REPLY_LIMIT)))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            problem, final = f"status {error.code}: {said}", error.code not in _AGAIN
            asked = error.headers.get("Retry-After", "")
            wait = min(max(wait, float(asked)), 60.0) if asked.isdecimal() else wait
        except (OSError, urllib.error.URLError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem, kind = f"unusable reply: {type(error).__name__}: {str(error)[:200]}", UnusableReply
        if final:
            break
        if number + 1 < tries:
            time.sleep(wait)
    raise kind(f"{url} gave no usable reply in {number + 1} tries; the last: {problem}")


class EndpointScorer:
    """A reward model behind an address.

    It is asked ``{"messages": [conversation, …], "images": [[base64 PNG, …], …]}`` and has to reply ``{"scores":
    [number, …]}``. A conversation is a list of ``{"role", "content"}`` that ends with the answer; a picture's place in
    a content is ``{"type": "image"}``.

    Args:
        batch_size: Conversations of one request.
        answer_prefix: Of the policy's encoder.
        parallel: Requests at a time.
    """

    def __init__(self, url: str, batch_size: int, answer_prefix: str, parallel: int = 4, pause: float = 1.0) -> None:
        self.url, self.batch_size, self.answer_prefix, self.pause = url, batch_size, answer_prefix, pause
        self._threads = ThreadPoolExecutor(parallel)

    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores, float64 [G] of each group; :class:`EndpointError` if the address does not give them."""
        keys = [[(*group.prompt.key, sample.text) for sample in group.samples] for group in groups]
        prompts = {key: group.prompt for group, some in zip(groups, keys, strict=True) for key in some}
        ordered = list(prompts)
        parts = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        replies = self._threads.map(lambda part: self._ask([(prompts[key], key[-1]) for key in part]), parts)
        found: dict[tuple[str, str, str], float] = {}
        for part, reply in zip(parts, replies, strict=True):
            found |= zip(part, reply, strict=True)
        return [np.array([found[key] for key in some], dtype=np.float64) for some in keys]

    def _ask(self, rows: Sequence[tuple[Prompt, str]]) -> list[float]:
        def numbers(reply: Any) -> list[float]:
            scores = [float(score) for score in reply["scores"]]
            if len(scores) != len(rows):
                raise ValueError(f"{len(scores)} scores for {len(rows)} conversations")
            return scores

        body = {
            "messages": [conversation(prompt, self.answer_prefix + answer) for prompt, answer in rows],
            "images": [[_png(picture) for picture in prompt.images] for prompt, _ in rows],
        }
        return list(post_json(self.url, body, numbers, pause=self.pause))


def conversation(prompt: Prompt, answer: str) -> list[dict[str, Any]]:
    """The messages of a prompt and the answer; a content is a text, or a list of parts if it has pictures."""
    messages: list[dict[str, Any]] = []
    for turn in prompt.conversation:
        parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
        text = "".join(part or "" for part in turn.parts)
        messages.append({"role": turn.role, "content": parts if None in turn.parts else text})
    return [*messages, {"role": "assistant", "content": answer}]


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
