"""What the columns of a file may be called: a name that is probably misspelt is refused rather than ignored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from skyrl.data.layouts import PICTURE_COLUMNS
from skyrl.data.rows import Row
from skyrl.records import DataError
from skyrl.settings import Layout

COLUMNS = ("id", "question", "messages", "answer", "verifier", "kind", "facts", "images", "extra")
"""Columns of skyrl's own layout."""
PICTURE_NAME = re.compile(r"image|img|picture|photo", re.IGNORECASE)
"""What an unknown column is called that probably holds pictures."""


def check_columns(names: Sequence[str], layout: Layout, first: Callable[[], Row]) -> None:
    """Look at the names of a file's columns.

    Args:
        first: Gives the first row that can be read.

    Raises:
        DataError: for one that comes twice, looks like a misspelt one of skyrl's own layout, or like pictures that
            would not be read.
    """
    known = {*COLUMNS, *PICTURE_COLUMNS}
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"column {twice[0]!r} comes twice")
    pictured = bool({*PICTURE_COLUMNS} & set(names))
    for name in (name for name in names if name not in known):
        close = difflib.get_close_matches(name, known - set(names) - {"image"}, n=1, cutoff=0.8)
        if close and layout is Layout.skyrl:
            raise DataError(f"column {name!r} is unknown; did you mean {close[0]!r}? Rename or remove it")
        if not pictured and PICTURE_NAME.search(name) and isinstance(first().get(name), (str, bytes, list, dict)):
            # Ignoring it would make a picture data set a text data set without a word.
            raise DataError(
                f"column {name!r} looks like pictures, which are read from a column 'images' or 'image' only; "
                "rename or remove it"
            )
