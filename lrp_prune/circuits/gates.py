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
from lrp_prune.attribution.running import subject_of
from lrp_prune.circuits.ablation import Reference, check_ablation, counterfactual_reference, gating
from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.finalizing import finalized, most_open, warm_started
from lrp_prune.circuits.hard_concrete import is_open, probability_open, sample
from lrp_prune.circuits.pressure import Pressure, by_kind
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import KINDS, find_sites, kinds_of, passing
from lrp_prune.tasks.metrics import batch_metric, kl_divergence
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
    the down projection, blocks at what they add to the residual stream. Minimised is
    :math:`\mathrm{KL}(p_\mathrm{full} \| p_\mathrm{gated})` at the answers' positions plus
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
        penalties: weight of each kind's density in the loss, or one for all; 1.0 if neither this nor ``density`` is given.
        density: density of each kind to reach, or one for all.
        held_out: the task of the validations; None: the prompts of the training.
        warm_start: rankings of the same units, by which the gates of unimportant units begin closer to 0.
        learning_rate: of AdamW without weight decay (which would pull all gates towards undecided).
        initial: :math:`\log\alpha` in the beginning.
        spread: a warm start gives the most important unit of a kind ``initial + spread``, the least ``initial - spread``.
        warmup: the share of the training in which the target density falls from 1.
        batch_size: prompts in a batch.
        include: patterns of module names to gate instead of all.
        exclude: patterns of module names to leave alone.

    Raises:
        ValueError: for wrong arguments, or a model without such units.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        granularities: str | Sequence[str] = KINDS,
        *,
        ablation: str = "counterfactual",
        penalties: float | Mapping[str, float] | None = None,
        density: float | Mapping[str, float] | None = None,
        held_out: Task | None = None,
        warm_start: Ranking | Sequence[Ranking] | None = None,
        learning_rate: float = 0.05,
        initial: float = 2.0,
        spread: float = 1.5,
        warmup: float = 0.5,
        batch_size: int = 16,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_ablation(ablation)
        kinds = kinds_of(granularities)
        self._model: list[nn.Module] = [subject_of(model).module]  # in a list, so that it is no submodule
        self.task, self.held_out, self.ablation = task, held_out, ablation
        target = task.target("logit_difference")
        self.sites = find_sites(self.base, task.batches(1)[0], kinds, target, include, exclude)
        self._learning_rate, self._batch_size, self._warmup = learning_rate, batch_size, warmup
        start = {site.name: torch.full((site.units,), float(initial)) for site in self.sites}
        if warm_start is not None:
            rankings = [warm_start] if isinstance(warm_start, Ranking) else list(warm_start)
            start = warm_started(self.sites, rankings, initial, spread)
        self.log_alpha = nn.ParameterList([nn.Parameter(start[site.name]) for site in self.sites])
        if penalties is None and density is None:
            penalties = 1.0
        self.pressure = Pressure(self.sites, by_kind(penalties, kinds, "penalties"), by_kind(density, kinds, "density"))
        self._means: Reference | None = None

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
        description["prompts"] = self.task.fingerprint
        kinds = dict.fromkeys(site.kind for site in self.sites)
        raw = Circuit(kept, self.sites, ",".join(kinds), fingerprint(self.base), description)
        return finalized(raw, self.ablation)

    def reference(self, batch: Batch) -> Reference | None:
        """Replacement activations for a batch."""
        if self.ablation == "counterfactual":
            run = partial(answer_logits, self.base, batch, counterfactual=True)
            return counterfactual_reference(run, self.base, self.sites)
        if self.ablation == "mean" and self._means is None:
            batches = self.task.batches(self._batch_size)
            self._means = reference_for(self.base, self.sites, batches, "mean")(batches[0])
        return self._means

    def gated_logits(self, batch: Batch, gates: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[samples, vocabulary]`` at the answers' positions under gates, differentiable in them."""
        reference = self.reference(batch)
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

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        gates = {name: sample(value) for name, value in self.locations().items()}
        divergence = kl_divergence(self.full_logits(batch), self.gated_logits(batch, gates)).mean()
        pressure = self.pressure(self.locations(), self._progress())
        self.log("gates/kl", divergence.detach(), prog_bar=True)
        return cast(Tensor, divergence + pressure)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.pressure.step(self.locations(), self._progress())

    def _progress(self) -> float:
        steps = float(self.trainer.estimated_stepping_batches)
        if self._warmup <= 0 or steps == float("inf"):
            return 1.0
        return self.trainer.global_step / max(self._warmup * steps, 1.0)

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
        self.base.to(self.device)

    @override
    def on_validation_start(self) -> None:
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
