"""Learned circuits: gates on blocks, heads and neurons at once, trained in one Lightning run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lrp_prune.attribution.observers import fingerprint
from lrp_prune.circuits.ablation import Reference, check_ablation, counterfactual_reference, gating
from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.finalizing import finalized, most_open, warm_started
from lrp_prune.circuits.hard_concrete import is_open, probability_open, sample
from lrp_prune.circuits.objectives import objective_value, objective_weights
from lrp_prune.circuits.pressure import Pressure, by_kind
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import NODE_KINDS, find_sites, kinds_of, passing
from lrp_prune.models.subject import forwarded
from lrp_prune.tasks.metrics import batch_metric
from lrp_prune.tasks.task import Batch, Task, answer_logits


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter enters a graph that is built inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class GateTraining(LightningModule):
    r"""Learns which blocks, heads and neurons a task needs (multi-granular node pruning, arXiv 2512.10903).

    Each unit has a hard-concrete gate :math:`z`; what passes is :math:`z a + (1 - z) r` with the replacement ``r`` of the
    ablation, for every kind of unit alike. Heads and attention neurons are gated before the output projection, MLP neurons before
    the down projection, blocks at what they add to the residual stream. Minimised is an objective at the answers' positions
    (:mod:`~lrp_prune.circuits.objectives`), by default :math:`\mathrm{KL}(p_\mathrm{full} \| p_\mathrm{gated})`, plus
    :class:`~lrp_prune.circuits.pressure.Pressure`.

    The model is no submodule: its weights are neither trained nor changed, nor written into checkpoints, nor broadcast under DDP,
    and it runs in evaluation mode. The gates are all there is to a checkpoint. ``trainer.fit(gates)`` trains on the task;
    :meth:`circuit` is the binary circuit, which each validation evaluates as what it is, without noise or gates in between.

    Example::

        train, held_out = tasks.IndirectObject(tokenizer).split()
        gates = circuits.GateTraining(model, train, held_out=held_out, density=0.05)
        Trainer(max_epochs=20).fit(gates)
        circuits.evaluate(model, gates.circuit(), held_out).faithfulness

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``.
        task: what to train on.
        granularities: the kinds of units, trained at once.
        ablation: the replacement: ``"counterfactual"``, ``"mean"`` or ``"zero"``.
        objective: what is kept: ``"kl"``, all that the model does at the answers' positions; ``"answers"``, that it tells
            answers from distractors, for which far less of it is needed; or the weight of each.
        penalties: weight of each kind's density in the loss, or one for all; 1.0 if neither this nor ``density`` is given.
        density: density of each kind to reach, or one for all.
        held_out: the task of the validations; None: the prompts of the training.
        warm_start: rankings of the same units, by which gates begin open or closed
            (:func:`~lrp_prune.circuits.finalizing.warm_started`): a few hundred steps then suffice where else
            thousands are needed.
        learning_rate: of AdamW without weight decay (which would pull all gates towards undecided).
        initial: :math:`\log\alpha` in the beginning, of kinds without a warm start.
        open_share: share of the units of each kind that a warm start opens; None: 2.5 times the target density, or half
            without one.
        slope: how :math:`\log\alpha` falls with the logarithm of the rank in a warm start.
        warmup: the share of the training in which the target density falls from that of the beginning.
        batch_size: prompts in a batch.
        remember: keep each batch's replacements and the full model's logits, which are the same in every epoch, in memory: two of
            four passes are saved. Bytes: samples x tokens x channels of all sites.
        include: patterns of module names to gate instead of all.
        exclude: patterns of module names to leave alone.

    Raises:
        ValueError: for wrong arguments, or a model without such units.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        granularities: str | Sequence[str] = NODE_KINDS,
        *,
        ablation: str = "counterfactual",
        objective: str | Mapping[str, float] = "kl",
        penalties: float | Mapping[str, float] | None = None,
        density: float | Mapping[str, float] | None = None,
        held_out: Task | None = None,
        warm_start: Ranking | Sequence[Ranking] | None = None,
        learning_rate: float = 0.1,
        initial: float = 2.0,
        open_share: float | Mapping[str, float] | None = None,
        slope: float = 1.5,
        warmup: float = 0.5,
        batch_size: int = 16,
        remember: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_ablation(ablation)
        kinds = kinds_of(granularities)
        self._model: list[nn.Module] = [forwarded(model)]  # in a list, so that it is no submodule
        self.task, self.held_out, self.ablation = task, held_out, ablation
        self.objective = objective_weights(objective)
        target = task.target("logit_difference")
        self.sites = find_sites(self.base, task.batches(1)[0], kinds, target, include, exclude)
        self._learning_rate, self._batch_size, self._warmup = learning_rate, batch_size, warmup
        rankings = [warm_start] if isinstance(warm_start, Ranking) else list(warm_start or ())
        targets = by_kind(density, kinds, "density")
        if penalties is None and density is None:
            penalties = 1.0
        self.pressure = Pressure(self.sites, by_kind(penalties, kinds, "penalties"), targets)
        shares = {kind: min(2.5 * targets[kind], 1.0) if kind in targets else 0.5 for kind in kinds}
        shares |= by_kind(open_share, kinds, "open_share")
        start = warm_started(self.sites, rankings, initial, shares, slope)
        self.log_alpha = nn.ParameterList([nn.Parameter(start[site.name]) for site in self.sites])
        self.pressure.begin(self.locations())
        self._means: Reference | None = None
        self._remembered: dict[bytes, tuple[Reference | None, Tensor]] | None = {} if remember else None

    @property
    def base(self) -> nn.Module:
        """The model whose circuit is learned."""
        return self._model[0]

    def locations(self) -> dict[str, Tensor]:
        """Name of a site -> :math:`\\log\\alpha`, ``[units]``."""
        return {site.name: value for site, value in zip(self.sites, self.log_alpha, strict=True)}

    def densities(self) -> dict[str, float]:
        """Kind -> expected share of open units."""
        with torch.no_grad():
            return {kind: float(value) for kind, value in self.pressure.densities(self.locations()).items()}

    def probabilities(self) -> dict[str, Tensor]:
        """Name of a site -> probability that each unit is open."""
        return {name: probability_open(value.detach()) for name, value in self.locations().items()}

    def circuit(self, sizes: Mapping[str, int | float] | None = None) -> Circuit:
        r"""The binary circuit: gates with :math:`\log\alpha > 0`, made consistent without changing what it computes.

        Units inside a closed head or block are closed; a head or block all of whose units are closed is closed where the
        replaced activations make that the same function (:func:`~lrp_prune.circuits.finalizing.finalized`).

        Args:
            sizes: kind -> number or share of units to keep, those with the largest :math:`\log\alpha`; kinds that are left out
                are cut at 0.
        """
        located = {name: value.detach().cpu() for name, value in self.locations().items()}
        kept = {name: is_open(value) for name, value in located.items()}
        kept |= most_open(self.sites, located, sizes or {})
        description = {"method": "gates", "ablation": self.ablation, "task": type(self.task).__name__}
        description["objective"] = ", ".join(f"{weight:g} {name}" for name, weight in self.objective.items())
        description["prompts"] = self.task.fingerprint
        kinds = dict.fromkeys(site.kind for site in self.sites)
        raw = Circuit(kept, self.sites, ",".join(kinds), fingerprint(self.base), description)
        return finalized(raw, self.ablation)

    def ranking(self) -> Ranking:
        r"""All units by :math:`\log\alpha`, for circuits of any size; blocks, heads and neurons compete with one another."""
        scores = {name: value.detach().cpu() for name, value in self.locations().items()}
        circuit = self.circuit()
        return Ranking(scores, self.sites, circuit.granularity, "signed", None, circuit.model, circuit.description)

    def reference(self, batch: Batch) -> Reference | None:
        """Replacement activations for a batch."""
        if self.ablation == "counterfactual":
            run = partial(answer_logits, self.base, batch, counterfactual=True)
            return counterfactual_reference(run, self.base, self.sites)
        if self.ablation == "mean" and self._means is None:
            batches = self.task.batches(self._batch_size)
            self._means = reference_for(self.base, self.sites, batches, "mean")(batches[0])
        return self._means

    def gated_logits(self, batch: Batch, gates: Mapping[str, Tensor], reference: Reference | None = None) -> Tensor:
        """Logits ``[samples, vocabulary]`` at the answers' positions under gates, differentiable in them."""
        reference = self.reference(batch) if reference is None else reference
        with (
            passing(self.base),
            _frozen(self.base),
            torch.enable_grad(),
            gating(self.base, self.sites, gates, reference),
        ):
            return answer_logits(self.base, batch)

    def full_logits(self, batch: Batch) -> Tensor:
        """Logits ``[samples, vocabulary]`` of the model as it is."""
        with passing(self.base):
            return answer_logits(self.base, batch)

    def _constants(self, batch: Batch) -> tuple[Reference | None, Tensor]:
        """What does not depend on the gates: replacements, and the full model's logits."""
        if self._remembered is None:
            return self.reference(batch), self.full_logits(batch)
        key = b"".join(batch[name].cpu().numpy().tobytes() for name in ("input_ids", "counterfactual_ids"))
        if key not in self._remembered:
            self._remembered[key] = self.reference(batch), self.full_logits(batch)
        return self._remembered[key]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        gates = {name: sample(value) for name, value in self.locations().items()}
        reference, full = self._constants(batch)
        logits = self.gated_logits(batch, gates, reference)
        loss = cast(Tensor, self.pressure(self.locations(), self._progress()))
        for name, weight in self.objective.items():
            value = objective_value(name, logits, batch, full)
            self.log(f"gates/{name}", value.detach(), prog_bar=True)
            loss = loss + weight * value
        return loss

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end, before which callbacks write checkpoints: the multipliers are part of them.
        self.pressure.step(self.locations(), self._progress(done=1))

    def _progress(self, done: int = 0) -> float:
        """The share of the warm-up that is over, with so many steps that the trainer has not counted yet."""
        steps = float(self.trainer.estimated_stepping_batches)
        if self._warmup <= 0 or steps == float("inf"):
            return 1.0
        return (self.trainer.global_step + done) / max(self._warmup * steps, 1.0)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        circuit = self.circuit()
        samples = len(batch["input_ids"])
        with torch.no_grad():
            full, logits = self.full_logits(batch), self.gated_logits(batch, circuit.kept)
            for name in ("kl", "accuracy", "logit_difference"):
                value = batch_metric(name, logits, batch, full).mean()
                self.log(f"circuit/{name}", value, batch_size=samples, sync_dist=True, prog_bar=name == "kl")
        sizes = {f"circuit/{kind}s": kept / total for kind, (kept, total) in circuit.sizes().items()}
        self.log_dict(sizes, batch_size=samples, sync_dist=True)

    @override
    def on_fit_start(self) -> None:
        self._move_base()

    @override
    def on_validation_start(self) -> None:
        self._move_base()

    def _move_base(self) -> None:
        with torch.inference_mode(False):  # moved in it, parameters could never be trained again
            self.base.to(self.device)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.log_alpha.parameters(), lr=self._learning_rate, weight_decay=0.0)

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        batches = cast(Any, self.task.batches(self._batch_size))
        return DataLoader(batches, batch_size=None, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        batches = cast(Any, (self.held_out or self.task).batches(self._batch_size))
        return DataLoader(batches, batch_size=None)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gates"] = {"sites": [site.name for site in self.sites], "model": fingerprint(self.base)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint["gates"], {"sites": [site.name for site in self.sites], "model": fingerprint(self.base)}
        for what, value in own.items():
            if saved[what] != value:
                raise ValueError(f"the checkpoint's gates are for {what} {saved[what]}, these are for {value}")
