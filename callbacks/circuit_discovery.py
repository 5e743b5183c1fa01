"""The callback that finds the circuit of a task in a validation, and changes nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks._averages import trained_weights
from lrp_prune.callbacks._callbacks import copied_state
from lrp_prune.callbacks._checks import check_count, check_flags, misconfiguration
from lrp_prune.callbacks._collecting import check_validation
from lrp_prune.callbacks._forwards import own_forward
from lrp_prune.callbacks._rounds import warn_of_no_epoch
from lrp_prune.callbacks._strategies import check_strategy
from lrp_prune.circuits import MIB_SIZES, Circuit, EvaluationResult, Ranking, discover, evaluate
from lrp_prune.circuits.ablation import Ablation, check_ablation
from lrp_prune.circuits.discover import check_nodes, check_options
from lrp_prune.circuits.methods import NodeMethodName, method_for
from lrp_prune.circuits.ranking import check_size
from lrp_prune.circuits.sites import kinds_of
from lrp_prune.pruning import Method
from lrp_prune.pruning.scope import Normalization
from lrp_prune.selection.keys import Order
from lrp_prune.tasks import Task


class CircuitDiscovery(Callback):
    """Finds the circuit of a task at the end of a validation, and evaluates it on prompts that were held out.

    In ``on_validation_epoch_end`` the module's model is run on the task's own prompts (the validation's data are not needed):
    :func:`lrp_prune.circuits.discover` on one part, :func:`lrp_prune.circuits.evaluate` on the other. The sanity check is
    left out. Weights, gradients, modes and the random state stay as they are. Where ``WeightAveraging`` validates its
    average, the circuit is that of the trained weights, wherever this callback stands. ``circuit/faithfulness`` of the circuit,
    ``circuit/cpr`` and ``circuit/cmd`` are logged. Under DDP every process does the same, and has the same result.

    Example::

        from lightning.pytorch import Trainer
        from lrp_prune import tasks
        from lrp_prune.callbacks import CircuitDiscovery

        discovery = CircuitDiscovery(tasks.IndirectObject(tokenizer), granularity="head", size=0.1)
        Trainer(callbacks=[discovery]).validate(module, loader)
        discovery.circuit.save("ioi.safetensors")

    Args:
        task: the prompts to find the circuit on.
        granularity: see :func:`lrp_prune.circuits.discover`.
        method: see :func:`lrp_prune.circuits.discover`: a name, or an object that says more.
        size: nodes of :attr:`circuit`: a number, or a fraction of all.
        sizes: further sizes to evaluate, for the areas ``cpr`` and ``cmd``.
        ablation: ``"counterfactual"``, ``"mean"`` or ``"zero"``; of weights ``"zero"``.
        held_out: the prompts of the evaluation; None: ``task.split()`` gives one part to each.
        every_n_epochs: inside ``fit``, in the validations of every so many epochs; each result replaces the last.
        order, metric, batch_size, rounds, density, normalize, include, exclude: see :func:`lrp_prune.circuits.discover`.
        allow_untested: use it with strategies that it is not tested with.

    Raises:
        MisconfigurationException: an argument has an impossible value.
    """

    def __init__(
        self,
        task: Task,
        granularity: str | list[str] = "neuron",
        *,
        method: NodeMethodName | Method | None = None,
        size: int | float = 0.05,
        sizes: Sequence[float] = MIB_SIZES,
        ablation: Ablation = "counterfactual",
        held_out: Task | None = None,
        every_n_epochs: int = 1,
        order: Order = "absolute",
        metric: str | None = None,
        batch_size: int = 16,
        rounds: int = 1,
        density: float = 0.01,
        normalize: Normalization | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        allow_untested: bool = False,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1)
        check_flags(allow_untested=allow_untested)
        _check_task("task", task)
        _check_task("held_out", task if held_out is None else held_out)
        with misconfiguration((ValueError, TypeError)):
            check_ablation(ablation)
            if granularity != "weight":
                kinds_of(granularity)
            elif ablation != "zero":
                raise ValueError(f"weights have no activations to replace: pass ablation='zero', got {ablation!r}")
            self._method = method_for(granularity == "weight", method)
            check_size("size", size)
            for each in sizes:
                check_size("each of sizes", each)
            check_options(order, rounds, density, normalize, batch_size, include, exclude)
            task.target(metric)  # or refused
            self._task, self._held_out = (task, held_out) if held_out is not None else task.split()
        self._granularity, self._size, self._sizes = granularity, size, tuple(sizes)
        self._ablation, self._every_n_epochs, self._allow_untested = ablation, every_n_epochs, allow_untested
        self._looked_at: dict[str, Any] = {"metric": metric, "include": include, "exclude": exclude}
        self._options: dict[str, Any] = {"order": order, "batch_size": batch_size, "rounds": rounds, "density": density}
        self._options |= {"normalize": normalize, "ablation": ablation}
        self._ranking: Ranking | None = None
        self._result: EvaluationResult | None = None

    @property
    def ranking(self) -> Ranking:
        """All nodes by importance.

        Raises:
            RuntimeError: there was no validation yet.
        """
        if self._ranking is None:
            raise RuntimeError(
                "no circuit was discovered yet: run trainer.fit or trainer.validate with a validation (the sanity check "
                "does not count)"
            )
        return self._ranking

    @property
    def circuit(self) -> Circuit:
        """The circuit of the size that was asked for."""
        return self.ranking.at(self._size)

    @property
    def result(self) -> EvaluationResult:
        """The evaluation; the last of its sizes is that of :attr:`circuit`."""
        assert self.ranking is not None and self._result is not None
        return self._result

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer, type(self).__name__, self._allow_untested)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now a training without validations, a model without such nodes, or a task that does not suit it."""
        check_validation(trainer, type(self).__name__, "finds circuits", self._every_n_epochs)
        warn_of_no_epoch(trainer, type(self).__name__, self._every_n_epochs, "finds")
        with misconfiguration(), torch.inference_mode(False), own_forward(trainer, pl_module):
            check_nodes(pl_module, self._task, self._granularity, self._method, **self._looked_at)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inside_fit = trainer.state.fn == "fit"
        if trainer.sanity_checking or (
            inside_fit and trainer.current_epoch % self._every_n_epochs != self._every_n_epochs - 1
        ):
            return
        with (
            misconfiguration(),
            trained_weights(trainer, pl_module, self),
            torch.inference_mode(False),
            own_forward(trainer, pl_module),
        ):
            options: dict[str, Any] = {**self._looked_at, **self._options}
            ranking = discover(pl_module, self._task, self._granularity, self._method, **options)
            sizes = [*self._sizes, self._size]
            result = evaluate(pl_module, ranking, self._held_out, sizes, self._ablation, complements=False)
        self._ranking, self._result = ranking, result
        measured = {"faithfulness": float(result.faithfulness[-1])}
        if len(set(result.sizes)) > 1:
            measured |= {"cpr": result.cpr, "cmd": result.cmd}
        for name, value in measured.items():
            pl_module.log(f"circuit/{name}", value, sync_dist=trainer.world_size > 1, batch_size=1)


def _check_task(name: str, task: Any) -> None:
    if not isinstance(task, Task):
        raise MisconfigurationException(
            f"{name} must be a task such as lrp_prune.tasks.IndirectObject(tokenizer), got {task!r}"
        )
