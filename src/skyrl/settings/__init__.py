"""Every setting, with its default, its limits and its meaning in one place: its field.

Imports neither torch, ray nor vllm. ``skyrl.cli`` composes the files in ``conf/``, which hold only what differs from
the defaults, into one :class:`Config`.
"""

# ruff: noqa: F403 -- each class is listed once, in its module
from skyrl.digits.settings import *
from skyrl.settings.alarms import *
from skyrl.settings.algorithm import *
from skyrl.settings.buffer import *
from skyrl.settings.evaluate import *
from skyrl.settings.grpo import *
from skyrl.settings.reward import *
from skyrl.settings.run import *
from skyrl.settings.system import *
from skyrl.settings.thresholds import *
