"""Which axes of a weight lie along what a product sums over, and along what it makes."""

from lrp_prune.engine.call import Call

_MATRICES = frozenset("mm bmm matmul addmm addbmm baddbmm _grouped_mm grouped_mm".split())


def axes_of(call: Call, activation: int, weight: int) -> tuple[int, int] | None:
    """Axes of a weight in a product: ``(outputs, inputs)``; None where it has not one of each, or nothing tells.

    A further axis, which the activation and the output have as well, is that of a stack (heads, experts).

    Args:
        call: of a product.
        activation: index of the activation among the operands.
        weight: index of the weight.
    """
    name, dims = call.function.__name__, call.operand(weight).dim()
    if name == "einsum" and isinstance(call.args[0], str):
        return _of_equation(call.args[0], activation, weight)
    if name not in _MATRICES or dims < 2 or {activation, weight} != {0, 1}:
        return None
    return (dims - 2, dims - 1) if weight == 0 else (dims - 1, dims - 2)


def shared_axes(call: Call, activation: int, weight: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of an activation and of a weight that are the same, as those of the heads that an einsum reads.

    Args:
        call: of a product.
        activation: index of the activation among the operands.
        weight: index of the weight.

    Returns:
        Those of the activation, which may be counted from its last, and those of the weight; None where nothing tells.
    """
    if call.function.__name__ == "tensordot":
        dims = tuple(call.args[2]), tuple(call.args[3])  # as torch's own function calls the one that computes it
        return (dims[activation], dims[weight]) if dims[0] else None
    if call.function.__name__ != "einsum" or not isinstance(call.args[0], str):
        return None
    operands = call.args[0].replace(" ", "").partition("->")[0].split(",")
    if len(operands) != 2 or "." in operands[weight]:
        return None
    read, ours = operands[activation].rpartition(".")[2], operands[weight]
    shared = [letter for letter in ours if letter in read]
    if not shared or len(set(read)) < len(read) or len(set(ours)) < len(ours):
        return None
    return tuple(read.index(letter) - len(read) for letter in shared), tuple(map(ours.index, shared))


def _of_equation(equation: str, activation: int, weight: int) -> tuple[int, int] | None:
    """The same of an einsum.

    Example:
        >>> _of_equation("b s i, i o -> b s o", 0, 1), _of_equation("oi,bi", 1, 0), _of_equation("bi,iho->bho", 0, 1)
        ((1, 0), (0, 1), None)
    """
    left, arrow, made = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != 2 or "." in operands[weight]:
        return None
    ours, other = operands[weight], operands[activation]
    if not arrow:
        made = "".join(letter for letter in ours + other if (ours + other).count(letter) == 1)
    inputs = [axis for axis, letter in enumerate(ours) if letter in other and letter not in made]
    outputs = [axis for axis, letter in enumerate(ours) if letter in made and letter not in other]
    if len(outputs) == 2 and len(ours) == 3 and outputs[0] == 0:  # heads that read the same: a stack
        outputs = outputs[1:]
    if len(inputs) != 1 or len(outputs) != 1 or len(set(ours)) != len(ours):
        return None
    return outputs[0], inputs[0]
