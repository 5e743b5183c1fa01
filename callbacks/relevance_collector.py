"""The callback that collects relevance and changes nothing."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks._checks import check_count, check_flags
from lrp_prune.callbacks._collecting import CollectingCallback, check_validation
from lrp_prune.callbacks._collection import Collection, MethodName, Reference
from lrp_prune.callbacks._rounds import warn_of_no_epoch
from lrp_prune.callbacks._strategies import check_strategy
from lrp_prune.engine.unsharding import make_ordinary
from lrp_prune.pruning import Method
from lrp_prune.relevance import Granularity

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


class RelevanceCollector(CollectingCallback):
    """Collects the relevance of a model's weights or units during validation.

    In ``on_validation_batch_end`` of each validation that is collected in, one more forward and backward pass is run on
    the batch; the relevance is ready in ``on_validation_epoch_end``, before any checkpoint is written. It works inside
    ``trainer.fit`` (``no_grad``) and in ``trainer.validate`` (``inference_mode``). The sanity check is left out, but
    for its first batch, on which the collection is tried before the training starts.
    Weights, gradients, modes, buffers, the random state and metrics stay as they are, so the training is bit for bit
    the one without the callback. Where ``WeightAveraging`` validates its average, the relevance is that of the trained
    weights.

    Example::

        from lightning.pytorch import Trainer
        from lrp_prune import LRP
        from lrp_prune.callbacks import RelevanceCollector

        collector = RelevanceCollector(LRP(statistic="signed"), "head")
        Trainer(callbacks=[collector]).validate(module, loader)
        collector.relevance.save("heads.safetensors")

    What is run is ``relevance_target(batch)`` of the module if it defines that, else its overridden ``forward``, else
    the only model that it holds. The steps are never run.

    Args:
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``, or an object that says more, such as
            ``LRP(composite="cp_lrp", target="class")``; see :mod:`lrp_prune.pruning.methods`. What is explained, if it is
            inferred, is in ``relevance.target``.
        granularity: what is scored: ``"weight"``, ``"neuron"``, ``"head"``, ``"block"`` or ``"embedding"``, or a list of
            several kinds of units.
        include: patterns of the parameters or modules to score; ``None`` for all but embeddings, head and norms.
        exclude: patterns of names to leave out.
        trainable_only: score only weights that require gradients.
        every_n_epochs: inside ``fit``, collect in the validations of every so many epochs; each result replaces the
            last.
        reference: where the reference samples come from: the index of a validation loader, ``"all"`` for those of all; or batches
            (a list, a ``DataLoader``, a ``LightningDataModule``) to use instead of the validation's, which are gone through at
            the end of the validation.
        max_batches: batches used of each validation; ``None`` for all.
        accumulate_on: device of the accumulators, ``"cpu"`` say; ``None`` for the weights' own.
        allow_untested: use it with strategies that it is not tested with.

    Raises:
        MisconfigurationException: an argument has an impossible value.
    """

    def __init__(
        self,
        method: MethodName | Method = "lrp",
        granularity: Granularity | list[Granularity] = "weight",
        *,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        trainable_only: bool = False,
        every_n_epochs: int = 1,
        reference: Reference = 0,
        max_batches: int | None = None,
        accumulate_on: str | None = None,
        allow_untested: bool = False,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1)
        check_flags(allow_untested=allow_untested)
        self._collection = Collection(
            method=method,
            granularity=granularity,
            include=include,
            exclude=exclude,
            trainable_only=trainable_only,
            reference=reference,
            max_batches=max_batches,
            accumulate_on=accumulate_on,
        )
        self._every_n_epochs = every_n_epochs
        self._allow_untested = allow_untested
        self._relevance: Relevance | None = None

    @property
    def relevance(self) -> "Relevance":
        """What the last collection gave.

        Raises:
            RuntimeError: there was none yet.
        """
        if self._relevance is None:
            raise RuntimeError(
                "no relevance was collected yet: run trainer.fit or trainer.validate with validation batches "
                "(the sanity check does not count)"
            )
        return self._relevance

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer, type(self).__name__, self._allow_untested, sharded=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validation(trainer, type(self).__name__, "collects", self._every_n_epochs)
        warn_of_no_epoch(trainer, type(self).__name__, self._every_n_epochs, "collects")
        super().on_train_start(trainer, pl_module)
        self._collection.check(trainer, pl_module)
        self._collection.check_loader(trainer)
        self._collection.rehearse(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if not self._collects(trainer):
            return
        if torch.is_inference_mode_enabled():
            make_ordinary(pl_module)  # before the first forward, which makes what sharded weights are gathered into
        if self._collection.uses_validation:
            self._collection.check_loader(trainer)
            self._collection.start(trainer, pl_module)

    @override
    def _uses_validation(self, trainer: Trainer) -> bool:
        return self._collection.uses_validation

    @override
    def _remember(self, batch: Any, dataloader_idx: int) -> None:
        self._collection.remember(batch, dataloader_idx)

    @override
    def _observe(self, batch: Any, dataloader_idx: int) -> None:
        self._collection.observe(batch, dataloader_idx)

    @override
    def _end_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._collection.active:
            self._relevance = self._collection.finish(trainer)
        elif self._collects(trainer):
            self._relevance = self._collection.run(trainer, pl_module)

    @override
    def _abandon(self) -> None:
        self._collection.abandon()

    def _collects(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or trainer.current_epoch % self._every_n_epochs == self._every_n_epochs - 1
