"""Whether parameters have values where they are looked at."""

from collections.abc import Mapping

from torch import Tensor


def check_loaded(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters without values: those of an offloaded model come to their device for each forward, and go again.

    Raises:
        ValueError: if one is on the meta device.
    """
    absent = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"{absent} is on the meta device and holds no values yet: load the weights first (without a device_map that "
            "offloads some of them to the CPU or to disk)"
        )
