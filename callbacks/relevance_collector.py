"""The callback that collects relevance and changes nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.attribution.composites import Composite
from lrp_prune.attribution.unsharding import make_ordinary
from lrp_prune.callbacks._checks import check_count, check_strategy, check_validation
from lrp_prune.callbacks._collecting import CollectingCallback
from lrp_prune.callbacks._collection import Collection

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
        from lrp_prune.callbacks import RelevanceCollector

        collector = RelevanceCollector(statistic="signed", granularity="head")
        Trainer(callbacks=[collector]).validate(module, loader)
        collector.relevance.save("heads.safetensors")

    What is run is ``relevance_target(batch)`` of the module if it defines that, else its overridden ``forward``, else
    the only model that it holds. The steps are never run.

    Args:
        composite: the propagation rules, by name (``"attnlrp"``, ``"cp_lrp"``, ...) or as ``{kind of operation:
            rule}``; ``None`` for the method's own.
        statistic: how tokens and samples are reduced: ``"signed"``, ``"abs_sample"``, ``"abs_token"`` or
            ``"squared_token"``; ``None`` for the method's own.
        granularity: what is scored: ``"weight"``, ``"neuron"``, ``"head"``, ``"block"`` or ``"embedding"``, or a list of
            several kinds of units.
        target: what is explained: ``"next_token"``, ``"token"``, ``"last_token"``, ``"class"``, ``"multi_label"``,
            ``"regression"``, ``"span"``, a callable ``(model, batch) -> scalar``, or ``None`` to infer it from the model and
            its first batch (:class:`~lrp_prune.targets.Inferred`); it is in ``relevance.target``.
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``.
        include: patterns of the parameters or modules to score; ``None`` for all but embeddings, head and norms.
        exclude: patterns of names to leave out.
        every_n_epochs: inside ``fit``, collect in the validations of every so many epochs; each result replaces the
            last.
        max_batches: batches used of each validation; ``None`` for all.
        dataloader: index of the validation loader to use if there are several; ``None`` for all of them.
        reference: batches (a list, a ``DataLoader``, a ``LightningDataModule``) to use instead of the validation's;
            they are gone through at the end of the validation.
        seed: of ``method="random"``.
        trainable_only: score only weights that require gradients.
        accumulate_on: device of the accumulators, ``"cpu"`` say; ``None`` for the weights' own.
        allow_untested: use it with strategies that it is not tested with.

    Raises:
        MisconfigurationException: an argument has an impossible value.
    """

    def __init__(
        self,
        composite: str | Composite | dict[str, str] | None = None,
        statistic: str | None = None,
        granularity: str | list[str] = "weight",
        target: Any = None,
        method: str = "lrp",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        dataloader: int | None = 0,
        reference: Iterable[Any] | LightningDataModule | None = None,
        seed: int = 0,
        trainable_only: bool = False,
        accumulate_on: str | None = None,
        allow_untested: bool = False,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1)
        self._collection = Collection(
            method=method,
            composite=composite,
            statistic=statistic,
            granularity=granularity,
            target=target,
            include=include,
            exclude=exclude,
            seed=seed,
            trainable_only=trainable_only,
            accumulate_on=accumulate_on,
            max_batches=max_batches,
            dataloader=dataloader,
            reference=reference,
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
        check_validation(trainer, type(self).__name__, "collects")
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
