"""Strategies that a callback does not work under."""

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lrp_prune.wrapper.internals import starts_processes

STRATEGIES = (SingleDeviceStrategy, DDPStrategy)


def check_strategy(trainer: Trainer, name: str, allow_untested: bool, sharded: bool = False) -> None:
    """Refuse strategies for which nothing is tested; subclasses count as others (DeepSpeed's is one of DDP's).

    Args:
        trainer: the run.
        name: of the callback.
        allow_untested: warn only.
        sharded: whether the callback works on parameters that ``fully_shard`` has divided.
    """
    strategy = trainer.strategy
    if any(kind.__module__.partition(".")[0] == "pytorch_lightning" for kind in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{name} is a callback of the package lightning, and this Trainer is that of pytorch_lightning, whose classes are "
            "others: import Trainer, LightningModule and callbacks from lightning.pytorch"
        )
    if starts_processes(trainer):
        rank_zero_warn(
            f"this strategy starts processes that give back the model's weights only: what {name} finds stays in them. Take "
            "it from a checkpoint, write it in a hook of your own (on_fit_end), or use strategy='ddp'"
        )
    if type(strategy) is ModelParallelStrategy and sharded:
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                f"{name} works on weights that fully_shard has divided, not under tensor parallelism: use "
                f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)"
            )
        return
    if type(strategy) in STRATEGIES:
        return
    tested = "'auto' on one device and 'ddp' in all its variants" + (", and ModelParallelStrategy" if sharded else "")
    message = f"{name} is tested with the strategies {tested}, not with {type(strategy).__name__}"
    remedy = "use one of those"
    if sharded and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        remedy = (
            "use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), and shard the model in "
            "configure_model by torch.distributed.fsdp.fully_shard"
        )
    if not allow_untested:
        raise MisconfigurationException(f"{message}: {remedy}, or pass allow_untested=True to try")
    rank_zero_warn(f"{message}: you asked for it by allow_untested=True")


def check_compensated_strategy(trainer: Trainer) -> None:
    """Refuse strategies that divide weights so that no layer can be gathered, whether they were allowed as untested or not."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"compensation works on whole layers, and {type(trainer.strategy).__name__} has none: use strategy='ddp', or "
            "ModelParallelStrategy with fully_shard, whose layers it gathers one at a time"
        )
