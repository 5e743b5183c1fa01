"""Taking units out: what can go is tried, and stays out if the outputs are right."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrp_prune.models.profile import profile_of
from lrp_prune.names import named_parameters
from lrp_prune.pruning.kinds import layer_group
from lrp_prune.shrinking.attributes import (
    Site,
    Size,
    attribute_slot,
    integers,
    layer_slots,
    number_slots,
    numbers_to_try,
)
from lrp_prune.shrinking.cuts import Slot, Swap, cuts_of, tensors_cut
from lrp_prune.shrinking.proof import Proof
from lrp_prune.shrinking.removal import Removal, coupled
from lrp_prune.shrinking.sites import site_of_configuration, sites_of

_OF_MANY = 64
"""Ways to set numbers that are tried for several layers at once; where none is right, they are tried apart."""

_DRAWS = (
    "runs of the model differ by themselves, by random numbers that it draws in evaluation as well (a dropout that is always "
    "on), and draws others where it is smaller: let it draw none (F.dropout(..., training=self.training))"
)


class Taking:
    """A model that units are taken out of.

    Args:
        module: the model under its masks.
        removal: what could go; what turns out to break the outputs is taken back from it.
        places: the modules that hold each parameter, by its canonical name.
        proof: of the masked model.
        modules: of the model, by canonical name.
        uniform: whether layers of a kind go together.
    """

    def __init__(
        self,
        module: nn.Module,
        removal: Removal,
        places: Mapping[str, Sequence[tuple[nn.Module, str]]],
        proof: Proof,
        modules: Mapping[str, nn.Module],
        uniform: bool,
    ) -> None:
        self._module, self.removal, self._places, self._proof = module, removal, places, proof
        self._modules, self._uniform = modules, uniform
        self._shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(module).items()}
        inner = profile_of(module).inner
        self._config = getattr(inner, "config", None)
        self._accepted: list[list[int]] = []
        self._numbers: dict[Any, str] = {}
        self._draws: bool | None = None
        """Whether runs of the model differ by random numbers; None where nobody had to ask."""
        self.swaps: list[Swap] = []
        """What was swapped, once it is finished."""

    def take(self) -> None:
        """Find out what can go; the model is as before."""
        parts = self._parts()
        if not parts or self._attempt(parts, 1) is None:
            return
        kinds: dict[Any, list[list[int]]] = {}
        for part in parts:
            kinds.setdefault(self._signature(part), []).append(part)
        for several in kinds.values():
            self._take(several)

    def _parts(self) -> list[list[int]]:
        parts = coupled(self.removal)
        if not self._uniform:
            return parts
        kinds: dict[Any, list[int]] = {}
        for part in parts:
            groups = [self.removal.groups[index] for index in part]
            kinds.setdefault(frozenset((each.kind, layer_group(each.name)) for each in groups), []).extend(part)
        return [sorted(part) for part in kinds.values()]

    def _signature(self, part: Sequence[int]) -> Any:
        kinds = frozenset(self.removal.groups[index].kind for index in part)
        return kinds, frozenset(site.key("") for site in self._sites(part, self.removal.only(part)))

    def _sites(self, part: Sequence[int], removal: Removal) -> list[Site]:
        return sites_of(removal, part, cuts_of(removal, self._shapes), self._modules, self._shapes)

    def _take(self, parts: list[list[int]]) -> None:
        """Take these out together, or else some of them."""
        why = self._attempt(parts, _OF_MANY if len(parts) > 1 else None)
        if why is None:
            return
        if len(parts) == 1:
            for index in parts[0]:
                self.removal.keep(index, self.removal.gone[index].clone(), why)
            return
        half = len(parts) // 2
        self._take(parts[:half])
        self._take(parts[half:])

    def _attempt(self, parts: Sequence[list[int]], ways: int | None) -> str | None:
        """Take parts out for a moment; None if the outputs are right then, else what went wrong at the first try."""
        everything = [*self._accepted, *parts]
        tensors, sites = self._swap(everything)
        reason = None
        tensors.put()
        try:
            for tried, numbers in enumerate(numbers_to_try(sites)):
                if ways is not None and tried >= ways:
                    break
                numbers = {**numbers, **self._numbers}
                wrong = self._wrong(number_slots(sites, numbers))
                if wrong is None:
                    self._accepted, self._numbers = everything, dict(numbers)
                    return None
                reason = reason or wrong
        finally:
            tensors.back()
        return reason

    def _wrong(self, slots: Iterable[Slot]) -> str | None:
        """What is wrong with the outputs with these numbers."""
        swap = Swap(slots)
        swap.put()
        try:
            difference = self._proof.difference(self._module, batches=1)
            if difference > self._proof.tolerance and self._draws is None:
                self._draws = self._proof.draws(self._module)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            return f"the model does not run without them ({type(error).__name__}: {first[0][:160]})"
        finally:
            swap.back()
        if difference <= self._proof.tolerance:
            return None
        others = f"the outputs would be others without them (by {difference:.2g} of the largest)"
        return f"{others}: {_DRAWS}" if self._draws else others

    def _swap(self, parts: Sequence[list[int]]) -> tuple[Swap, list[Site]]:
        """The tensors and the numbers of torch's layers without the units of some parts, and where other numbers may change."""
        removal = self.removal.only(index for part in parts for index in part)
        cuts = cuts_of(removal, self._shapes)
        swap = tensors_cut(self._module, cuts, self._places)
        for name, cut in cuts.items():
            for owner, own in self._places[name]:
                after = next(slot.after for slot in swap.slots if slot.before is owner._parameters[own])
                swap.slots.extend(layer_slots(owner, cut, after) if own == "weight" else [])
        found: dict[str, Site] = {}
        for part in parts:
            for site in sites_of(removal, part, cuts, self._modules, self._shapes):
                known = found.get(site.name)
                if known is not None:
                    sizes = {size.of: size for size in (*known.sizes, *site.sizes)}
                    site = site._replace(sizes=list(sizes.values()), others=known.others | site.others)
                found[site.name] = site
        sites = list(found.values())
        whole = site_of_configuration(self._config, sites)
        return swap, [*sites, whole] if whole is not None else sites

    def finish(self, undo: list[Callable[[], None]]) -> float:
        """Take out what was found, and compare all outputs.

        Args:
            undo: gets what puts everything back.

        Returns:
            How far outputs are apart at most, as a share of the largest.

        Raises:
            RuntimeError: if they are not the same.
        """
        tensors, sites = self._swap(self._accepted)
        self.swaps = [tensors, Swap(number_slots(sites, self._numbers))]
        for swap in self.swaps:
            undo.append(swap.back)
            swap.put()
        return self._proof.check(self._module, "with all that goes taken out")

    def settle(self, made: nn.Module, undo: list[Callable[[], None]]) -> None:
        """Give modules the numbers that they have in a model of the new sizes, where outputs have not told which are right.

        Args:
            made: that model; its modules are called as those of the Hugging Face model.
            undo: gets what puts everything back.
        """
        inner = profile_of(self._module).inner
        assert inner is not None
        there = dict(made.named_modules())
        names = {id(module): name for name, module in inner.named_modules()}
        slots = []
        for module in {
            id(site.module): site.module for part in self._accepted for site in self._all_sites(part)
        }.values():
            other = there.get(names.get(id(module), ""))
            if other is not None and type(other) is type(module):
                wanted = dict(integers(other))
                slots += [
                    attribute_slot(module, name, wanted[name])
                    for name, value in integers(module)
                    if wanted.get(name, value) != value
                ]
        self.swaps.append(Swap(slots))
        undo.append(self.swaps[-1].back)
        self.swaps[-1].put()

    def sizes(self) -> list[Size]:
        """All sizes that have changed."""
        return list({size: None for part in self._accepted for site in self._all_sites(part) for size in site.sizes})

    def _all_sites(self, part: Sequence[int]) -> list[Site]:
        removal = self.removal.only(index for each in self._accepted for index in each)
        return sites_of(removal, part, cuts_of(removal, self._shapes), self._modules, self._shapes, known=True)

    def numbers(self) -> dict[str, int]:
        """The numbers of modules that were set, by their names, those of torch's layers among them."""
        names = {id(module): name for name, module in self._modules.items()}
        if self._config is not None:
            inner = names[id(profile_of(self._module).inner)]
            names[id(self._config)] = f"{inner}.config".lstrip(".")
        found = {}
        for swap in self.swaps:
            for slot in swap.slots:
                if slot.of is not None:
                    module, attribute = slot.of
                    found[f"{names[id(module)]}.{attribute}".lstrip(".")] = slot.after
        return found
