"""The frame of every HTML page: one file, opens from disk without a network, and escapes what it is given."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from skyrl.monitoring.console import number, percent


def render(template: str, script: str | None = None, **content: Any) -> str:
    """A page. Everything in ``content`` is escaped, unless the template says ``safe``.

    Args:
        template: A file in this folder that extends ``base.jinja``.
        script: A file in this folder, the only script that the page lets run: its policy names the digest, so a script
            that came with a model's text stays dead even if the escaping failed.
    """
    pages = Environment(
        loader=PackageLoader("skyrl.monitoring", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"percent": percent, "number": number}
    code, allowed = "", ""
    if script is not None:
        code, *_ = PackageLoader("skyrl.monitoring", "").get_source(pages, script)  # as it is: no template
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        allowed = f"; script-src 'sha256-{digest}'"
    return pages.get_template(template).render(content, script=code, allowed=allowed)
