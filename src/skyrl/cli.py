"""What all commands share: from the command line to one checked :class:`skyrl.settings.Config`, and the frame around
the work, with its signals, exit codes and errors.

Hydra composes the files of ``conf/`` and the overrides; ``skyrl.settings`` checks the result. Nothing heavy is imported
before a command's work begins, so a mistake in a setting is reported within seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl.records import ConfigError, SkyrlError
from skyrl.redaction import RedactingFormatter, redact
from skyrl.schema import unknown_key
from skyrl.settings import Config, all_settings, checked

INSTALLED_CONF = Path(__file__).parent / "conf"
CONF = INSTALLED_CONF if INSTALLED_CONF.is_dir() else Path(__file__).parents[2] / "conf"
OPTIONS = """
Options:
  --cfg job          print every setting with its value, and do nothing
  --config-dir DIR   look for more files of settings in DIR, such as DIR/experiment/mine.yaml for experiment=mine
  --help             print this

Groups and their options:
"""


def run_command(work: Callable[[], object], interrupted: str) -> None:
    """Do a command's work and end the process as every command does: 0 done, 1 failed, 2 wrong settings, 130
    interrupted (Ctrl-C, SIGTERM, SIGHUP). An expected error is a few lines on stderr, without a traceback.

    Args:
        interrupted: what to print after an interruption.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _print_traceback
    # transformers warns of the *default* configuration of an architecture each time that it shows one.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    # As in the actors: this process trains the embedded models, perhaps beside other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    started = time.monotonic()
    try:
        work()
    except KeyboardInterrupt:
        _end(130, interrupted)
    except ConfigError as error:
        _end(2, f"wrong settings:\n{error}")
    except (SkyrlError, OSError) as error:  # OSError: a full disk, a folder that can't be written to
        _end(1, f"failed after {time.monotonic() - started:.0f} s: {type(error).__name__}: {error}")


def _end(code: int, text: str) -> NoReturn:
    print(redact(text), file=sys.stderr)
    sys.exit(code)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; allowed are key=value, group=option, --cfg job, --config-dir DIR and --help")


def read_settings(
    arguments: Sequence[str], help_text: str, with_learner: bool = True, with_files: bool = True
) -> Config | None:
    """The checked configuration of a command line; None if it only asked to print something, which is done.

    Args:
        arguments: ``key=value``, ``group=option`` and the options in :data:`OPTIONS`.
        help_text: printed by ``--help``, before the options.
        with_learner: False if the command starts no learner.
        with_files: False if models and data need not be there.

    Raises:
        ConfigError: naming everything that is wrong, one problem a line.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job",))
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    if given.help:
        groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
        print(help_text, OPTIONS, *(f"  {group}: {', '.join(_options([CONF], group))}\n" for group in groups), sep="")
        return None
    if given.multirun:
        raise ConfigError("--multirun: one command is one run; start one for each value")
    if given.cfg is not None:
        print(OmegaConf.to_yaml(_compose(given.overrides, given.config_dir)), end="")
        return None
    return compose_config(given.overrides, given.config_dir, with_learner, with_files)


def compose_config(
    overrides: Sequence[str], config_dir: Path | None = None, with_learner: bool = True, with_files: bool = True
) -> Config:
    """The checked configuration for these Hydra overrides; for the rest see :func:`read_settings`."""
    tree = _compose(overrides, config_dir)
    try:
        data = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(data, dict)
    config = checked({str(key): value for key, value in data.items()}, with_learner, with_files)
    if not config.run_dir:
        raise ConfigError("run_dir=: must be a folder")
    return config


def _compose(overrides: Sequence[str], config_dir: Path | None) -> DictConfig:
    """What Hydra makes of files and overrides, unchecked and with its interpolations unresolved."""
    folders = [CONF] if config_dir is None else [CONF, config_dir]
    if not folders[-1].is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
    accepted, problems = list[str](), list[str]()
    for text in overrides:
        try:
            accepted.append(_override(text, folders))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    if config_dir is not None:
        accepted.append(f'hydra.searchpath=["file://{config_dir.resolve()}"]')
    ConfigStore.instance().store(name="defaults", node=Config().model_dump(mode="json"))
    try:
        with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return hydra.compose("config", overrides=accepted)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _override(text: str, folders: Sequence[Path]) -> str:
    """A word of the command line as Hydra shall get it; raises ConfigError if it can't be read."""
    key, equals, value = text.lstrip("+").partition("=")
    if not key or not equals or key.startswith("~"):
        raise ConfigError(f"{text or repr(text)}: must be key=value or group=option")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        quoted = shlex.quote('{}="{}"'.format(key, value.replace('"', '\\"')))
        raise ConfigError(
            f"{text}: this value can't be read; = ( [ {{ ~ # ; quotes and letters beyond ASCII must stand in quotes "
            f"of their own (in a list, those of each item): {quoted}"
        ) from error
    if override.is_sweep_override():
        raise ConfigError(f"{text}: one command is one run; write a list as [a,b], and put text with a comma in quotes")
    if key.startswith(("hydra.", "hydra/")):
        raise ConfigError(unknown_key(key, all_settings()))
    if options := _options(folders, key):
        chosen = override.value()
        if any(name not in options for name in (chosen if isinstance(chosen, list) else [chosen])):
            raise ConfigError(f"{text}: must be one of {', '.join(options)}")
        return text
    return f"++{key}={value}"  # Hydra then lets an unknown key pass, and all that is wrong is reported together


def _options(folders: Sequence[Path], group: str) -> list[str]:
    """The options of a group; none if there is no such group."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
