"""What a model is, whatever is around it: the Hugging Face model in it that decides, and what that was made for."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from lrp_prune.models.kinds import GENERATION, Kind, is_decoder_type, kind_of
from lrp_prune.names import class_name, unwrap

_HANDING_ON = frozenset({"PeftModel", "PeftMixedModel", "BaseTuner"})


class Profile:
    """What is known of a model without running it; see :func:`profile_of`.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = unwrap(model)

    @property
    def name(self) -> str:
        """The class of what is called."""
        return class_name(self.module)

    @property
    def known_as(self) -> str:
        """What the Hugging Face model was made for, in words."""
        if self.inner is None or self.kind is None:
            return f"{self.name} is no model that transformers lists"
        inside = "" if self.inner is self.module else f" in {self.name}"
        article = "an" if self.kind.task[0] in "aeiou" else "a"
        return f"{class_name(self.inner)}{inside} is {article} {self.kind.task}"

    @functools.cached_property
    def deciding(self) -> tuple[nn.Module, ...]:
        """The outermost ``PreTrainedModel`` instances in the tree of modules: itself, one inside, or several."""
        return tuple({id(module): module for module in _outermost(self.module)}.values())

    @property
    def inner(self) -> nn.Module | None:
        """The Hugging Face model, if there is exactly one."""
        return self.deciding[0] if len(self.deciding) == 1 else None

    @property
    def config(self) -> Any:
        """Its configuration."""
        return getattr(self.inner, "config", None)

    @property
    def hands_on(self) -> bool:
        """Whether the module is called as the Hugging Face model is: it is that model, or PEFT's wrapper around it."""
        return self.inner is self.module or (self.inner is not None and _named(self.module, _HANDING_ON))

    @property
    def decides_alone(self) -> bool:
        """Whether the Hugging Face model has all parameters, so that its outputs are those of the whole."""
        if self.inner is None:
            return False
        own = {id(parameter) for parameter in self.inner.parameters()}
        return self.hands_on or all(id(parameter) in own for parameter in self.module.parameters())

    @functools.cached_property
    def kind(self) -> Kind | None:
        """What the Hugging Face model was made for; None where there is none, or several, or transformers does not say."""
        return kind_of(self.inner) if self.inner is not None else None

    @property
    def encoder_decoder(self) -> bool:
        """Whether tokens of a decoder are predicted from those that an encoder is given."""
        takes = self.inner is not None and "decoder_input_ids" in parameters_of(self.inner)
        return takes and bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def causal(self) -> bool:
        """Whether it is a language model that predicts each token from those before it."""
        return self.kind is GENERATION and not self.encoder_decoder

    @property
    def left_to_right(self) -> bool:
        """Whether each token is read together with those before it only: also a classifier on top of such a model."""
        if self.inner is None or self.encoder_decoder:
            return False
        config = self.config
        return self.causal or bool(getattr(config, "is_decoder", False)) or is_decoder_type(config.model_type)


def profile_of(model: nn.Module) -> Profile:
    """What a model is: asked anew, since a configuration may change.

    Found through whatever is around it: ``torch.compile``, DDP, PEFT, a
    :class:`~lrp_prune.CorrectedModule`, a ``LightningModule`` with or without a ``forward``, any other module.

    Example:
        >>> profile = profile_of(nn.Linear(2, 2))
        >>> profile.inner, profile.kind, profile.causal
        (None, None, False)
    """
    return Profile(model)


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """What a module's forward takes; nothing where that cannot be told (a scripted one)."""
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return {}


def is_pretrained(module: nn.Module) -> bool:
    """Whether this is a Hugging Face model, without importing transformers."""
    return _named(module, frozenset({"PreTrainedModel"}))


def _named(module: nn.Module, names: frozenset[str]) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if is_pretrained(module):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)
