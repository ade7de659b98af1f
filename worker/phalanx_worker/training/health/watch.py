"""Watches a training and acts as the job file's `health` says: warn, skip the update, roll back, restart, stop.

Owns what is done about a finding, and that it is told once. Every rank sees the same numbers and decides alike. The
rules are in `rules`, the comparisons in `checksums` and `recompute`; it refuses to know how a checkpoint is restored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from phalanx.recipes.health import Health
from torch import nn

from phalanx_worker.training.health import checksums
from phalanx_worker.training.health.recompute import Again, Dice, Pulse, recompute
from phalanx_worker.training.health.rules import Divergence, Edge, Spikes, slow_rank
from phalanx_worker.training.health.telling import Finding, end, tell
from phalanx_worker.training.metrics.spread import Spread

MOST_ROLLBACKS = 5  # in one attempt; what keeps coming back is not cured by going back


class Watch:
    """Call `before_forward`, `after_backward` and `after_step`, in this order in every step, on every rank.

    `replicas` are the ranks that hold the same parameters as this one, `modules` have these; `meets(step)`:
    whether they are equal after that step (under local SGD they are only now and then). `alike`: the ranks of each
    stage of a pipeline, None without one: stages differ in what they have to do, so that stragglers are looked for
    within each alone, and not at all where a stage has one rank. `can_return`: there are checkpoints to roll back to.
    `repeatable`: a step can be computed twice.

    What the rules of the loss remember is its state, the same on every rank: a later attempt goes on watching with it,
    and a rollback takes it back to what it was then.
    """

    def __init__(
        self,
        health: Health,
        *,
        device: torch.device,
        modules: Sequence[nn.Module],
        replicas: dist.ProcessGroup | None = None,
        meets: Callable[[int], bool] = lambda step: True,
        alike: Sequence[Sequence[int]] | None = None,
        can_return: bool = False,
        repeatable: bool = True,
    ) -> None:
        self._health = health
        self._modules, self._replicas, self._meets = modules, replicas, meets
        self._alike = alike
        self._can_return, self._repeatable = can_return, repeatable
        self._dice = Dice(device, modules)
        self._spikes = Spikes(factor=health.spike.factor, window=health.spike.window)
        self._divergence = Divergence(factor=health.divergence.factor, steps=health.divergence.steps)
        self._sick, self._told, self._diverged, self._slow = Edge(), Edge(), Edge(), Edge()
        self._refused: Counter[str] = Counter()  # updates in a row, by the check that refused them
        self._rollbacks = 0
        self._return_before: int | None = None
        self._going_back: tuple[Finding, int]  # what for, and to before which step, the last time
        self._again: Again | None = None
        self._compare_due = False
        self._work_s: list[float] = []
        self._work_steps = 0

    def before_forward(self) -> None:
        self._dice.keep()

    def after_backward(self, pulse: Pulse, again: Again) -> tuple[Pulse, bool]:
        """Whether to apply the update; and the pulse, a new one where the step was computed again."""
        self._again = again
        finding = self._look(pulse)
        if self._sick.begins(finding and finding.check) and self._repeatable:
            pulse = self._compute_again(pulse, again)
            finding = self._look(pulse)
        new = self._told.begins(finding and finding.check)
        if finding is None or self._treat(finding, pulse, new=new):
            self._refused.clear()
            self._spikes.remember(pulse.loss)
            return pulse, True
        return pulse, False

    def after_step(self, step: int, loss: float, *, keeps: bool) -> int | None:
        """The step before which to roll back to, if so. `keeps`: a checkpoint follows, which is not to hold what a
        comparison would have found."""
        if self._return_before is None:
            self._look_for_divergence(step, loss)
        if self._return_before is None:
            self._look_for_corruption(step, keeps=keeps)
        before, self._return_before = self._return_before, None
        return before

    def keep_before(self, step: int) -> int | None:
        """Were a rise of the loss that is under way, or begins to show after this step, found to be a divergence: the
        step before which to roll back to. None where that is not what is done about it."""
        if self._health.divergence.action != "rollback":
            return None
        return step - self._divergence.steps_since + 1

    def state_dict(self) -> dict[str, Any]:
        return {"spikes": self._spikes.state_dict(), "divergence": self._divergence.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spikes.load_state_dict(state_dict["spikes"])
        self._divergence.load_state_dict(state_dict["divergence"])

    def take(self, spread: Spread, step: int) -> None:
        """Times of all ranks over some steps."""
        rule = self._health.straggler
        if rule.action == "off":
            return
        more = [work_s * spread.steps for work_s in spread.work_s]
        self._work_s = [a + b for a, b in zip(self._work_s or [0.0] * len(more), more, strict=True)]
        self._work_steps += spread.steps
        if self._work_steps >= rule.window:
            self._look_for_stragglers(step, spread)
            self._work_s, self._work_steps = [], 0

    def returned(self, step: int | None) -> None:
        """Training was rolled back to this step; None where no checkpoint is old enough. Raises Unhealthy then."""
        finding, before = self._going_back
        if step is None:
            _end_without_return(finding, f"there is no checkpoint from before step {before}")
        self._refused.clear()
        self._told = Edge()

    def _look(self, pulse: Pulse) -> Finding | None:
        """What is wrong with the loss or the gradient of a step."""
        health = self._health
        if health.nan.action != "off" and pulse.bad_ranks:
            return Finding("nan", pulse.step, f"{_what_is_bad(pulse)} of step {pulse.step} is not finite")
        if health.spike.action != "off" and isfinite(pulse.loss) and self._spikes.is_spike(pulse.loss):
            usual = self._spikes.limit
            text = f"the loss of step {pulse.step} is {pulse.loss:.4g}, and at most {usual:.4g} is usual"
            return Finding("spike", pulse.step, text)
        return None

    def _treat(self, finding: Finding, pulse: Pulse, *, new: bool) -> bool:
        """Do what the job file says; whether the update is applied. `new`: it was not so at the step before."""
        action = (self._health.nan if finding.check == "nan" else self._health.spike).action
        if action == "warn":
            if new:
                tell(finding, "warn")
            return True
        if action == "stop":
            end(self._with_blame(finding, pulse), "stop")
        self._refused[finding.check] += 1
        if action == "rollback" or self._refused[finding.check] > self._health.nan.most:
            self._roll_back(self._with_blame(finding, pulse), before=finding.step)
        elif new:
            tell(self._with_blame(finding, pulse), "skip")
        return False

    def _roll_back(self, finding: Finding, *, before: int) -> None:
        if self._rollbacks >= MOST_ROLLBACKS:
            end(replace(finding, message=f"{finding.message}, after {MOST_ROLLBACKS} rollbacks"), "stop")
        if not self._can_return:
            _end_without_return(finding, "no checkpoints are made")
        self._rollbacks += 1
        self._return_before, self._going_back = before, (finding, before)
        self._divergence.forget()  # a checkpoint that has something of it brings it back
        tell(finding, "rollback")

    def _with_blame(self, finding: Finding, pulse: Pulse) -> Finding:
        """Names the rank whose own loss is not finite, where it is only one of several."""
        if finding.check != "nan":
            return finding
        bad = pulse.own_loss is not None and not bool(pulse.own_loss.isfinite())
        everyones = torch.zeros(dist.get_world_size(), device=pulse.norm.device)
        everyones[dist.get_rank()] = float(bad)
        dist.all_reduce(everyones)
        ranks = [rank for rank, is_bad in enumerate(everyones.tolist()) if is_bad]
        if not ranks or len(ranks) == len(everyones):
            return finding
        blamed = ranks[0] if len(ranks) == 1 else None
        return replace(finding, message=f"{finding.message} (rank {', '.join(map(str, ranks))})", blamed=blamed)

    def _compute_again(self, pulse: Pulse, again: Again) -> Pulse:
        """The pulse of a second try; where that differs, it is told which rank cannot compute."""
        second, ranks, differs = recompute(pulse, again, self._dice)
        if differs and self._health.corruption.action != "off":
            blamed = ranks[0] if len(ranks) == 1 else None
            who = f"on rank {', '.join(map(str, ranks))}" if ranks else "on one of the ranks"
            text = f"step {pulse.step} came out differently {who} when it was computed again"
            tell(Finding("corruption", pulse.step, text, blamed), "warn")
        return replace(second, stop=second.stop or pulse.stop)

    def _look_for_divergence(self, step: int, loss: float) -> None:
        rule = self._health.divergence
        if rule.action == "off":
            return
        diverged = self._divergence.remember(loss)
        if not self._diverged.begins(diverged):
            return
        text = f"the loss has been over {rule.factor:g} times its lowest, {self._divergence.lowest:.4g}, "
        finding = Finding("divergence", step, f"{text}for {self._divergence.over} steps until step {step}")
        if rule.action == "rollback":
            self._roll_back(finding, before=step - self._divergence.steps_since + 1)
        elif rule.action == "stop":
            end(finding, "stop")
        else:
            tell(finding, "warn")

    def _look_for_corruption(self, step: int, *, keeps: bool) -> None:
        """Compare the replicas when it is due: every so many steps, as soon as they meet, and before a checkpoint."""
        rule = self._health.corruption
        self._compare_due |= keeps or step % rule.every == 0
        if rule.action == "off" or not self._compare_due or not self._meets(step):
            return
        self._compare_due = False
        named = [named for module in self._modules for named in module.named_parameters()]
        difference = checksums.compare(checksums.replicated(named), self._replicas)
        if difference is None:
            return
        if not difference.decided:
            difference = self._decide(difference, step)
        blamed = difference.ranks[0] if difference.decided and len(difference.ranks) == 1 else None
        finding = Finding("corruption", step, difference.sentence(step), blamed)
        if rule.action == "rollback":
            self._roll_back(finding, before=step)
        elif rule.action in ("restart", "stop"):
            end(finding, rule.action)
        else:
            tell(finding, "warn")

    def _decide(self, difference: checksums.Difference, step: int) -> checksums.Difference:
        """Of suspects, the rank that does not come to the same twice from the same parameters, if there is one."""
        if self._again is None or not self._repeatable:
            return difference
        self._dice.keep()
        _, ranks, _ = recompute(self._again(), self._again, self._dice)
        guilty = [rank for rank in ranks if rank in difference.ranks]
        return replace(difference, ranks=tuple(guilty), decided=True) if len(guilty) == 1 else difference

    def _look_for_stragglers(self, step: int, spread: Spread) -> None:
        rule = self._health.straggler
        found = slow_rank(self._work_s, factor=rule.factor, alike=self._alike)
        if not self._slow.begins(None if found is None else f"rank {found[0]}") or found is None:
            return
        rank, ratio = found
        wait_s, work_s = spread.ranks[rank].data_wait_s, self._work_s[rank] / self._work_steps
        others = "all ranks" if self._alike is None else "its stage"
        text = f"rank {rank} works {work_s:.3g} s on a step, {ratio:.1f} times the median of {others}"
        finding = Finding("straggler", step, f"{text} ({wait_s:.3g} s of it waiting for data)", rank)
        if rule.action in ("restart", "stop"):
            end(finding, rule.action)
        tell(finding, "warn")


def _end_without_return(finding: Finding, why: str) -> NoReturn:
    """End the attempt, as there is nothing to go back to.

    A restart cures what happened in this very step: where no checkpoint is older, there is none at all, so that it
    begins anew. A divergence has been under way for long: a restart would take it along from the newest checkpoint, or
    come to it again with the same data, so that it is for a person to change something.
    """
    if finding.check != "divergence":
        end(replace(finding, message=f"{finding.message}, and {why}"), "restart")
    advice = "train anew with a lower optim.lr, and with earlier checkpoints (checkpoint.url, checkpoint.every_steps)"
    end(replace(finding, message=f"{finding.message}, and {why}; {advice}"), "stop")


def _what_is_bad(pulse: Pulse) -> str:
    return "the gradient" if isfinite(pulse.loss) else "the loss"
