"""The embedded default models: built once from seeds, cached under a key of what shapes them.

That is the settings and the seed, the versions of the libraries that compute them, and the code that runs meanwhile,
function by function (:data:`CODE`). Not in the key is the machine: another processor rounds otherwise.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from skyrl.digits.settings import DigitsConfig
from skyrl.settings import Config

SCENES = 20_000
TEXT_SHARE = 0.15
DONE = "recipe.json"
STAGES = {
    "warm_start_steps": "embedded policy: supervised warm start",
    "reward_body_steps": "embedded reward model: body",
    "reward_steps": "embedded reward model: Bradley-Terry",
}
"""Length of each stage of the build → what its progress bar says."""
LIBRARIES = ("numpy", "pillow", "scikit-learn", "tokenizers", "torch", "transformers")
CODE = {
    "digits/architecture.py": "build_config build_processor build_tokenizer",
    "digits/embedded.py": "_build",
    "digits/scenes.py": "DigitScenes.__init__ DigitScenes.__len__ DigitScenes._draw DigitScenes._misread "
    "DigitScenes._prompt DigitScenes._sum DigitScenes.with_reasoning FORM SCENE_PIXELS _chain digit_pool "
    "held_out_sum solve",
    "digits/settings.py": "MAX_POSITIONS PICTURE_KINDS",
    "digits/training.py": "_margins build_pairs fit learning_rate_factor reasoning_errors sample_answers "
    "train_reward_model warm_start",
    "objective/reductions.py": "_rows_logprobs token_logprobs",
    "policy/chat.py": "ChatTemplate.__init__ ChatTemplate._render ChatTemplate._try ChatTemplate._writes "
    "ChatTemplate._form ChatTemplate.prompt _message _wrote",
    "policy/encode.py": "PromptEncoder.__init__ PromptEncoder._ids PromptEncoder._turn_end "
    "PromptEncoder.answer_ids PromptEncoder.chat_text PromptEncoder.check_question PromptEncoder.collate "
    "PromptEncoder.encode PromptEncoder.encode_anew "
    "PromptEncoder.ended PromptEncoder.forbidden_token_ids PromptEncoder.text_ids TAGS _bytes_of _join",
    "records.py": "Prompt.conversation Prompt.key",
    "rewards/reward_model.py": "RewardModel.__init__ RewardModel._likelihoods RewardModel.features "
    "RewardModel.forward RewardModel.judge RewardModel.save RewardModel.states",
}
"""File → its functions that run while the models are built, and its constants that those of other files import.
``tests/unit/test_embedded.py`` traces a small build and says what is missing or too much here."""


def cache_folder(cfg: DigitsConfig) -> Path:
    """Where embedded models are kept: ``digits.cache_dir``, ``$SKYRL_CACHE`` or ``~/.cache/skyrl``."""
    return Path(cfg.cache_dir or os.environ.get("SKYRL_CACHE") or Path.home() / ".cache" / "skyrl").expanduser()


def recipe(cfg: DigitsConfig) -> dict[str, object]:
    """Everything that decides what the built models are."""
    root = Path(__file__).parents[1]
    return {
        "settings": cfg.model_dump(include={*STAGES, "model_seed"}),
        "code": {f: _code_digest((root / f).read_text(encoding="utf-8"), names.split()) for f, names in CODE.items()},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _code_digest(source: str, names: Collection[str]) -> str:
    """Digest of functions (``function`` or ``Class.method``) and constants of a module, and of the constants and
    imports that they name. Comments, docstrings and layout don't count.

    Raises:
        KeyError: if the module has no such name.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    known, others = dict[str, ast.AST](), dict[str, ast.AST]()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            single = [part for target in targets for part in getattr(target, "elts", [target])]
            others |= {part.id: node for part in single if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                others[name] = ast.ImportFrom(getattr(node, "module", None), [alias], 0)
        elif isinstance(node, ast.FunctionDef):
            known[node.name] = node
        elif isinstance(node, ast.ClassDef):
            known |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    kept, more = dict[str, ast.AST](), set(names)
    while more:
        kept |= {name: (known | others)[name] for name in more}
        named = {part.id for node in kept.values() for part in ast.walk(node) if isinstance(part, ast.Name)}
        more = named & others.keys() - kept.keys()
    return hashlib.sha256(repr(sorted((name, ast.dump(node)) for name, node in kept.items())).encode()).hexdigest()


def embedded_models(cfg: Config) -> tuple[Path, Path]:
    """Folders of policy and reward model, ``model.policy=digits`` and ``model.reward=digits``. Trains both, for
    minutes, if ``digits.cache_dir`` has none for this recipe.

    A half-built model is never seen: the build happens in a temporary folder that is renamed when complete.
    """
    digits = cfg.digits
    text = json.dumps(recipe(digits), sort_keys=True, indent=2)
    folder = cache_folder(digits) / f"digits-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / DONE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, refresh_per_second=2) as bar:
                tasks = [bar.add_task(text, total=getattr(digits, steps)) for steps, text in STAGES.items()]
                _build(digits, build, lambda stage, step, _loss: bar.update(tasks[stage], completed=step))
            (build / DONE).write_text(text)
            if folder.exists() and not (folder / DONE).is_file():
                shutil.rmtree(folder)  # somebody took files out of it
            try:
                build.rename(folder)
            except OSError:
                if not (folder / DONE).is_file():  # another process may have finished the same build first
                    raise
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return folder / "policy", folder / "reward"


def _build(cfg: DigitsConfig, folder: Path, show: Callable[[int, int, float], None]) -> None:
    """Train both models; ``show`` is called with (place in :data:`STAGES`, step, loss) after each step."""
    import torch
    from transformers import Idefics3ForConditionalGeneration
    from transformers.utils import logging

    from skyrl.digits.architecture import build_config, build_processor
    from skyrl.digits.scenes import DigitScenes
    from skyrl.digits.training import train_reward_model, warm_start
    from skyrl.policy.encode import PromptEncoder

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of the library's own default configuration
    torch.manual_seed(cfg.model_seed)
    encoder = PromptEncoder(build_processor())
    policy = Idefics3ForConditionalGeneration(build_config(encoder.tokenizer))

    scenes = DigitScenes("train", SCENES, TEXT_SHARE, cfg.model_seed)
    warm_start(policy, encoder, scenes, cfg.warm_start_steps, partial(show, 0), careless=True)
    policy.save_pretrained(folder / "policy")
    encoder.processor.save_pretrained(folder / "policy")

    scenes = DigitScenes("reward", SCENES, TEXT_SHARE, cfg.model_seed)
    # The judge must see better than the judged: its body is the policy's, taught on by the faithful teacher.
    body = copy.deepcopy(policy)
    warm_start(body, encoder, scenes, cfg.reward_body_steps, partial(show, 1))
    model, accuracy = train_reward_model(
        policy, body, encoder, scenes, cfg.reward_steps, cfg.model_seed, partial(show, 2)
    )
    model.save(folder / "reward")
    (folder / "reward" / "pair_accuracy.json").write_text(json.dumps({"held_out_pair_accuracy": accuracy}))
