"""What all settings have in common: their base class, and what a setting allows in words.

The words come from a model's JSON schema, so a message and docs/configuration.md can say nothing but what is checked.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Limit = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""Infinity turns it off."""
DottedPath = Annotated[
    str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", json_schema_extra={"allowed": "package.module:Name"})
]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(str(error)) from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern), Field(json_schema_extra={"allowed": "a regular expression"})]
Problem = tuple[str, str]
"""Settings that do not fit together: their keys, with a space between them, and why, with what to do."""
NOUNS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
BOUNDS = {
    "minimum": "{:g} or more",
    "exclusiveMinimum": "above {:g}",
    "maximum": "at most {:g}",
    "exclusiveMaximum": "below {:g}",
}


class Settings(BaseModel):
    """Base of every group of settings, also of those of a loss term of your own. A field's meaning is the docstring
    below it; an unknown key, infinity and nan are refused."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # name=2026
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are words of their own")
        return value


@dataclass(frozen=True)
class Setting:
    """One setting, as its field describes it."""

    key: str
    default: Any
    allowed: str
    """What it may be, to follow "must be"."""
    text: str
    """Its meaning."""


def settings_of(owner: Settings, prefix: str = "") -> Iterator[Setting]:
    """Every setting below ``owner``, whose values are the defaults: first its own, then those of its groups."""
    schema, groups = type(owner).model_json_schema(), []
    for name, part in schema["properties"].items():
        value = getattr(owner, name)
        if isinstance(value, Settings):
            groups.append((value, f"{prefix}{name}."))
        else:
            text = type(owner).model_fields[name].description or ""
            yield Setting(f"{prefix}{name}", value, _words(part, schema.get("$defs", {})), " ".join(text.split()))
    for group, name in groups:
        yield from settings_of(group, name)


def _words(part: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a piece of a JSON schema allows."""
    if "allowed" in part:
        return str(part["allowed"])
    if "$ref" in part:
        return _words(defs[part["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in part:
        null = {"type": "null"} in part["anyOf"]
        words = " or ".join(_words(one, defs) for one in part["anyOf"] if one != {"type": "null"})
        return f"null, or {words}" if null else words
    if "enum" in part:
        return f"one of {', '.join(part['enum'])}"
    if part["type"] == "array":
        item = _words(part.get("prefixItems", [part.get("items")])[0], defs)
        low, high = part.get("minItems", 0), part.get("maxItems")
        return f"a list{f' of {low}' if low == high else ' of one or more' if low else ''}, each {item}"
    if isinstance(values := part.get("additionalProperties"), dict):
        return f"a mapping, each value {_words(values, defs)}"
    limits = " and ".join(words.format(part[name]) for name, words in BOUNDS.items() if name in part)
    return ", ".join(filter(None, (NOUNS.get(part["type"], "a mapping"), limits)))


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if text.isprintable() else repr(text)


def value_at(data: Any, key: str) -> Any:
    """What nested dictionaries hold under a dotted key; None if nothing."""
    for name in key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def field_problems(error: ValidationError, data: dict[str, Any], settings: dict[str, Setting]) -> dict[str, str]:
    """A sentence for each wrong key of ``data``.

    Args:
        error: what pydantic found.
        settings: every setting by its key.
    """
    found: dict[str, list[str]] = {}
    for one in error.errors():
        path = [str(part) for part in one["loc"]]
        key = next((k for n in range(len(path), 0, -1) if (k := ".".join(path[:n])) in settings), ".".join(path))
        rest, value = path[key.count(".") + 1 :], value_at(data, key)
        must = f"must be {settings[key].allowed if key in settings else 'a group of settings'}"
        if one["type"] == "finite_number" and not rest:
            must = "must be a finite number"
        elif isinstance(value, bool):
            must += "; in YAML, words such as off, on, yes and no need quotes"
        elif one["type"] == "enum":
            near = _near(str(one["input"]), re.findall("'([^']*)'", one["ctx"]["expected"]))
            must += f"; did you mean {near}?" if near else ""
        elif one["type"] == "value_error":
            must += f" ({one['ctx']['error']})"
        sentence = f"{key}={shown(value)}: {must}"
        if len(rest) > 1:  # inside an item of a list of groups
            must = one["msg"].replace("Input should", "must").replace("String should", "must")
            sentence = f"{key}[{rest[0]}].{'.'.join(rest[1:])}={shown(one['input'])}: {must}"
        elif one["type"] == "extra_forbidden":
            sentence = unknown_key(key, settings)
        found.setdefault(key, []).append(sentence)
    return {key: "\n".join(dict.fromkeys(sentences)) for key, sentences in found.items()}


def unknown_key(key: str, known: Collection[str]) -> str:
    """That there is no such setting among ``known``, with the names that are near it."""
    names = [*known, *sorted({k.rpartition(".")[0] for k in known if "." in k})]
    near = _near(key, names) or " or ".join(k for k in names if k.split(".")[-1] == key.split(".")[-1])
    mend = f"did you mean {near}?" if near else "`python -m skyrl.launch --cfg job` lists all keys"
    return f"{key}: there is no such setting; {mend}"


def _near(word: str, known: Collection[str]) -> str:
    return " or ".join(difflib.get_close_matches(word, known, n=2, cutoff=0.8))
