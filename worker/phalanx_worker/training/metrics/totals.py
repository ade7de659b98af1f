"""Where the time of a run went, added up for its goodput.

Owns the sums. Seconds come in from the loop; it reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Totals:
    """Running sums in seconds, after the first step of this process, which is part of its setup. `productive_s` is time
    in steps that still count, without their wait for data; `lost_s` that of steps that were skipped or rolled back."""

    productive_s: float = 0.0
    lost_s: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_s: float = 0.0
    _kept: dict[int, float] = field(default_factory=dict)  # step of a checkpoint -> productive_s then

    def step(self, *, work_s: float, data_wait_s: float, counts: bool) -> None:
        """One step has been taken."""
        self.data_wait_s += data_wait_s
        if counts:
            self.productive_s += work_s
        else:
            self.lost_s += work_s

    def kept(self, step: int, stall_s: float) -> None:
        """A checkpoint of this step was made, for which training stood still."""
        self.checkpoint_s += stall_s
        self._kept[step] = self.productive_s

    def went_back(self, step: int) -> None:
        """Training goes on from this step's checkpoint: what came after it does not count any more."""
        then = self._kept.get(step, 0.0)
        self.lost_s += self.productive_s - then
        self.productive_s = then
        self._kept = {kept: at for kept, at in self._kept.items() if kept <= step}
