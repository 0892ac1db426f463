"""The checks of a run before it is one: each says what it found, or what is wrong and what helps.

``python -m skyrl.doctor`` makes a table of them; ``skyrl.run`` makes the cheap ones before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Literal

from skyrl.checks import data, machine, policy
from skyrl.checks.subject import Check, Finding, Skip, Subject
from skyrl.records import SkyrlError
from skyrl.settings import Config

CHEAP_ROWS = 24
CAUGHT = (SkyrlError, ImportError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What a library says of a model folder, a file or a machine that it can't use."""
CHECKS = [
    Check(
        "packages",
        machine.packages,
        "install them as the README says, in the environment that starts the run",
        cheap=True,
    ),
    Check(
        "resources",
        machine.resources,
        "fewer workers, or less num_cpus for each: they take turns at controller.lag=0",
        cheap=True,
    ),
    Check(
        "data",
        data.rows,
        "mend the row that is named; docs/data.md has the columns, python -m skyrl.data checks whole files",
        cheap=True,
    ),
    Check(
        "verifiers",
        data.verifiers,
        "write the truths as the verifier reads them, name one that can be imported, or mend it (docs/verifiers.md)",
        needs="data",
        cheap=True,
    ),
    Check(
        "memory",
        machine.memory,
        "lower rollout.kv_cache_gib or numbers of workers, shard by learner.zero_stage, or set learner.lora.rank",
    ),
    Check("pictures", policy.pictures, "docs/models_table.md lists models that take pictures", needs="data"),
    Check(
        "chat template",
        policy.chat_template,
        "put the chat template of the model's family into chat_template.jinja in its folder; docs/models.md says more",
        needs="pictures",
    ),
    Check(
        "prompt form",
        policy.prompt_form,
        "let the data hold plain questions, and let either the chat template or the tokenizer write the beginning",
        needs="chat template",
    ),
    Check(
        "stop tokens",
        policy.stop_tokens,
        "name the token that ends a turn as eos_token_id in the folder's generation_config.json",
    ),
    Check(
        "picture tokens",
        policy.picture_tokens,
        "use the processor files that belong to the model; the picture's size must be one that it can handle",
        needs="pictures",
    ),
    Check("context", policy.context, "lower rollout.max_new_tokens or rollout.max_prompt_tokens"),
    Check(
        "prompt lengths",
        data.lengths,
        "raise rollout.max_prompt_tokens, or set data.overlong to drop or cut",
        needs="pictures",
    ),
]
"""In the order in which they are made."""


def run_checks(subject: Subject, checks: Sequence[Check]) -> Iterator[Finding]:
    """One finding a check, as each is done."""
    failed = set[str]()
    for check in checks:
        started = perf_counter()
        status: Literal["pass", "fail", "skip"] = "pass"
        try:
            if check.needs in failed:
                failed.add(check.name)  # nor can be looked at what needs this one
                raise Skip(f"needs the check {check.needs!r}, which failed or could not be made")
            said = check.look(subject)
        except Skip as reason:
            status, said = "skip", str(reason)
        except CAUGHT as error:
            status, said = "fail", str(error) if isinstance(error, SkyrlError) else f"{type(error).__name__}: {error}"
        if status == "fail":
            failed.add(check.name)
        remedy = check.remedy if status == "fail" else ""
        yield Finding(check.name, status, said, remedy, round(perf_counter() - started, 3))


def cheap_checks(cfg: Config, policy: str) -> Subject:
    """The checks that need less than two seconds, before Ray or a model starts. Returns what was looked at.

    Raises:
        SkyrlError: of the kind that the check raised, with the remedy.
    """
    subject = Subject(cfg, policy, rows=CHEAP_ROWS)
    for check in CHECKS:
        if check.cheap:
            try:
                check.look(subject)
            except Skip:
                continue
            except SkyrlError as error:
                raise type(error)(f"{error}\n{check.name}: {check.remedy}") from error
    return subject
