"""The reference policy π_0, and its refreshes by the current policy (iterated MPO)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrl.learner.backend import Backend, NamedTensors
from skyrl.records import SkyrlError

FILE = "reference.safetensors"


class Reference:
    """The backend's frozen twin and the step that it is of. Only parameters that the policy trains change in it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.trained = {name for name, p in backend.model.named_parameters() if p.requires_grad}
        self.step = 0
        """The step after which it was refreshed last; 0 while it is the starting policy."""

    def replace(self, parameters: NamedTensors, step: int) -> None:
        """Become the policy with these trained parameters (whole tensors) after ``step``. Collective under ZeRO-3.

        Raises:
            SkyrlError: if they are not exactly the trained ones.
        """
        self.backend.set_reference(self._checked(parameters))
        self.step = step

    def _checked(self, parameters: NamedTensors) -> NamedTensors:
        left = set(self.trained)
        for name, whole in parameters:
            if name not in left:
                raise SkyrlError(f"reference policy: parameter {name!r} came twice or is not a trained one")
            left.remove(name)
            yield name, whole
        if left:
            raise SkyrlError(f"reference policy: {len(left)} parameters are missing, for example {min(left)!r}")

    def save(self, folder: Path, rank: int) -> None:
        """Write what a refresh has changed; nothing if there was none. Collective under ZeRO-3."""
        if self.step == 0:
            return
        found = self.backend.parameters(self.trained, reference=True)
        kept = {name: whole.cpu().contiguous() for name, whole in found if rank == 0}
        if rank == 0:
            save_file(kept, Path(folder) / FILE, metadata={"step": str(self.step)})

    def load(self, folder: Path, step: int, start: Callable[[], NamedTensors]) -> None:
        """Continue from what :meth:`save` wrote. Collective under ZeRO-3.

        Args:
            step: The step of its last refresh; 0 if there was none.
            start: Gives the starting policy's parameters; called if this reference has left them.

        Raises:
            SkyrlError: if the file is missing, damaged, or of another step.
        """
        if step == 0:
            if self.step != 0:
                self.replace(((name, p) for name, p in start() if name in self.trained), 0)
            return
        file = Path(folder) / FILE
        if not file.is_file():
            raise SkyrlError(f"the reference policy was refreshed after step {step}, but {folder} has no {FILE}")
        try:
            with safe_open(file, "pt") as saved:
                if (written := (saved.metadata() or {}).get("step")) != str(step):
                    raise SkyrlError(f"{file} was written after step {written}; expected: {step}")
                self.replace(((name, saved.get_tensor(name)) for name in saved.keys()), step)  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:  # the latter for a tensor of another shape
            raise SkyrlError(f"{file} is damaged, or no reference policy of this one: {error}") from error
