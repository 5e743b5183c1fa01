"""Block by block, a pruned model is trained to give what the dense one gave: without labels, one block's data at a time."""

import hashlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lrp_prune.adapters import adapter_parameters
from lrp_prune.arguments import check_integer
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.models.batches import check_batches, tensors, to_device
from lrp_prune.models.states import undisturbed
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.compensation import Compensation, LeastSquares, compensate_, compensation_of
from lrp_prune.pruning.compensation.stages import kept_tensors
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.restoring import remembered, undone_on_error
from lrp_prune.reconstruction.result import Reconstructed
from lrp_prune.reconstruction.stage import MakeOptimizer, StageTraining, by_size, expected_of
from lrp_prune.storage import load_tensors, save_tensors

_KIND = "reconstructed stage"
_HELD_OUT = 0.2
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}


def reconstruct(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Any],
    *,
    steps: int = 200,
    compensation: str | Compensation | None = "exact",
    dense: float = 1.0,
    optimizer: MakeOptimizer | None = None,
    target: Any = None,
    folder: str | os.PathLike[str] | None = None,
    trainer: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Reconstructed:
    r"""Prune a dense model by masks, in place, and train each of its blocks to give what it gave.

    For one block after the other, :math:`\min_W \lVert f_W(x') - f_{W_0}(x) \rVert^2` over its kept weights, its biases and what
    else it has, by gradient (local reconstruction, arXiv 2510.14444): :math:`x'` is what it gets behind the blocks before it,
    as these are by then, :math:`x` what it got in the dense model. No labels, and no second model: blocks are found by what
    repeats, as for ``prune(compensation=...)``, and in memory are a block's dense weights and what it gets and gives, of all
    batches. A fifth of them is held out of the training (not of the compensation before it); a block whose training does not
    help there has its weights from before it again.

    Args:
        model: the dense model, see :func:`lrp_prune.attribute`; in one process, and whole.
        masks: what is pruned; never changed.
        batches: at least two, of few samples each: the training takes one in a step.
        steps: of the optimizer, for each block.
        compensation: what each block's weights are before it is trained: ``"exact"`` or ``"obs"`` least squares of each layer, an
            object that says more (see :func:`lrp_prune.prune`), or None for the dense ones.
        dense: 1: blocks learn what they gave in the dense model, and make up for those before them; 0: what their dense weights
            make of the inputs that they get by now.
        optimizer: from parameters to an optimizer; None for AdamW that moves each tensor by up to 0.3 % of its root mean square
            in a step, and without a compensation, from which there is much further to go, by 3 %. The rate goes to zero linearly.
        target: what is run, where it is no logits, see :func:`lrp_prune.attribute`.
        folder: where each block is written once it is done. A call with the same model, arguments and folder goes on from there,
            so that an interruption costs the block at hand.
        trainer: further arguments of each block's ``Trainer``, such as ``{"precision": "bf16-mixed", "gradient_clip_val": 1.0}``.
        progress: show a progress bar.

    Returns:
        Errors of each block before and after, and what was left out. If an error is raised, the model is as it was.

    Raises:
        ValueError: fewer than two batches, a model that is divided among processes or one of several processes, a folder of
            another model or other arguments, and what :func:`lrp_prune.prune` says of its compensation.
        RuntimeError: in inference mode.

    Example:
        >>> import torch, lrp_prune
        >>> _ = torch.manual_seed(0)
        >>> blocks = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(3)]
        >>> model = torch.nn.Sequential(*blocks, torch.nn.Linear(16, 4))
        >>> batches = [(torch.randn(16, 16), torch.randint(4, (16,))) for _ in range(8)]
        >>> masks = lrp_prune.select(lrp_prune.attribute(model, batches), sparsity=0.5)
        >>> done = lrp_prune.reconstruct(model, masks, batches, steps=50, progress=False)
        >>> len(done.errors), all(after <= before for before, after in done.errors.values())
        (4, True)
    """
    check_integer("steps", steps, 1)
    check_batches(batches)
    way = compensation_of(compensation)
    if not 0 <= dense <= 1 or dense not in (0, 1):
        raise ValueError(f"dense must be 0 or 1, got {dense!r}")
    reference = list(batches)
    if len(reference) < 2:
        raise ValueError(
            f"a fifth of the batches is held out, and at least one: pass two or more (small) batches, got {len(reference)}"
        )
    module = subject_of(model).module
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise ValueError("a model that is divided among processes cannot be reconstructed: reconstruct the whole model")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(
                f"reconstruct works in one process, and this is one of {processes}, each of which would train a model of its "
                "own: reconstruct before the training in several processes, or after it"
            )
    optimizer = optimizer or partial(by_size, rate=0.03 if way is None else 0.003)
    arguments: dict[str, Any] = {}
    if folder is not None:
        arguments = {"compensation": repr(way), "dense": dense, "optimizer": _name_of(optimizer)}
        arguments |= {"trainer": repr(trainer or {}), "batches": _fingerprint_of(reference)}
    refining = _Reconstructing(module, masks, steps, optimizer, trainer or {}, folder, way is not None, arguments)
    # The dense model's own inputs are run where they are what blocks learn from, whatever layers are solved for.
    way = way if way is not None else LeastSquares(dense=dense)
    if (way.dense > 0) != (dense > 0):
        raise ValueError(
            f"compensation has dense={way.dense:g}, so that dense={dense:g} would be of another model: let both be 0, or neither"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "blocks are trained by gradient, which inference mode rules out: call reconstruct outside of it"
        )
    begun = time.perf_counter()
    with undone_on_error() as undo:
        found = compensate_(
            model,
            masks,
            reference,
            way,
            target,
            progress,
            lambda parameters: undo.append(remembered(module, parameters)),
            refining=refining,
        )
    refining.result.left_out = found.left_out
    refining.result.seconds = time.perf_counter() - begun
    return refining.result


class _Reconstructing:
    """Trains stages as they come."""

    def __init__(
        self, module: nn.Module, masks: Masks, steps: int, make_optimizer: MakeOptimizer, options: Mapping[str, Any],
        folder: str | os.PathLike[str] | None, updates: bool, arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.updates, self.result = updates, Reconstructed()
        self._module, self._masks, self._steps = module, masks, steps
        self._make_optimizer, self._options = make_optimizer, options
        self._folder = Path(folder) if folder is not None else None
        self._of = {"masks": masks.checksum(), "steps": steps, "updates": updates, **arguments}
        self._dense: dict[str, str] = {}

    def restored(self, name: str, held: Mapping[str, nn.Parameter]) -> bool:
        path = self._path(name)
        if path is None:
            return False
        self._dense[name] = _fingerprint(held)
        if not path.exists():
            return False
        tensors, described = load_tensors(path, _KIND)
        if described["of"] != {**self._of, "dense": self._dense[name]} or set(tensors) != set(held):
            raise ValueError(
                f"{path} is of another model, of other masks or of other arguments: give reconstruct another folder="
            )
        with torch.no_grad():
            for key, parameter in held.items():
                parameter.copy_(tensors[key])
        self._note(name, described["before"], described["after"], described["taken_back"])
        return True

    def refine(
        self, name: str, stage: nn.Module, held: Mapping[str, nn.Parameter], inputs: Callable[[int], Any], outputs: list[Any],
        counted: Callable[[int], Tensor | None],
    ) -> None:  # fmt: skip
        batches = []
        for index, output in enumerate(outputs):
            given = inputs(index)
            if given is not None and output is not None:
                args, kwargs = kept_tensors(given)
                batches.append((args, kwargs, expected_of(kept_tensors(output)), counted(index)))
        trained = self._trained(stage, held)
        if len(batches) < 2 or not trained or not batches[0][2]:
            return
        number = max(1, round(_HELD_OUT * len(batches)))
        training = StageTraining(stage, self._module, self._masked(held), trained, self._make_optimizer)
        restore, frozen = remembered(stage), [(entry, entry.requires_grad, entry.grad) for entry in held.values()]
        with undisturbed(stage):
            before = _error(training, batches[-number:])
            try:
                for entry, *_ in frozen:
                    entry.grad = None
                    entry.requires_grad_(any(entry is other for other in trained))
                self._fit(training, batches[:-number])
            finally:
                training.release()
                for entry, requires, gradient in frozen:
                    entry.requires_grad_(requires)
                    entry.grad = gradient
            after = _error(training, batches[-number:])
        taken_back = not after < before
        if taken_back:
            restore()
        self._note(name, before, before if taken_back else after, taken_back)
        self._save(name, held, before, before if taken_back else after, taken_back)

    def _fit(self, training: StageTraining, batches: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as nowhere, warnings.catch_warnings(), _silent(), torch.enable_grad():
            warnings.filterwarnings("ignore", message=".*(does not have many workers|in eval mode).*")
            device = next(training.stage.parameters()).device
            kind = device.type
            options = {**_QUIET, "accelerator": "gpu" if kind == "cuda" else kind, "default_root_dir": nowhere}
            options |= {"max_steps": self._steps, "max_epochs": -1, **self._options}
            order = torch.Generator().manual_seed(0)  # the same whatever is drawn elsewhere
            loader: Any = DataLoader(batches, batch_size=None, shuffle=True, generator=order)  # type: ignore[arg-type]  # a list is one
            Trainer(**options).fit(training, loader)
            training.stage.to(device)  # a trainer leaves it on the CPU

    def _trained(self, stage: nn.Module, held: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
        """Parameters that nothing outside of the stage uses, and that no adapter has added."""
        inside = {id(module) for module in stage.modules()}
        shared = {
            id(entry)
            for module in self._module.modules()
            if id(module) not in inside
            for entry in module.parameters(recurse=False)
        }
        added = adapter_parameters(stage)
        adapters = {id(entry) for name, entry in stage.named_parameters(remove_duplicate=False) if name in added}
        return [
            entry
            for entry in held.values()
            if entry.is_floating_point() and id(entry) not in shared and id(entry) not in adapters
        ]

    def _masked(self, held: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: self._masks[name] for name in self._masks if name in held}

    def _note(self, name: str, before: float, after: float, taken_back: bool) -> None:
        self.result.errors[name] = (before, after)
        if taken_back:
            self.result.taken_back.append(name)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name or 'model'}.safetensors"

    def _save(self, name: str, held: Mapping[str, nn.Parameter], before: float, after: float, taken_back: bool) -> None:
        path = self._path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            told = {
                "of": {**self._of, "dense": self._dense[name]},
                "before": before,
                "after": after,
                "taken_back": taken_back,
            }
            save_tensors(path, _KIND, {key: entry.detach() for key, entry in held.items()}, told)


def _error(training: StageTraining, batches: list[Any]) -> float:
    """The mean error over batches."""
    device = next(training.stage.parameters()).device
    with torch.no_grad():
        return sum(float(training.error(to_device(batch, device))) for batch in batches) / len(batches)


def _fingerprint(held: Mapping[str, Tensor]) -> str:
    """What a stage's weights were, as far as masks have left them."""
    digest = hashlib.sha256()
    for name in sorted(held):
        digest.update(f"{name} {tuple(held[name].shape)}".encode())
        digest.update(held[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint_of(batches: list[Any]) -> str:
    """Of all tensors of the batches, at their places."""
    return _fingerprint({f"{index:09d}": tensor for index, tensor in enumerate(tensors(batches))})


def _name_of(optimizer: MakeOptimizer) -> str:
    """What makes optimizers, as far as it says what it is: of a function its name, of a partial one its arguments as well."""
    if isinstance(optimizer, partial):
        return f"{_name_of(optimizer.func)} {optimizer.args} {sorted(optimizer.keywords.items())}"
    return getattr(optimizer, "__qualname__", type(optimizer).__qualname__)


@contextmanager
def _silent() -> Iterator[None]:
    """Lightning tells of each trainer, and there is one for each stage."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
