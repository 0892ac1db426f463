"""``python -m skyrl.data``: look at files of prompts before a run. Settings are those of ``python -m skyrl.launch``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table

from skyrl.cli import compose_config, run_command
from skyrl.records import ConfigError, DataError, Prompt
from skyrl.settings import Config

if TYPE_CHECKING:
    from skyrl.data.files import FilePrompts
    from skyrl.policy.lengths import PromptLengths

SETTING = re.compile(r"[+]*[A-Za-z_][\w.]*=")
FRONT = {"algorithm": "grpo", "reward": "rule_only", "model.reward": "null"}
"""Groups and settings that only a run needs, unless they are given."""
PRINTED = 20
"""Problems of a file that are printed."""
SHOWN = 50
HELP = """\
Looks at files of prompts: Parquet, JSONL, JSON, or folders by datasets.save_to_disk.

Usage: python -m skyrl.data COMMAND FILE... [key=value ...] [--output PATH] [--rows N]

Commands:
  validate   name every bad row, decode every picture; --output writes all problems as JSON
  convert    write --output, a Parquet file of skyrl's own columns
  show       write --output (default prompts.html), a page with the first --rows rows (default 50) and their pictures
  stats      count kinds, verifiers, pictures, lengths; --output writes them as JSON

Settings that matter here:
  data.layout=verl                 what the columns mean (default: found out)
  data.system_prompt=… data.suffix=… data.picture_root=… data.max_pixels=…
  reward.verifier=math             verifier of rows that name none
  reward.verifiers={name: "package.module:function"}
  model.policy=/path/to/model      also measure prompts in tokens, against rollout.max_prompt_tokens

Examples:
  python -m skyrl.data validate train.parquet reward.verifier=math model.policy=/path/to/model
  python -m skyrl.data show geometry3k.parquet reward.verifier=math --output page.html
docs/data.md explains the columns.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m skyrl.data --help")


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says, 1 also for bad rows."""
    run_command(lambda: run(sys.argv[1:], Console()), "interrupted")


def run(arguments: list[str], console: Console) -> None:
    """Do what a command line says.

    Raises:
        ConfigError: for a wrong command line.
        DataError: for a file that can't be read or, of ``validate``, has bad rows.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, default=SHOWN)
    parser.add_argument("words", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    if given.help or not given.words:
        print(HELP, end="")
        return
    command, *words = given.words
    settings = [word for word in words if SETTING.match(word) and not Path(word).exists()]
    files = [word for word in words if word not in settings]
    if command not in COMMANDS:
        raise ConfigError(f"{command}: there is no such command; allowed: {', '.join(COMMANDS)}")
    if not files:
        raise ConfigError(f"{command}: which file? python -m skyrl.data {command} FILE…")
    if given.rows < 1:
        raise ConfigError(f"--rows {given.rows}: must be 1 or more")
    keys = {word.partition("=")[0].lstrip("+") for word in settings}
    front = [f"{key}={value}" for key, value in FRONT.items() if key not in keys]
    COMMANDS[command](files, compose_config([*front, *settings]), given, console)


Found = dict[str, Any]
"""A problem as JSON has it, and as it is said."""


def _validate(files: list[str], cfg: Config, given: argparse.Namespace, console: Console) -> None:
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    found, sound, lengths = list[Found](), list[Any](), _lengths(cfg)
    for file in files:
        own, opened = _checked(file, cfg, lengths)
        for said in [one["said"] for one in own[:PRINTED]]:
            tell(said)
        if len(own) > PRINTED:
            tell(f"{file}: and {len(own) - PRINTED} more{'' if given.output else ' (--output FILE.json writes all)'}")
        if opened is not None and not own:
            checked = "" if lengths is None else f", at most {lengths.limit} tokens each"
            tell(f"{file}: {len(opened)} prompts of the layout {opened.layout.value}, no errors{checked}")
            sound.append(opened)
        found += own
    for problem in _together(sound, cfg):
        tell(problem)
        found.append(_finding(None, problem))
    if given.output:
        _write_json(given.output, [{key: value for key, value in one.items() if key != "said"} for one in found])
    if found:
        named = {one["file"] for one in found} - {None}
        where = f"in {len(named)} of {len(files)} file(s)" if named else "that no single row shows"
        raise DataError(f"{len(found)} problem(s) {where}")


def _finding(
    file: str | None, problem: str, row: int | None = None, column: str | None = None, said: str = ""
) -> Found:
    return {"file": file, "row": row, "column": column, "problem": problem, "said": said or problem}


def _checked(file: str, cfg: Config, lengths: PromptLengths | None) -> tuple[list[Found], FilePrompts | None]:
    """What is wrong with a file, and the file if it can be opened."""

    def look(prompt: Prompt) -> None:
        if lengths is not None and (tokens := lengths.tokens(prompt)) > lengths.limit:
            raise DataError(f"the prompt has {tokens} tokens; rollout.max_prompt_tokens allows {lengths.limit}")

    found, opened = list[Found](), None
    try:
        opened = _opened(file, cfg)
        for one in opened.problems(look):
            found.append(_finding(file, one.problem, one.row, one.column, one.named(Path(file))))
    except DataError as error:
        found.append(_finding(file, str(error)))
    return found, opened


def _together(files: list[FilePrompts], cfg: Config) -> Iterator[str]:
    """What is wrong with files without a bad row: ids that stand in two of them, verifiers that can't be imported."""
    from skyrl.data.datasets import verifier_names
    from skyrl.data.mixture import check_ids
    from skyrl.rewards.runner import VerifierRunner

    try:
        check_ids(files, len(files))
    except DataError as error:
        yield str(error)
    reward = cfg.reward
    runner = VerifierRunner(reward.verifier_timeout, own=reward.verifiers, environment=reward.verifier_environment)
    with closing(runner):
        for name in {*verifier_names(files), *filter(None, [reward.verifier])}:
            try:
                runner.takes(name)
            except DataError as error:
                yield str(error)


def _convert(files: list[str], cfg: Config, given: argparse.Namespace, console: Console) -> None:
    from skyrl.data.mixture import check_ids
    from skyrl.data.parquet import write_parquet

    if given.output is None:
        raise ConfigError("convert: needs --output FILE.parquet")
    if any(given.output.resolve() == Path(file).resolve() for file in files):
        raise ConfigError(f"--output {given.output}: is one of the files that are read")
    if given.output.suffix != ".parquet":
        raise ConfigError(f"--output {given.output}: must end with .parquet, which is what is written")
    opened = [_opened(file, cfg, check=True) for file in files]
    check_ids(opened, len(opened))
    write_parquet(given.output, _prompts(opened))
    console.print(f"{given.output}: {sum(map(len, opened))} prompts", markup=False, highlight=False, soft_wrap=True)


def _show(files: list[str], cfg: Config, given: argparse.Namespace, console: Console) -> None:
    from itertools import islice

    from skyrl.data.overview import write_page

    path = given.output or Path("prompts.html")
    prompts = _prompts([_opened(file, cfg) for file in files])
    write_page(path, ", ".join(Path(file).name for file in files), islice(prompts, given.rows))
    console.print(f"open {path.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _stats(files: list[str], cfg: Config, given: argparse.Namespace, console: Console) -> None:
    from skyrl.data.overview import counted

    lengths, found = _lengths(cfg), dict[str, Any]()
    for file in files:
        opened = _opened(file, cfg, check=True)
        outlines = (opened.outline(row) for row in range(len(opened)))
        found[file] = counted(outlines, None if lengths is None else lengths.tokens)
        table = Table(title=file, title_justify="left", box=None, padding=(0, 2), pad_edge=False)
        for name in ("", "", "prompts"):
            table.add_column(name, justify="right" if name else "left")
        for name, values in found[file].items():
            rows = values.items() if isinstance(values, dict) else [("", values)]
            for place, (label, value) in enumerate(rows):
                table.add_row("" if place else name, label, str(value))
        console.print(table)
    if given.output:
        _write_json(given.output, found)


COMMANDS = {"validate": _validate, "convert": _convert, "show": _show, "stats": _stats}


def _opened(file: str, cfg: Config, check: bool = False) -> FilePrompts:
    from skyrl.data.files import FilePrompts
    from skyrl.data.reading import Reading

    return FilePrompts(file, Reading.of(cfg), check=check)


def _prompts(files: list[FilePrompts]) -> Iterator[Prompt]:
    return (file[row] for file in files for row in range(len(file)))


def _lengths(cfg: Config) -> PromptLengths | None:
    """Measures prompts by ``model.policy``, unless that is the embedded one."""
    if cfg.model.policy == "digits":
        return None
    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.lengths import PromptLengths

    encoder = PromptEncoder.configured(cfg.model.policy, cfg)
    return PromptLengths(encoder, cfg.rollout.max_prompt_tokens)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
