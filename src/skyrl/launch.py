"""``python -m skyrl.launch``: from the command line to a finished run.

Hydra composes the settings, they become one typed :class:`skyrl.settings.Config`, and only after it is found valid
are Ray and the libraries behind it imported. So a mistake in a setting is reported within seconds.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl.records import ConfigError, SkyrlError
from skyrl.settings import Config
from skyrl.settings.validation import validate

INSTALLED_CONF = Path(__file__).parent / "conf"
CONF = INSTALLED_CONF if INSTALLED_CONF.is_dir() else Path(__file__).parents[2] / "conf"

logger = logging.getLogger("skyrl")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    ConfigStore.instance().store(name="config_schema", node=Config)
    # Options and their values (--cfg job) are Hydra's own; an override has an equals sign or deletes with a tilde.
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    if not any(argument in ("--help", "-h", "--hydra-help") for argument in sys.argv[1:]):
        try:
            validate(compose_config(overrides))
        except ConfigError as error:
            print(f"wrong settings:\n{error}", file=sys.stderr)
            sys.exit(2)
    _hydra_main()


def compose_config(overrides: list[str]) -> Config:
    """The typed configuration for these Hydra overrides, not yet validated.

    Raises:
        ConfigError: for an unknown key or group, or a value of the wrong type; it names the key and near misses.
    """
    ConfigStore.instance().store(name="config_schema", node=Config)
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        try:
            # Interpolations such as the run folder's date need Hydra's own job, so they stay unresolved here.
            tree = hydra.compose("config", overrides=overrides)
            config = _to_config(tree)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error)) from error
    unknown = sorted(set(_keys(OmegaConf.to_container(tree))) - set(_settings()))
    if unknown:  # +key=value adds what no part of skyrl reads
        raise ConfigError("\n".join(map(_unknown, unknown)))
    if not config.run_dir:
        raise ConfigError("run_dir is empty: must be a folder")
    return config


def _to_config(tree: DictConfig) -> Config:
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    return config


def _explain(error: Exception) -> str:
    """Hydra's message in a sentence or two, with the keys that are near a mistyped one."""
    cause = error.__cause__ or error
    text = "\n".join(line for line in str(error).splitlines() if "append to your config" not in line)
    found = re.search(r"Could not override '([^']+)'", text)
    key = found.group(1) if found else str(getattr(cause, "full_key", "") or "")
    if found and key not in _settings():
        return _unknown(key)
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return f"{key}: {first}" if key and key not in first else text.strip()


def _unknown(key: str) -> str:
    keys = _settings()
    near = difflib.get_close_matches(key, keys, n=2, cutoff=0.8) or [
        k for k in keys if k.endswith("." + key.split(".")[-1])
    ]
    mend = f"; did you mean {' or '.join(near)}?" if near else "; `python -m skyrl.launch --cfg job` lists all keys"
    return f"{key}: there is no such setting{mend}"


def _settings() -> list[str]:
    """Every setting there is."""
    return _keys(OmegaConf.to_container(OmegaConf.structured(Config)))


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all leaves of a nested dictionary."""
    found: list[str] = []
    for name, value in tree.items():
        found += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


@hydra.main(config_path=str(CONF.resolve()), config_name="config", version_base="1.3")
def _hydra_main(tree: DictConfig) -> None:
    config = _to_config(tree)
    validate(config)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # As in the actors: this process trains the embedded models, perhaps beside other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from skyrl.run import run

    started = time.monotonic()
    try:
        run(config)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: {_resume_command(sys.argv[1:])}", file=sys.stderr)
        sys.exit(130)
    except SkyrlError as error:
        print(f"failed after {time.monotonic() - started:.0f} s: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _resume_command(arguments: list[str]) -> str:
    """The command that goes on with the run of these arguments: the same settings, from its newest checkpoint."""
    kept = [argument for argument in arguments if not argument.startswith("resume=")]
    return shlex.join([sys.executable, "-m", "skyrl.launch", *kept, "resume=auto"])


if __name__ == "__main__":
    main()
