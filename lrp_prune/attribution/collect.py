"""Collecting: relevance of weights or units over batches, streaming."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.chunks import check_chunks, collect
from lrp_prune.attribution.defaults import best_for
from lrp_prune.attribution.observers import ObserverTable
from lrp_prune.attribution.sharded import COLLECTING, ShardedTable, shardings_of
from lrp_prune.attribution.silent import tell_silent
from lrp_prune.attribution.unit_observers import UNIT_KINDS
from lrp_prune.distributed.sharding import agreeing, device_of, fsdp_modules
from lrp_prune.engine.application import folds
from lrp_prune.engine.composites import CompositeLike, composite_of
from lrp_prune.engine.held import Held
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.roots import Root
from lrp_prune.engine.unaltered import unaltered
from lrp_prune.engine.unsharding import refuse_inference_tensors
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.batches import check_batches, samples_in, to_device
from lrp_prune.models.loaded import check_loaded
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.scripted import refuse_scripted
from lrp_prune.models.subject import Subject, subject_of
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.relevance.statistics import Statistic
from lrp_prune.relevance.unscored import check_included, tell_nothing
from lrp_prune.targets import Inferred, Target, check_suits, checked, describe


class RelevanceAccumulator:
    """Collects relevance batch by batch; :func:`attribute` is the loop around it.

    The model's parameters, gradients, modes, buffers and random numbers are untouched by :meth:`update`.

    Args:
        model: any module; of a ``LightningModule`` what :func:`~lrp_prune.models.subject_of` names is run.
        target: what is explained, see :func:`attribute`.
        composite: rules; None for the best measured, see :func:`~lrp_prune.attribution.defaults.best_for`.
        statistic: reduction over tokens and samples; None for the best measured.
        granularity: what relevance is about.
        include: patterns of names to score instead of the default.
        exclude: patterns of names to leave out.
        trainable_only: score only weights that require grad, unless ``include`` names them.
        accumulate_on: device of the sums; the weights' own by default.
        matmul_dtype: dtype in which statistics are multiplied. ``"auto"`` is bfloat16 for float32 weights where the device
            multiplies it faster (the sums stay float32), else the weights' own; relative rounding is 0.4 % a batch. Where
            nothing cancels (``abs_token``, ``squared_token``, ``geometric``) relevance also passes the scored linear layers
            in this precision. ``None`` rounds nothing.
        skip_first: how many tokens at the beginning of each sample of a causal language model enter no statistic. Such
            models use the first token as a sink of attention, with activations that dwarf all others.
        steps: of units, in how many steps float inputs and embeddings go from zeros to what they are, while what flows through
            the units is summed up (:mod:`~lrp_prune.attribution.conductance`); None: inputs are what they are.
        unruled: what to do about operations without a rule.
        forward_context: a context manager for the forward, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: str | Target | Callable[[nn.Module, Any], Tensor] | Inferred | None = None,
        composite: CompositeLike | None = None,
        statistic: str | Statistic | None = None,
        granularity: str | Sequence[str] = "weight",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        trainable_only: bool = False,
        accumulate_on: str | torch.device | None = None,
        matmul_dtype: str | torch.dtype | None = "auto",
        skip_first: int = 0,
        steps: int | None = None,
        unruled: str = "warn",
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._subject: Subject = subject_of(model)
        refuse_scripted(self._subject.module)
        best = best_for(granularity)
        self._composite = composite_of(composite or best.composite)
        self._composite.check_scores_weights()
        self._target: Target | None = None
        self._inferred = target if isinstance(target, Inferred) else Inferred()
        if target is not None and target is not self._inferred:
            self._target = checked(target)
            check_suits(self._target, self._subject.module)
        elif self._subject.own_target is not None:
            self._target = self._subject.own_target
        if skip_first < 0:
            raise ValueError(f"skip_first must be 0 or more, got {skip_first}")
        self._skip_first = skip_first
        self._unruled, self._forward_context = unruled, forward_context
        sharded = bool(shardings_of(self._subject.module))
        if steps is not None and not set(granularities_of(granularity)) <= set(UNIT_KINDS):
            raise ValueError(f"steps is for units, {', '.join(UNIT_KINDS)}s, not for {granularity!r}: leave it out")
        if steps is not None and sharded:
            raise ValueError("steps is not for models that fully_shard has divided: collect on one that is whole")
        self._shares = [1.0] if steps is None else [step / steps for step in range(steps + 1)]
        self.table = (ShardedTable if sharded else ObserverTable)(
            self._subject.module,
            statistic=statistic or best.statistic,
            granularity=granularity,
            include=include,
            exclude=exclude,
            trainable_only=trainable_only,
            accumulate_on=accumulate_on,
            matmul_dtype=matmul_dtype,
            on_path=steps is not None,
        )
        self.num_samples = 0

    @property
    def needs_data(self) -> bool:
        """Always: it collects from batches."""
        return True

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights that are scored, by canonical name."""
        return self.table.parameters

    def update(self, batch: Any) -> None:
        """Add one batch: one forward and one backward pass.

        Raises:
            FloatingPointError: if the explained value or the relevance of an input is not finite.
            ValueError: if the target does not fit the batch.
        """
        module, table = self._subject.module, self.table
        sharded = table if isinstance(table, ShardedTable) else None
        mesh = None if sharded is None else sharded.mesh
        device = next(module.parameters()).device if mesh is None else device_of(mesh)
        with unaltered(module):
            batch = to_device(batch, device)
            table.batch.samples = samples_in(batch)
            table.batch.counted = counted_tokens(module, batch, self._skip_first)
            if self._target is None:  # before the rules act, and the same number of forwards in each process
                if sharded is not None:
                    refuse_inference_tensors(fsdp_modules(module))
                with self._forward_context():
                    self._target = self._inferred.decide(module, batch, mesh)
            counted = table.batch.counted
            for point, share in enumerate(self._shares):
                table.begin(point, len(self._shares))
                table.batch.counted = counted  # a pass lets go of it
                self._pass(module, batch, share, first=self.num_samples == 0 and point == 0)
                table.end()
        self.num_samples += table.batch.samples

    def _pass(self, module: nn.Module, batch: Any, share: float, first: bool) -> None:
        """One forward and backward pass, with this share of the inputs."""
        assert self._target is not None
        table = self.table
        sharded = table if isinstance(table, ShardedTable) else None
        mesh = None if sharded is None else sharded.mesh
        held = Held() if first and table.tells_outputs and not folds(self._composite) else None
        uses = WeightUses(table.observers, table.tracer, held)
        unruled = self._unruled if first else "ignore"
        with (
            propagating(
                module,
                self._composite,
                None,
                unruled,
                uses,
                tracer=table.tracer,
                kept=table.kept,
                named=first,
                share=share,
                backward=table.backward_needed,
            ) as propagation,
            nullcontext() if sharded is None else sharded.passing(),
        ):
            with agreeing(mesh, COLLECTING), self._forward_context():
                value = self._target(module, batch)
                if isinstance(value, Tensor) and value.is_meta:
                    raise ValueError(
                        "the explained value is on the meta device, where tensors have shapes and no values: load the weights "
                        "first (lrp_prune.attributing gives relevance there, by its shapes alone)"
                    )
                check_loaded(table.parameters)
                if sharded is not None:
                    propagation.check_target(value, table.backward_needed)
            roots = propagation.roots()
            table.touched(uses, roots)
            table.make_room()
            needed = table.backward_needed
            gradients: Sequence[Tensor | None] = [None] * len(roots)
            if needed:
                if held is not None:
                    table.note_held(propagation.made_by(held))
                gradients = propagation.gradients(value, [root.leaf for root in roots])
        with agreeing(mesh, COLLECTING):
            if needed:
                propagation.check_reached(value, gradients)
            self._add_roots(roots, gradients)
        if sharded is not None:
            sharded.sum_up()

    def _add_roots(self, roots: Sequence[Root], gradients: Sequence[Tensor | None]) -> None:
        for root, gradient in zip(roots, gradients, strict=True):
            if gradient is None:
                if not self.table.backward_needed:
                    self.table.add_lookup(root)
                continue
            if not bool(torch.isfinite(gradient).all()):
                raise FloatingPointError(
                    f"relevance is not finite at {root.name!r} after {self.num_samples} good samples: "
                    "check the batch and the precision"
                )
            self.table.add_root(root, gradient)
        self.table.passed()

    def compute(self) -> Relevance:
        """The relevance so far; the accumulator is empty afterwards.

        Raises:
            ValueError: if there was no batch, or nothing was scored.
            FloatingPointError: if a sum is not finite.
        """
        if self.num_samples == 0:
            raise ValueError("no batch was seen: relevance needs at least one reference sample")
        samples, self.num_samples = self.num_samples, 0
        relevance = self.table.finish(
            composite=self._composite.name,
            rules=self._composite.description,
            num_samples=samples,
            target=describe(self._target),
        )
        tracer = self.table.tracer
        tell_silent(relevance, self._composite, self.table.held, () if tracer is None else tracer.table.stacked)
        return relevance


def attribute(
    model: nn.Module,
    batches: Iterable[Any],
    target: str | Target | Callable[[nn.Module, Any], Tensor] | None = None,
    composite: CompositeLike | None = None,
    statistic: str | Statistic | None = None,
    granularity: str | Sequence[str] = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    chunks: int = 1,
    **options: Any,
) -> Relevance:
    """Relevance of a model's weights or units over reference batches, in one forward and backward pass each.

    Of a model that ``fully_shard`` has divided, every process gives its own batches, as many as the others; the result is
    that of all of them together, and of each weight a process holds what it holds of the weight.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``.
        batches: batches as the model takes them: mappings (``input_ids``, ``attention_mask``, ``labels``, ...), pairs of
            inputs and labels, objects with attributes, or tensors; see :func:`lrp_prune.models.call_of`.
        target: what is explained: ``"next_token"`` (how likely tokens are given those before), ``"token"`` (of labels
            at their own token or pixel), ``"last_token"`` (largest logit at the last attended token), ``"class"`` (logit of
            the true class), ``"multi_label"`` (logits of set labels minus those of others), ``"regression"`` (size of the
            predicted values), ``"span"`` (logits of an answer's first and last token); a
            :class:`~lrp_prune.targets.Target` such as ``LogitDifference``, a function of model and batch that returns a
            scalar; None: the model's own ``relevance_target(batch)``, else :class:`~lrp_prune.targets.Inferred`.
        composite: ``"epsilon"``, ``"attnlrp"``, ``"cp_lrp"``, ``"gradient"``, a file such as ``"mine.yaml"``, or a
            :class:`~lrp_prune.attribution.Composite`; None: ``"epsilon"`` for weights, ``"attnlrp"`` for units.
        statistic: ``"signed"``, ``"abs_sample"``, ``"abs_token"``, ``"pxp"``, ``"squared_token"``, ``"geometric"`` (weights) or a
            :class:`~lrp_prune.relevance.statistics.Statistic`; None: ``"geometric"`` for weights, ``"abs_token"`` for
            units. So :func:`attribute` and then :func:`lrp_prune.select` do by default what :func:`lrp_prune.prune` does.
        granularity: ``"weight"``; ``"neuron"`` (channels that layers write and layers read, with nothing between that mixes
            them: hidden units, filters), ``"head"`` (what a head writes to the output projection), ``"block"`` (what a layer
            writes onto a residual stream), ``"embedding"`` (rows of embeddings); or several kinds of units, whose groups
            are then called ``head:...``, ``neuron:...``.
        include: patterns of parameter names to score; by default all weights of two and more dimensions except embeddings,
            the output embedding, and what is data rather than a weight
            (see :func:`~lrp_prune.attribution.candidates.candidates`).
        exclude: patterns of parameter names to leave out.
        chunks: in how many passes over the batches the weights are collected, each about as many of them. The sums of
            the others are in the host's memory, so that the device holds a part of the relevance at a time.
        **options: further arguments of :class:`RelevanceAccumulator`.

    Returns:
        The :class:`~lrp_prune.relevance.Relevance`. Weights without relevance are listed as ``unscored``, with the reason: that
        no relevance reaches them, or that zeros in them would be none in what the model uses.

    Raises:
        ValueError: for a pattern that matches nothing or names unscored weights only, a target that cannot be inferred or is
            for another kind of model, a batch that does not fit the model, no batches or a single one, quantized weights.
        FloatingPointError: if the explained value or a relevance is not finite.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> relevance = lrp_prune.attribute(model, batches)
        >>> {name: tuple(tensor.shape) for name, tensor in relevance.items()}
        {'0.weight': (8, 4), '2.weight': (2, 8)}
    """
    check_batches(batches)
    check_chunks(chunks, batches, granularity)
    accumulator = RelevanceAccumulator(
        model,
        target=target,
        composite=composite,
        statistic=statistic,
        granularity=granularity,
        include=include,
        exclude=exclude,
        **options,
    )
    collect(accumulator, batches, model, chunks)
    relevance = accumulator.compute()
    check_included(include, relevance, relevance.unscored)
    tell_nothing(relevance, stacklevel=3)
    return relevance
