"""Faithfulness: how much faster a prediction falls where the most relevant of its input goes first."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.inputs import given_by_name, input_relevance, on_device_of, target_for, unpadded
from lrp_prune.engine.composites import Composite, composite_of
from lrp_prune.metrics.perturbed import PerturbationCurve
from lrp_prune.metrics.perturbing import BASELINES, Replacing, by_position, grid, replaced_arguments
from lrp_prune.models.batches import check_batches, samples_in
from lrp_prune.models.profile import profile_of
from lrp_prune.models.states import eager, unchanged_configuration, unchanged_state, undisturbed
from lrp_prune.models.subject import subject_of
from lrp_prune.progress import Counted, bar, no_bar, number_of
from lrp_prune.targets import Target, values_of

Explainer = Callable[[nn.Module, Any, Target], Any]
"""From a model, a batch and what is explained to relevance: of one input, of several by name, or an explanation."""

SHARES: tuple[float, ...] = tuple(step / 10 for step in range(11))
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


def perturbation_curve(
    model: nn.Module,
    batches: Iterable[Any],
    relevance: str | Composite | Explainer = "attnlrp",
    target: Any = None,
    *,
    baseline: str | float = "zero",
    patch: int | None = None,
    inputs: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    skip_first: int = 0,
    progress: bool = True,
) -> PerturbationCurve:
    r"""Replace more and more of the input, the most relevant first and the least relevant first, and read the explained value.

    The measure of AttnLRP's table 1 (arXiv 2402.05602; Samek et al. 2017; Bluecher et al. 2024): with :math:`f_s` the explained
    value after a share :math:`s` of the positions was replaced by a baseline,

    .. math:: A = \int_0^1 f^{\mathrm{least}}_s - f^{\mathrm{most}}_s \, ds,

    the area between the two curves, larger for more faithful relevance and 0 on average for a random order. A position is a
    token, whose embedding is replaced, a patch of an image, a time step, or a feature.

    Args:
        model: any module; it comes out as it went in.
        batches: as :func:`lrp_prune.attribute` takes them, without labels unless the target needs them.
        relevance: a composite, or a function of model, batch and target that returns relevance: ``[samples, positions]`` or
            in the input's shape, of one input; a mapping from the names of arguments to such; or an explanation.
        target: the explained value: None for the logit of what the model predicts before anything is replaced; an id of a class
            or token, or one for each sample; a target as in :func:`lrp_prune.attribute`.
        baseline: ``"zero"``; ``"mean"`` (over the sample's positions, of features over the batch); ``"blur"`` (of images);
            a number.
        patch: of images, how many pixels a patch has on each side; None: the model's own, or a fourteenth of the height.
        inputs: names of the forward's arguments that are replaced, in one ranking; None: all that have relevance, but for the
            tokens of a decoder that has an encoder.
        shares: of the positions that are replaced, 0 and 1 included.
        skip_first: how many tokens at the beginning of each sample of a causal language model are never replaced.
        progress: show a progress bar.

    Returns:
        The curves of every sample where the target knows its value by sample (None, ids, differences of logits), else of batches.

    Raises:
        ValueError: for arguments that do not fit, no batches, or relevance of another shape than the input.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(6, 3)
        >>> curve = perturbation_curve(model, [torch.randn(32, 6)], "gradient", progress=False)
        >>> curve.area > 0  # of a linear model the gradient times the input is what goes away
        True
    """
    check_batches(batches)
    shares = _checked_shares(shares)
    if not isinstance(baseline, int | float) and baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES} or a number, got {baseline!r}")
    explainer = relevance if callable(relevance) else _by_rules(composite_of(relevance))
    module = subject_of(model).module
    most, least = list[Tensor](), list[Tensor]()
    with (bar if progress else no_bar)("replacing inputs", number_of(batches)) as advance:
        for batch in Counted(batches, advance):
            batch = on_device_of(module, batch)
            with torch.inference_mode(False), _untouched(module), torch.no_grad():
                found = target_for(module, batch, target, subject_of(model).own_target)
                replacement = Replacement(module, batch, found, baseline, patch, inputs, skip_first)
                replacement.look()
                with torch.enable_grad():
                    given = explainer(model, batch, found)
                ranks, counts = replacement.ranked(given)
                # Nothing and everything replaced are the same in both orders.
                whole, nothing = (replacement.values((ranks >= 0) & (ranks < end)) for end in (0 * counts, counts))
                for curves, order in ((most, ranks), (least, counts - 1 - ranks)):
                    between = [
                        replacement.values((order >= 0) & (order < _number(share, counts))) for share in shares[1:-1]
                    ]
                    curves.append(torch.stack([whole, *between, nothing], 1))
    if not most:
        raise ValueError("there are no batches to replace the input of")
    name = relevance if isinstance(relevance, str) else getattr(relevance, "name", None)
    name = name or getattr(relevance, "__name__", type(relevance).__name__)
    return PerturbationCurve(shares, torch.cat(most), torch.cat(least), str(name), str(baseline))


def _checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    found = tuple(sorted({float(share) for share in shares}))
    if len(found) < 2 or found[0] != 0 or found[-1] != 1:
        raise ValueError(f"shares must go from 0 to 1, both included, got {tuple(shares)}")
    return found


def _number(share: float, counts: Tensor) -> Tensor:
    """How many positions of each sample a share is: ``[samples, 1]``."""
    return (share * counts.double()).round().long()


def _by_rules(composite: Composite) -> Explainer:
    def explained(model: nn.Module, batch: Any, target: Target) -> Any:
        return input_relevance(model, batch, target, composite)

    return explained


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    configuration = profile_of(module).config
    with undisturbed(module), unchanged_configuration(configuration), unchanged_state(module), eager(module):
        yield


class Replacement:
    """One batch, of which positions are replaced; the arguments are those of :func:`perturbation_curve`."""

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        target: Target,
        baseline: str | float,
        patch: int | None,
        inputs: Sequence[str] | None,
        skip_first: int,
    ) -> None:
        self.module, self.batch, self.target, self.baseline = module, batch, target, baseline
        self.given, self.inputs = given_by_name(module, batch), inputs
        self.samples = samples_in(batch)
        self._patch, self._looked_up = patch, tuple[str, ...]()
        masks = unpadded(module, batch, skip_first)
        self._counted = {
            name: masks[name]
            for name, value in self.given.items()
            if name in masks and value.shape[:2] == masks[name].shape
        }
        self.names: list[str] = []

    def look(self) -> None:
        """See which token ids are looked up."""
        with Replacing(self.given, {}, self.baseline, {}) as replacing:
            values_of(self.target, self.module, self.batch)
        self._looked_up = tuple(replacing.looked_up)
        several = next((name for name in self._looked_up if self.given[name].dim() > 2), None)
        if several is not None:
            raise ValueError(
                f"{several} has shape {tuple(self.given[several].shape)}: tokens of several texts that a sample has to choose "
                "from are not replaced"
            )

    def patch_of(self, values: Tensor) -> int:
        """Pixels along a side of a patch; 1 where the input is no image."""
        if values.dim() != 4:
            return 1
        own = getattr(profile_of(self.module).config, "patch_size", None)
        patch = self._patch or (own if isinstance(own, int) else max(values.shape[2] // 14, 1))
        if patch > values.shape[2]:
            raise ValueError(f"patch={patch} is larger than the image, which is {values.shape[2]} pixels high")
        return patch

    def ranked(self, relevance: Any) -> tuple[Tensor, Tensor]:
        """The place of each position, the most relevant first, and how many count: ``[samples, positions]``, ``[samples, 1]``."""
        by_name = self._named(getattr(relevance, "inputs", relevance))
        scores, counted = [], []
        for name in self.names:
            value = self.given[name]
            if value.dim() < 2:
                raise ValueError(
                    f"{name!r} has shape {tuple(value.shape)}, and no positions within samples, as ids of nodes of several "
                    "graphs have none: replace another input (inputs=), or give one with a row for each sample"
                )
            each = by_position(by_name[name].detach(), value, self.patch_of(value), name).double()
            scores.append(each)
            counted.append(self._counted.get(name, torch.ones_like(each, dtype=torch.bool)).to(each.device))
        counts = torch.cat(counted, 1)
        order = torch.cat(scores, 1).masked_fill(~counts, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1), counts.sum(1, keepdim=True)

    def _named(self, relevance: Any) -> dict[str, Tensor]:
        usable = [name for name, value in self.given.items() if value.is_floating_point() or name in self._looked_up]
        if isinstance(relevance, Tensor):
            wanted = self.inputs or [name for name in usable if name not in _DECODER][:1]
            relevance = dict.fromkeys(wanted[:1], relevance)
        if not isinstance(relevance, Mapping):
            raise ValueError(
                f"relevance must be a tensor, a mapping from arguments, or an explanation, got {type(relevance).__name__}"
            )
        found: dict[str, Tensor] = {}
        for name, value in relevance.items():
            value = value if isinstance(value, Tensor) else getattr(value, "relevance", None)
            if isinstance(value, Tensor):
                found[name] = value
        self.names = list(self.inputs or [name for name in usable if name in found and name not in _DECODER])
        wrong = [name for name in self.names if name not in found or name not in usable]
        if wrong or not self.names:
            raise ValueError(
                f"there is no relevance of {', '.join(wrong) or 'any input'}: the model is given "
                f"{', '.join(usable) or 'nothing'}, and relevance is of {', '.join(found) or 'nothing'}"
            )
        return found

    def values(self, mask: Tensor) -> Tensor:
        """The explained values with positions replaced, in float64: ``[samples]``, or ``[1]``, divided by the samples."""
        masks, start = {}, 0
        for name in self.names:
            value = self.given[name]
            rows = grid(value, self.patch_of(value)) if value.dim() == 4 else (value.shape[1],)
            stop = start + int(torch.tensor(rows).prod())
            masks[name], start = mask[:, start:stop].to(value.device), stop
        patch = max(self.patch_of(self.given[name]) for name in self.names)
        with (
            Replacing(self.given, masks, self.baseline, self._counted),
            replaced_arguments(self.module, masks, self.baseline, self._counted, patch),
        ):
            found = values_of(self.target, self.module, self.batch).detach().double().cpu()
        return found if len(found) == self.samples else found / self.samples
