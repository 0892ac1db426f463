"""Secrets stay out of what a run writes and prints.

What counts as one: the value of an environment variable whose name says so, the tokens in the files of Ray, Hugging
Face and netrc, a password in an address, and a text setting whose name says so. Everything that skyrl writes as text
passes here, at the one place where it is written: :func:`skyrl.monitoring.records.write_text_atomically`, the file of
events, the timeline, the logs of members, why an answer could not be scored, what a command prints about an error.
"""

from __future__ import annotations

import html
import json
import logging
import netrc
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "(left out)"
SETTING = re.compile(r"(^|[._])(api_?key|key|token|secret|password|credentials?)$", re.IGNORECASE)
"""Names of settings whose texts are secrets."""
VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$|^AWS_ACCESS_KEY_ID$", re.IGNORECASE)
"""Names of environment variables whose values are."""
ADDRESS = re.compile(r"://[^/@\s:\"']*:[^/@\s\"']+@")
SHORTEST = 8
"""Characters. A shorter value ("1", "true") would be found in texts that have nothing to do with it."""
_named: set[str] = set()


def hide_variables(names: Iterable[str]) -> None:
    """Treat these environment variables as secrets too, whatever their names."""
    _named.update(names)


def redact(text: str) -> str:
    """``text`` with :data:`HIDDEN` in the place of each secret, also where it is written as in JSON, HTML or a URL."""
    return _without(text, _forms())


def redacted(value: Any) -> Any:
    """JSON data without secrets: also texts under a name that says so are left out."""
    forms = _forms()

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: walk(item, str(name)) for name, item in value.items()}
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        if not isinstance(value, str):
            return value
        return HIDDEN if value and SETTING.search(key) else _without(value, forms)

    return walk(value)


class RedactingFormatter(logging.Formatter):
    """Log lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _without(text: str, forms: Iterable[str]) -> str:
    for form in forms:
        text = text.replace(form, HIDDEN)
    return ADDRESS.sub(f"://{HIDDEN}@", text)


def _forms() -> list[str]:
    """How the secrets of this machine and process may be written, the longest first."""
    home = Path.home()
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    found = {value.strip() for name, value in os.environ.items() if name in _named or VARIABLE.search(name)}
    found.add(_content(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")))
    found.add(_content(Path(os.environ.get("HF_TOKEN_PATH") or hub / "token")))
    found |= _passwords(Path(os.environ.get("NETRC") or home / ".netrc"))
    forms = set[str]()
    for secret in found:
        if len(secret) >= SHORTEST:
            forms |= {secret, json.dumps(secret)[1:-1], html.escape(secret), quote(secret, safe="")}
    return sorted(forms, key=len, reverse=True)


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _passwords(file: Path) -> set[str]:
    try:
        hosts = netrc.netrc(str(file)).hosts
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return set()
    return {password for _, _, password in hosts.values() if password}
