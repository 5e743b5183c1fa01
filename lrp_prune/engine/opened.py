"""Custom autograd functions, opened: what their forward is made of gets its rules, in place of the backward that they come with.

A mode does not see what a ``torch.autograd.Function`` does, only that it was called. Its backward is a gradient, often of another
function (a straight-through estimator, a slope that is bounded), and no rule. Where the forward is made of torch's functions
alone, it is run as a part of the model is, with the same values. Others stay closed, and the audit names them: kernels of
other libraries, what communicates with other processes, what writes a result into a tensor that is given (``out=``), and what
calls Python that is not torch's.
"""

import builtins
import dis
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lrp_prune.engine.call import is_activation
from lrp_prune.engine.endings import ending_of
from lrp_prune.engine.nested import tensors_in

_modes: Callable[[], list[TorchFunctionMode]] = torch.overrides._get_current_function_mode_stack

_CLOSED = frozenset(
    {"ops", "_C", "distributed", "library", "cuda", "utils", "jit", "compile", "no_grad", "inference_mode"}
)
"""What a forward that names it may do out of the mode's sight, or to others."""
_RESULT_GIVEN = "out"
"""The keyword of a tensor that a result is written into: torch refuses it where there are gradients, as in a model's forward."""
_READ = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"})
_STORED = frozenset({"STORE_SUBSCR", "STORE_SLICE", *(name for name in dis.opname if name.startswith("INPLACE_"))})


class _Context:
    """Takes what a forward keeps for a backward that is not run."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(map(is_activation, arguments))

    def save_for_backward(self, *_: Any) -> None:
        """Nothing is kept."""

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


@contextmanager
def opening(mode: TorchFunctionMode, acting: Callable[[], bool]) -> Iterator[None]:
    """Run the forward of custom functions under a mode, where it is on and rules act; of all others nothing changes.

    The class below ``torch.autograd.Function`` has an ``apply`` of its own for the time of the context: it is where every call
    comes by, also by an ``apply`` that was taken from its class before.

    Args:
        mode: sees what the forward does.
        acting: whether rules act.
    """

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if is_open(cls) and acting() and torch.is_grad_enabled() and mode in _modes():
            active = any(map(is_activation, tensors_in((args, kwargs))))
            with saved_tensors_hooks(_copied, _as_kept) if active and writes(cls) else nullcontext():
                result = _run(cls, args, kwargs) if active else None
            if any(map(_goes_on, tensors_in(result))):
                return result
        return before(cls)(*args, **kwargs)

    base: Any = _SingleLevelFunction
    own = vars(base).get("apply")  # of a context around this one

    def before(cls: type[Function]) -> Any:
        above: Any = super(_SingleLevelFunction, cls)
        return above.apply if own is None else own.__get__(None, cls)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        if own is None:
            del base.apply
        else:
            base.apply = own


def _goes_on(value: Any) -> bool:
    """Whether relevance goes through, or a rule has stopped it; else the function's own backward may know a way (past steps)."""
    ending = ending_of(value)
    return is_activation(value) or (ending is not None and ending.cause in ("rule", "registered"))


def _run(cls: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward: Callable[..., Any] = cls.forward
    if cls.setup_context is not Function.setup_context:
        return forward(*args, **kwargs)
    return forward(_Context((*args, *kwargs.values())), *args, **kwargs)


def _copied(saved: Tensor) -> Tensor:
    return saved.clone()


def _as_kept(saved: Tensor) -> Tensor:
    return saved


@cache
def writes(cls: type[Function]) -> bool:
    """Whether the forward of a custom function changes tensors in place.

    Without gradients, as it is meant to run, it may write where a backward pass of its operations would read. Their backward
    then gets copies.

    Example:
        >>> class Masked(Function):
        ...     @staticmethod
        ...     def forward(ctx, x, mask):
        ...         return torch.softmax(x, -1).masked_fill_(mask, 0.0)
        >>> writes(Masked)
        True
    """
    code = cls.forward.__code__
    entries = list(dis.get_instructions(code))
    return "inplace" in _keywords(code) or any(
        entry.opname in _STORED
        or (entry.opname == "BINARY_OP" and entry.argrepr.endswith("="))
        or (isinstance(entry.argval, str) and entry.argval.endswith("_") and not entry.argval.endswith("__"))
        for entry in entries
    )


def _keywords(code: CodeType) -> set[object]:
    """Names by which arguments are given: constants of the code in every version of Python."""
    return {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}


@cache
def is_open(cls: type[Function]) -> bool:
    """Whether the forward of a custom function is made of torch's functions, numbers and builtins alone.

    Example:
        >>> class Cube(Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return torch.pow(x, 3)
        >>> Cube.__module__ = "my_model"  # where it would stand
        >>> is_open(Cube)
        True
    """
    forward = getattr(cls.__dict__.get("forward"), "__func__", None)
    code = getattr(forward, "__code__", None)
    if forward is None or code is None or cls.__module__.partition(".")[0] in ("torch", "lrp_prune"):
        return False
    if _CLOSED & set(code.co_names) or any(hasattr(constant, "co_code") for constant in code.co_consts):
        return False
    if _RESULT_GIVEN in _keywords(code):
        return False
    namespace = forward.__globals__
    read = {entry.argval for entry in dis.get_instructions(code) if entry.opname in _READ}
    return not code.co_freevars and all(
        _is_harmless(namespace.get(name, getattr(builtins, name, None))) for name in read
    )


def _is_harmless(value: Any) -> bool:
    if isinstance(value, int | float | str | torch.dtype):
        return True
    if isinstance(value, ModuleType):
        return value in (torch, math, torch.nn, torch.nn.functional)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        module = str(getattr(value, "__module__", ""))
        return module in ("builtins", "torch", "math") or module.startswith("torch.nn")
    return type(value).__module__ == "builtins" and callable(value)
