"""Models that ``fully_shard`` has divided: what the propagation mode must know of them, and what it must not disturb.

FSDP2 puts another tensor in a parameter's place for the time of a module's forward and backward, does so in hooks of its
own, and reduces gradients whenever a backward pass has gone through a module, also one that makes no gradients of
parameters: in an accumulation window it would reduce those that wait there.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lrp_prune.distributed.fsdp import forget_pass, gathered_parameters, gradients_unsynchronized
from lrp_prune.distributed.sharding import at_rest, fsdp_modules, is_sharded
from lrp_prune.engine.mode import PropagationMode
from lrp_prune.engine.origins import origin_of_parameter
from lrp_prune.names import named_parameters


@contextmanager
def unsharding(model: nn.Module, mode: PropagationMode) -> Iterator[None]:
    """Let a mode know the unsharded parameters of a model, and leave its gradients and flags alone, while it lasts.

    To be entered before any other hook is put on the model: the mode is suspended while FSDP's own hooks run.

    Raises:
        RuntimeError: if parameters were gathered in inference mode before, which no gradient can go through.
        ValueError: in the forward, if a parameter is divided by tensor parallelism as well.
    """
    modules = list(fsdp_modules(model))
    if not modules:
        yield
        return
    refuse_inference_tensors(modules)
    with ExitStack() as stack:
        stack.enter_context(gradients_unsynchronized(modules))
        for module, places in _places(model, modules):
            for handle in _hooks(module, places, mode):
                stack.callback(handle.remove)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the error at hand is the one to tell about
                forget_pass(modules)
            raise
        finally:
            at_rest(model)


def own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, without those that ``fully_shard`` was called on separately."""
    yield module
    for child in module.children():
        if next(fsdp_modules(child), None) is not child:
            yield from own_modules(child)


def _places(model: nn.Module, modules: list[nn.Module]) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str, str]]]]:
    """For each FSDP module: where its parameters are held (module and attribute), and what each is called."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    for module in modules:
        yield (
            module,
            [
                (owner, attribute, names[id(parameter)])
                for owner in own_modules(module)
                for attribute, parameter in owner._parameters.items()
                if parameter is not None
            ],
        )


def _hooks(module: nn.Module, places: list[tuple[nn.Module, str, str]], mode: PropagationMode) -> Iterator[Any]:
    """Around FSDP's hooks: suspend the mode before, know the new parameters and the inputs' tags after."""
    suspended: list[AbstractContextManager[None]] = []
    inputs: list[list[Any]] = []

    def suspend() -> None:
        context = mode.acting(False)
        context.__enter__()
        suspended.append(context)

    def resume() -> None:
        if suspended:
            suspended.pop().__exit__(None, None, None)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        suspend()
        inputs.append(tree_flatten((args, kwargs))[0])

    def after(module: nn.Module, args: Any, kwargs: Any) -> None:
        resume()
        for value, source in zip(tree_flatten((args, kwargs))[0], inputs.pop(), strict=False):
            mode.carry(source, value)
        with torch._C.DisableTorchFunction():
            for owner, attribute, name in places:
                parameter = owner._parameters[attribute]
                if parameter is not None and not (is_sharded(parameter) and parameter is mode._parameters.get(name)):
                    _adopt(mode, name, parameter)

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        suspend()

    def left(module: nn.Module, args: Any, output: Any) -> None:
        resume()

    yield module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    yield module.register_forward_pre_hook(after, with_kwargs=True)
    yield module.register_forward_hook(leaving, prepend=True)
    yield module.register_forward_hook(left)


def _adopt(mode: PropagationMode, name: str, parameter: Tensor) -> None:
    if id(parameter) in mode._origins:
        return
    if is_sharded(parameter):
        raise ValueError(
            f"{name} is still divided in the forward: models with tensor parallelism are not supported, use fully_shard alone"
        )
    mode._origins[id(parameter)] = origin_of_parameter(name, parameter)


def refuse_inference_tensors(modules: Iterable[nn.Module]) -> None:
    """Refuse modules of FSDP that keep tensors which nothing can be differentiated through.

    Raises:
        RuntimeError: if there is one, with what to do.
    """
    for module in modules:
        for name, gathered in gathered_parameters(module):
            if gathered.is_inference():
                raise RuntimeError(
                    f"{name} was gathered in inference mode before, and FSDP keeps such tensors: run the model under "
                    "torch.no_grad() instead (in Lightning: Trainer(inference_mode=False)), or collect before"
                )


def make_ordinary(model: nn.Module) -> None:
    """Let FSDP make the tensors that it gathers parameters into, one module at a time, outside of inference mode.

    It makes them at the first forward and keeps them; in ``torch.inference_mode`` they would be inference tensors, which
    nothing can be differentiated through later.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in fsdp_modules(model):
            module.unshard()  # type: ignore[operator]  # of FSDPModule
            module.reshard()  # type: ignore[operator]
