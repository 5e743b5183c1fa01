"""The callback that follows a metric by round of pruning, and goes back by a round where it is too bad."""

import math
import os
import weakref
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks import _checks, _monitor, _resuming
from lrp_prune.callbacks._callbacks import copied_state
from lrp_prune.callbacks._distributed import gathered
from lrp_prune.callbacks._listening import RoundListener
from lrp_prune.callbacks._strategies import check_strategy
from lrp_prune.callbacks._summary import show
from lrp_prune.callbacks._undoing import EndOfRound, prunings_of
from lrp_prune.figures import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RoundPoint:
    """How good a model was at the end of a round, right before the next one, or at the end of the training.

    Args:
        round: rounds of pruning that were done; 0 for the dense model.
        sparsity: total, of all weights that were asked for.
        value: of the metric, in the last validation (or training epoch) before.
        step: optimizer steps that were done.
        undone: whether the round was taken back.
    """

    round: int
    sparsity: float
    value: float
    step: int
    undone: bool = False


class RoundQuality(RoundListener):
    """Follows a metric by round of :class:`RelevancePruning`: on the logger, as a table and as a figure, and as a guard.

    A round's value is that of the last validation before the next round, after all recovery that it had; the dense model's is
    that of the last one before the first round. ``rounds/<monitor>`` and ``rounds/sparsity`` are on the logger at each round's
    end, and a table on the screen after the training.

    With a ``limit`` or a ``margin`` it is a guard: a round that ends beyond it is undone. The weights, buffers, averages and
    masks from the end of the round before are back, bit for bit, no further round prunes, and the training stops (Lightning goes
    on until its ``min_epochs``, at the sparsity that is left). The first process's metric decides for all.

    What happens in which hook:

    - ``on_train_start``: a metric that the sanity check did not log is refused if it is nearly another's name, else warned of.
    - ``on_validation_end``, ``on_train_epoch_end``: the metric is looked at.
    - right before a round prunes, and in ``on_fit_end``: the round before is at its end. If it is good, and there is a guard, its
      weights are kept in the memory of the CPU, and in checkpoints: one copy of the model.

    Example::

        quality = RoundQuality("val_loss", margin=0.05)
        trainer = Trainer(max_epochs=12, callbacks=[RelevancePruning(0.95, Rounds(6, every_n_epochs=2)), quality])
        trainer.fit(module, train_loader, validation_loader)
        quality.plot("rounds.png")

    Args:
        monitor: name of a metric that the module logs.
        mode: ``"min"`` if a smaller value is better, else ``"max"``.
        limit: the worst value that a round may end with; None: no such guard.
        margin: how much worse than the dense model's a round's value may be; None: no such guard.
        summary: print the table.

    Raises:
        MisconfigurationException: an argument has an impossible value; there is no ``RelevancePruning``; with a guard, under
            strategies that divide weights, or if the metric is not logged between two rounds.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        *,
        limit: float | None = None,
        margin: float | None = None,
        summary: bool = True,
    ) -> None:
        _checks.check_choice("mode", mode, ("min", "max"), optional=False)
        _checks.check_flags(summary=summary)
        if not isinstance(monitor, str) or not monitor:
            raise MisconfigurationException(f"monitor must be the name of a metric that is logged, got {monitor!r}")
        for name, value in (("limit", limit), ("margin", margin)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise MisconfigurationException(f"{name} must be a number or None, got {value!r}")
        if limit is not None and margin is not None:
            raise MisconfigurationException(f"limit={limit} and margin={margin} exclude each other: pass one of them")
        if margin is not None and not margin >= 0:
            raise MisconfigurationException(f"margin must be at least 0, got {margin}")
        self.monitor, self.mode, self.limit, self.margin = monitor, mode, limit, margin
        self._summary = summary
        self._points: list[RoundPoint] = []
        self._latest: float | None = None
        self._seen: Any = None
        self._ended_at: int | None = None
        self._good: EndOfRound | None = None
        self._stopped = self._skipped = False
        self._logged: list[str] = []
        self._module: weakref.ref[LightningModule] | None = None

    @property
    def points(self) -> list[RoundPoint]:
        """The rounds that have come to their end, the dense model first."""
        return list(self._points)

    @property
    def _guards(self) -> bool:
        return self.limit is not None or self.margin is not None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _monitor.check_logs(trainer, type(self).__name__, self.monitor)
        if self._guards:
            check_strategy(trainer, f"{type(self).__name__} with a limit or a margin", allow_untested=False)
        if not prunings_of(trainer):
            raise MisconfigurationException(
                "RoundQuality follows the rounds of RelevancePruning, which is none of the trainer's callbacks: add it"
            )
        known = self._module() if self._module is not None else None
        if known is not pl_module:
            self._points, self._latest, self._good, self._stopped, self._skipped = [], None, None, False, False
        self._module, self._logged = weakref.ref(pl_module), []
        self._seen = self._ended_at = None

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = list(trainer.callback_metrics)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _monitor.check_sanity(self.monitor, self._logged)
        lost = f"RoundQuality takes the {self.monitor} of an earlier one for the round, or does not judge it if there is none"
        self._skipped |= _resuming.warn_of_skipped(trainer, lost)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    @override
    def allows_round(self, trainer: Trainer, pl_module: LightningModule, trains_on: bool) -> bool:
        # Rounds of several callbacks at the same step are one.
        if trainer.global_step != self._ended_at:
            self._end_round(trainer, pl_module)
            self._ended_at = trainer.global_step
        # What a last round without a training after it is worth, nobody would know.
        return not self._stopped and (trains_on or not self._guards)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_round(trainer, pl_module)
        if self._summary and self._points:
            show(trainer, self.table())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "points": [asdict(point) for point in self._points],
            "latest": self._latest,
            "good": self._good.to_dict() if self._good is not None else None,
            "stopped": self._stopped,
            "skipped": self._skipped,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = [RoundPoint(**point) for point in state_dict["points"]]
        self._latest, self._stopped = state_dict["latest"], state_dict["stopped"]
        self._skipped = state_dict.get("skipped", False)
        good = state_dict["good"]
        self._good = EndOfRound.from_dict(good) if good is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # Strategies that spawn processes pickle the callback.
        return copied_state(self, "_module")

    def table(self) -> str:
        """The rounds as text."""
        better = "smaller" if self.mode == "min" else "larger"
        dense = self._points[0].value if self._points and not self._points[0].round else None
        lines = [f"Quality by round ({better} {self.monitor} is better)"]
        lines.append(f"  {'round':<7}{'sparsity':>10}{'step':>10}{self.monitor:>14}{'beyond dense':>14}")
        for point in self._points:
            change = "" if dense is None or not point.round else f"{point.value - dense:+.4g}"
            name = str(point.round) if point.round else "dense"
            line = f"  {name:<7}{point.sparsity:>10.2%}{point.step:>10,}{point.value:>14.5g}{change:>14}"
            lines.append(f"{line}{'  undone' if point.undone else ''}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of the metric against the sparsity, round by round; needs matplotlib.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.
        """
        figure = new_figure(6, 4)
        axes = figure.subplots()
        kept = [point for point in self._points if not point.undone]
        axes.plot([100 * point.sparsity for point in kept], [point.value for point in kept], marker="o")
        shown: dict[str, Any] = {"fontsize": "small", "ha": "center"}
        for point in self._points:
            if point.undone:
                axes.plot([100 * point.sparsity], [point.value], marker="x", color="tab:red", linestyle="none")
            name = f"round {point.round}" if point.round else "dense"
            name += ", undone" if point.undone else ""
            at = 100 * point.sparsity, point.value
            axes.annotate(name, at, (0, 6), textcoords="offset points", **shown)
        worst = self._worst()
        if worst is not None:
            axes.axhline(worst, color="tab:red", linestyle="--", linewidth=1)
        axes.margins(0.15)
        axes.set(xlabel="sparsity (%)", ylabel=f"{self.monitor} at the end of the round")
        axes.grid(alpha=0.25)
        return saved(figure, path)

    def _worst(self) -> float | None:
        """The worst value that is good enough; None where there is no guard, or nothing to measure by."""
        if self.margin is None:
            return self.limit
        dense = next((point.value for point in self._points if not point.round), None)
        return None if dense is None else dense + (self.margin if self.mode == "min" else -self.margin)

    def _look(self, trainer: Trainer) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._stopped:
            return
        value = trainer.callback_metrics.get(self.monitor)
        # What was not logged since is still there, as the same object.
        if value is not None and value is not self._seen:
            self._latest, self._seen = float(value), value

    def _end_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how the round ends that was the last so far, and take it back where it is too bad."""
        done = sum(entry.round for entry in prunings_of(trainer))
        if self._stopped or any(point.round == done for point in self._points):
            return
        value = gathered(trainer, self._latest)[0]
        if value is None:
            self._tell_unknown(trainer, done)
            return
        self._latest, self._skipped = None, False
        masks = [entry.masks for entry in prunings_of(trainer) if entry.masks is not None]
        entries = sum(each.num_entries for each in masks)
        sparsity = sum(each.num_pruned for each in masks) / entries if entries else 0.0
        point = RoundPoint(done, sparsity, value, trainer.global_step)
        self._points.append(point)
        metrics = {f"rounds/{self.monitor}": value, "rounds/sparsity": sparsity, "rounds/round": float(done)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        worst = self._worst()
        if worst is None:
            return
        if math.isnan(value) or (value > worst if self.mode == "min" else value < worst):
            self._undo(trainer, pl_module, point, worst)
        else:
            self._good = EndOfRound.of(trainer, pl_module)

    def _undo(self, trainer: Trainer, pl_module: LightningModule, point: RoundPoint, worst: float) -> None:
        self._stopped = trainer.should_stop = True
        ended = f"round {point.round} ended" if point.round else "the dense model is there"
        message = f"{ended} with {self.monitor}={point.value:.5g}, beyond {worst:.5g}"
        if self._good is None:
            rank_zero_warn(f"{message}: nothing more is pruned, and the training stops")
            return
        before = [entry for entry in self._points if not entry.undone][-2]
        self._points[-1] = replace(point, undone=True)
        self._good.go_back(trainer, pl_module)
        self._good = None
        rank_zero_warn(
            f"{message}: the model is back at the end of {f'round {before.round}' if before.round else 'the dense training'} "
            f"(sparsity {before.sparsity:.2%}, {self.monitor}={before.value:.5g}), and the training stops. Checkpoints that were "
            "written since hold what was undone: trainer.save_checkpoint(path) writes this model"
        )

    def _tell_unknown(self, trainer: Trainer, done: int) -> None:
        if done == 0 and not self._guards:
            return  # the first round may be before any validation
        # Without the dense model's value there would be no margin in all the rounds to come.
        if self._guards and (not self._skipped or (self.margin is not None and not done)):
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise MisconfigurationException(
                f"{self.monitor!r} was not logged between round {done} and the next, so that RoundQuality cannot judge it (there "
                f"is {logged}): log it by self.log in validation_step, and validate between rounds"
                f"{', or resume from a checkpoint that was written in a validation or after it' if self._skipped else ''}"
            )
        rank_zero_warn(
            f"{self.monitor!r} was not logged in round {done}, which has no point in the curve of RoundQuality"
        )
        self._skipped = False
