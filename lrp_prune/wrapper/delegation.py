"""A LightningModule that has nothing of its own: what Lightning asks it, it asks the module inside."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lrp_prune.models.outputs import answer_of, logits_for
from lrp_prune.models.profile import profile_of
from lrp_prune.targets.alignment import classes_last
from lrp_prune.targets.classes import are_shares
from lrp_prune.wrapper.internals import DEVICE_MIXIN, DEVICE_STATE


class Forwarded:
    """An attribute that is read from and written to the module inside.

    A method is the inner module's own bound method, so that Lightning sees whether it is overridden, and its signature.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return getattr(LightningModule, self.name)
        return getattr(instance.delegate, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        if "_delegate" in instance.__dict__:  # LightningModule.__init__ sets its state before there is one
            setattr(instance.delegate, self.name, value)


class Extended(Forwarded):
    """A hook of the module inside with something done before or after it; still overridden only if it is inside.

    Decorates a method that takes the inner module's own method first, and calls it.
    """

    def __init__(self, extension: Callable[..., Any]) -> None:
        super().__init__(extension.__name__)
        self.extension = extension

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        method = super().__get__(instance, owner)
        if instance is None:
            return method

        @functools.wraps(method)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return self.extension(instance, method, *args, **kwargs)

        return extended


def forward_all(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: forward whatever Lightning's classes define and ``cls`` does not, state that is private included.

    What ``nn.Module`` defines stays the wrapper's own, since it has the module inside as a child. So do private
    functions: they ask what they need through forwarded names (and some compare the trainer's module with ``self``).
    """
    own = set(vars(cls)) | set(vars(object))
    state = set(vars(LightningModule())) - set(vars(nn.Module())) - DEVICE_STATE
    defined = {
        name
        for base in LightningModule.__mro__
        if base not in nn.Module.__mro__ and base.__name__ != DEVICE_MIXIN
        for name in vars(base)
        if not name.startswith(("_", "CHECKPOINT_"))
    }
    for name in (defined | state) - own - {"load_from_checkpoint"}:
        setattr(cls, name, Forwarded(name))
    return cls


class MetricNames(dict[int, str]):
    """Names of torchmetrics by ``id``, relative to the module that Lightning knows, found when they are asked for.

    Lightning restores metrics in the middle of an epoch by these names.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root

    def __bool__(self) -> bool:
        return True

    def get(self, key: int, default: Any = None) -> Any:
        """The name of a metric, also of one that was added since."""
        if key not in self:
            self.update({id(module): name for name, module in self._root.named_modules() if isinstance(module, Metric)})
        return super().get(key, default)


class PlainSteps(LightningModule):
    """Training, validation, test and prediction of a plain model, such as a Hugging Face one.

    The loss is the model's own (``output.loss``, with ``labels`` in the batch), else the cross-entropy of its logits and integer
    labels, one for each sample, token or pixel. A causal language model's batch without labels is trained on its ``input_ids``.

    Args:
        model: called with a mapping's entries as keywords; with other batches as :func:`lrp_prune.models.call_of` says.
        make_optimizer: from parameters to an optimizer; AdamW with a learning rate of 1e-5 by default.
    """

    def __init__(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._make_optimizer = make_optimizer

    @property
    def device(self) -> torch.device:
        """Where the model is: it is moved as a child of the wrapper, which this is not."""
        return next(self.model.parameters()).device

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            if labels is None and profile_of(self.model).causal and "input_ids" in batch:
                labels = batch["input_ids"]
                if batch.get("attention_mask") is not None:
                    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
                batch = {**batch, "labels": labels}
            loss = getattr(self.model(**batch), "loss", None)
            if isinstance(loss, Tensor):
                return loss
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            logits, labels = answer_of(self.model, batch)
            if labels is not None and labels.shape == logits.shape and labels.dim() == 2 and are_shares(labels):
                return nn.functional.cross_entropy(logits, labels.to(logits.dtype))
            if labels is not None and not labels.is_floating_point():
                profile = profile_of(self.model)
                fitting = logits if labels.dim() == 1 else classes_last(logits, labels, profile)
                if fitting is not None and fitting.dim() == labels.dim() + 1:
                    return nn.functional.cross_entropy(fitting.flatten(0, -2), labels.flatten().long())
        raise ValueError(
            f"{type(self.model).__name__} gives no loss for this batch: add labels, or wrap the model in a "
            "LightningModule with a training_step"
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs ``val_loss``."""
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs ``test_loss``."""
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The logits."""
        return logits_for(self.model, batch)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the parameters that require gradients."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self._make_optimizer(parameters) if self._make_optimizer else torch.optim.AdamW(parameters, lr=1e-5)
