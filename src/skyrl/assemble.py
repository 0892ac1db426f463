"""``python -m skyrl.assemble``: a vision tower, a language model and an adapter become one vision-language policy.

Skywork R1V2 joins a vision tower and a reasoning model that were never trained together, by a small adapter between
them, and trains that alone first (its modular reassembly). Here the *frame* is a vision-language model that gives its
tower, its picture processor and its way of joining; the language model takes the place of the frame's own.

Nothing is believed: before the folder is written, text-only logits must be those of the language model, and the
picture features that reach the adapter those of the frame's tower, to the bit.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl.cli import run_command
from skyrl.records import ConfigError, SkyrlError

if TYPE_CHECKING:
    import torch

KEYS = {"vision": None, "language": None, "output": None, "adapter": "new", "seed": "0"}
HELP = """\
Joins a vision tower and a language model that were trained apart into one policy.

Usage: python -m skyrl.assemble vision=FOLDER language=FOLDER output=FOLDER [adapter=new|FOLDER] [seed=0]

  vision     Hugging Face folder of a vision-language model: its tower, picture processor and architecture are taken
  language   Hugging Face folder of a causal language model, or of a vision-language model whose language part is taken
  output     folder that is written; it must not exist
  adapter    new: fresh weights by seed. A folder: those of an assembled model of the same sizes

Then train the adapter alone: python -m skyrl.launch model=huggingface model.policy=OUTPUT learner.trainable=adapter
docs/models.md has an example.
"""
PROBE_PICTURES = ((32, 32), (640, 320))
"""Height and width of pictures that show which tokens the frame's processor writes for one."""
FLATTEN = (
    "{{%- set flat = namespace(messages=[]) -%}}{{%- for m in messages -%}}{{%- set text = namespace(all='') -%}}"
    "{{%- if m['content'] is string -%}}{{%- set text.all = m['content'] -%}}{{%- else -%}}"
    "{{%- for part in m['content'] -%}}{{%- if part['type'] == 'image' -%}}{{%- set text.all = text.all + {image} -%}}"
    "{{%- else -%}}{{%- set text.all = text.all + part['text'] -%}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}"
    "{{%- set flat.messages = flat.messages + [dict(m, content=text.all)] -%}}{{%- endfor -%}}"
    "{{%- set messages = flat.messages -%}}"
)
"""Put before a language model's own chat template, which then reads plain texts with the picture's token in place."""


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    run_command(lambda: _work(sys.argv[1:]), "interrupted; nothing was written")


def _work(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return
    report = assemble(**_settings(arguments))
    print(json.dumps(report, indent=2))


def _settings(arguments: list[str]) -> dict[str, Any]:
    """The arguments of :func:`assemble`; ConfigError naming all that is wrong."""
    given, problems = dict(KEYS), list[str]()
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or key not in KEYS:
            problems.append(f"{text}: must be one of {', '.join(f'{name}=…' for name in KEYS)}")
        given[key] = value
    problems += [f"{name}=: must be given; --help shows how" for name, value in given.items() if not value]
    folders = [
        name for name in ("vision", "language", "adapter") if given[name] and (name, given[name]) != ("adapter", "new")
    ]
    for name in folders:
        if not (Path(str(given[name])).expanduser() / "config.json").is_file():
            problems.append(f"{name}={given[name]}: must be a Hugging Face folder; it has no config.json")
    if given["output"] and Path(given["output"]).exists():
        problems.append(f"output={given['output']}: exists already; give another folder or remove it")
    if not str(given["seed"]).isdecimal():
        problems.append(f"seed={given['seed']}: must be 0 or more")
    if problems:
        raise ConfigError("\n".join(problems))
    paths = {name: Path(str(given[name])).expanduser() for name in ("vision", "language", "output")}
    adapter = None if given["adapter"] == "new" else Path(str(given["adapter"])).expanduser()
    return {**paths, "adapter": adapter, "seed": int(str(given["seed"]))}


def assemble(vision: Path, language: Path, output: Path, adapter: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Join, prove, and write ``output``.

    Args:
        vision: Folder of the frame.
        language: Folder of the language model.
        adapter: Folder whose adapter is taken; None makes a fresh one from ``seed``.

    Returns:
        What was joined, with parameters per part: also written as ``assembled.json``.

    Raises:
        ConfigError: if a folder is not of the right kind, or an adapter does not fit.
        SkyrlError: if the joined model is not the sum of its parts.
    """
    import torch

    from skyrl.policy.module import load_policy, module_of
    from skyrl.policy.processor import load_processor

    shown = load_processor(str(vision))  # first: it may need a stand-in before transformers is imported
    from transformers import AutoTokenizer

    frame, text = load_policy(str(vision), "float32").eval(), load_policy(str(language), "float32").eval()
    if not hasattr(frame.config, "vision_config"):
        raise ConfigError(
            f"vision={vision}: a {type(frame).__name__} has no vision tower; give a vision-language model"
        )
    tokenizer = AutoTokenizer.from_pretrained(language)
    processor = _processor(shown, tokenizer)
    config = _config(frame, text, shown.tokenizer, tokenizer)
    torch.manual_seed(seed)
    model = type(frame)(config).eval()
    parts = {"vision": frame, "adapter": None if adapter is None else load_policy(str(adapter), "float32")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (source := parts.get(module_of(name))) is not None:
                given = dict(source.named_parameters()).get(name)
                if given is None or given.shape != parameter.shape:
                    found = "nothing" if given is None else list(given.shape)
                    raise ConfigError(f"{module_of(name)}: {name} must be {list(parameter.shape)}, got {found}")
                parameter.copy_(given)
        _put_language(model, text)
    prove(model, frame, text, processor)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    counts = dict.fromkeys(("vision", "adapter", "language"), 0)
    for name, parameter in model.named_parameters():
        counts[module_of(name)] += parameter.numel()
    report = {"vision": str(vision), "language": str(language), "adapter": str(adapter or "new"), "seed": seed}
    report |= {"architecture": type(model).__name__, "parameters": counts}
    (output / "assembled.json").write_text(json.dumps(report, indent=2))
    return report


# ---------------------------------------------------------------- tokens


def _processor(frame: Any, tokenizer: Any) -> Any:
    """The frame's processor around the language model's tokenizer, which gets the tokens that pictures are written
    with."""
    if not tokenizer.chat_template:
        raise ConfigError("language: it has no chat template, so no prompt can be written for it")
    new = [token for token in _picture_tokens(frame) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.chat_template = FLATTEN.format(image=repr(frame.image_token)) + str(tokenizer.chat_template)
    made = copy.deepcopy(frame)
    made.tokenizer, made.chat_template = tokenizer, tokenizer.chat_template
    return made


def _picture_tokens(processor: Any) -> list[str]:
    """The tokens that a processor writes in the place of pictures, found by having it write some."""
    import numpy as np

    if not getattr(processor, "image_token", None):
        raise ConfigError(f"vision: a {type(processor).__name__} names no image_token")
    ids: set[int] = set()
    for height, width in PROBE_PICTURES:
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        ids |= {int(i) for i in np.ravel(processor(text=[processor.image_token], images=[picture])["input_ids"][0])}
    added = processor.tokenizer.added_tokens_decoder
    return sorted({str(added[i]) for i in ids if i in added} | {str(processor.image_token)})


def _config(frame: Any, text: Any, old: Any, new: Any) -> Any:
    """The frame's configuration around the language model's, token ids translated."""
    config, inner = copy.deepcopy(frame.config), copy.deepcopy(text.config.get_text_config())
    inner.vocab_size = max(inner.vocab_size, len(new))
    config.text_config = inner
    config.tie_word_embeddings = bool(inner.tie_word_embeddings)
    for name, value in vars(frame.config).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int):
            setattr(config, name, new.convert_tokens_to_ids(old.convert_ids_to_tokens(value)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # those of the language, whatever the frame's were
        setattr(config, name, getattr(inner, name, None))
    return config


# ---------------------------------------------------------------- weights


def _put_language(model: Any, text: Any) -> None:
    """Copy the language model; rows of new tokens get the mean of the old ones."""
    source = _decoder(text)
    target = _decoder(model)
    if type(source) is not type(target):
        raise ConfigError(f"language: the frame makes a {type(target).__name__} of it, it is a {type(source).__name__}")
    state: Mapping[str, torch.Tensor] = source.state_dict()
    embedding = next(name for name, part in source.named_modules() if part is text.get_input_embeddings())
    grown = dict(state)
    grown[f"{embedding}.weight"] = _grown(state[f"{embedding}.weight"], target.get_input_embeddings().weight)
    target.load_state_dict(grown)
    if not model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        head.weight.copy_(_grown(text.get_output_embeddings().weight, head.weight))


def _decoder(model: Any) -> Any:
    """The part that reads embeddings: the smallest one that holds the embedding and all layers."""
    embedding = model.get_input_embeddings()
    holders = [part for part in model.modules() if any(own is embedding for own in part.children())]
    if len(holders) != 1:
        raise ConfigError(
            f"language: a {type(model).__name__} holds its embedding in {len(holders)} places; expected: 1"
        )
    return holders[0]


def _grown(old: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``old`` [V, D] with as many rows as ``like``."""
    import torch

    return torch.cat([old, old.mean(0, keepdim=True).expand(len(like) - len(old), -1)]) if len(like) > len(old) else old


# ---------------------------------------------------------------- proof


def prove(model: Any, frame: Any, text: Any, processor: Any) -> None:
    """Compare the joined model with its parts on a random text and a random picture.

    Raises:
        SkyrlError: if text-only logits or the features that the adapter gets differ in any bit.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    old = text.get_output_embeddings().weight.shape[0]
    words = torch.randint(0, old, (2, 16), generator=generator)
    known = [i for i in range(old) if i != model.config.image_token_id]
    words = torch.tensor(known)[words % len(known)]
    with torch.no_grad():
        ours, theirs = model(input_ids=words).logits[..., :old], text(input_ids=words).logits
    if not torch.equal(ours, theirs):
        raise SkyrlError(f"text-only logits differ from the language model's by {(ours - theirs).abs().max():.3g}")
    given, expected = (_features(one, processor) for one in (model, frame))
    if not all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)):
        raise SkyrlError("the features that reach the adapter differ from those of the vision tower")


def _features(model: Any, processor: Any) -> list[torch.Tensor]:
    """What the model's adapter is given for a random picture."""
    import numpy as np
    import torch

    from skyrl.policy.module import module_of

    picture = np.random.default_rng(2).integers(0, 256, (*PROBE_PICTURES[0], 3), dtype=np.uint8)
    inputs = processor.image_processor(images=[picture], return_tensors="pt")
    seen: list[torch.Tensor] = []
    names = [n for n, part in model.named_modules() if n and module_of(f"{n}.") == "adapter" and [*part.parameters()]]
    if not names:
        raise ConfigError(f"vision: a {type(model).__name__} has no adapter whose name is known")
    hook = model.get_submodule(names[0]).register_forward_pre_hook(
        lambda _part, given, named: seen.extend(t for t in (*given, *named.values()) if isinstance(t, torch.Tensor)),
        with_kwargs=True,
    )
    kept = {name: value for name, value in inputs.items() if name in _parameters(model.get_image_features)}
    with torch.no_grad():
        model.get_image_features(**kept)
    hook.remove()
    return seen


def _parameters(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


if __name__ == "__main__":
    main()
