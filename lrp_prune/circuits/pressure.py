"""What makes gates close: penalties for each kind of unit, or densities that are to be reached."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrp_prune.circuits.ablation import effective
from lrp_prune.circuits.hard_concrete import probability_open
from lrp_prune.circuits.sites import Site


def by_kind(given: float | Mapping[str, float] | None, kinds: Sequence[str], what: str) -> dict[str, float]:
    """One value for each kind, from one value for all or from a mapping.

    Raises:
        ValueError: for a kind that is not trained.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(kinds, float(given))
    for kind in given:
        if kind not in kinds:
            raise ValueError(f"{what} names {kind!r}, but the trained granularities are {tuple(kinds)}")
    return {kind: float(value) for kind, value in given.items()}


class Pressure(nn.Module):
    r"""The second term of the loss.

    The density :math:`d_g` of a kind is the mean probability that its units are open, each times that of the head and block
    that contain it; those factors are constants, so that the fate of many neurons does not turn on one block's gate (a
    density then moves in steps of whole blocks, and oscillates). Penalties give :math:`\sum_g \lambda_g d_g`; targets
    :math:`t_g` the augmented Lagrangian

    .. math:: \sum_g \mu_g e_g + \tfrac{\kappa}{2} \max(0, e_g)^2, \quad e_g = d_g / t_g - 1,

    whose multipliers change by :math:`\eta e_g` a step and are never negative. The excess is relative, so that a target of
    1 % is kept to as strictly as one of 50 %.

    Args:
        sites: the units.
        penalties: kind -> :math:`\lambda_g`.
        densities: kind -> :math:`t_g`; during the warm-up it falls geometrically from the density at the start.
        curvature: :math:`\kappa`.
        rate: :math:`\eta`.
    """

    multipliers: Tensor
    start: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        penalties: Mapping[str, float],
        densities: Mapping[str, float],
        curvature: float = 5.0,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self._sites, self._penalties, self._densities = tuple(sites), dict(penalties), dict(densities)
        self._curvature, self._rate = curvature, rate
        for kind, penalty in self._penalties.items():
            if not penalty >= 0:
                raise ValueError(f"penalties must be 0 or more, got {penalty} for {kind}")
        for kind, density in self._densities.items():
            if not 0 < density <= 1:
                raise ValueError(f"density must be in (0, 1], got {density} for {kind}")
        self.register_buffer("multipliers", torch.zeros(len(self._densities), device="cpu"))
        self.register_buffer("start", torch.ones(len(self._densities), device="cpu"))

    @torch.no_grad()
    def begin(self, log_alpha: Mapping[str, Tensor]) -> None:
        """Note the densities that the targets fall from."""
        densities = self.densities(log_alpha)
        for index, (kind, goal) in enumerate(self._densities.items()):
            self.start[index] = max(float(densities[kind]), goal)

    def densities(self, log_alpha: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kind -> density, a scalar."""
        opened = effective(
            self._sites, {name: probability_open(value) for name, value in log_alpha.items()}, detach=True
        )
        result: dict[str, Tensor] = {}
        for kind in dict.fromkeys(site.kind for site in self._sites):
            result[kind] = torch.cat([opened[site.name] for site in self._sites if site.kind == kind]).mean()
        return result

    def forward(self, log_alpha: Mapping[str, Tensor], progress: float) -> Tensor:
        """The term, with the warm-up's progress in [0, 1].

        Args:
            log_alpha: name of a site -> ``[units]``.
            progress: the share of the warm-up that is over.
        """
        densities = self.densities(log_alpha)
        total = torch.zeros((), device=next(iter(log_alpha.values())).device)
        for kind, penalty in self._penalties.items():
            total = total + penalty * densities[kind]
        excess = self._excess(densities, progress)
        if excess is not None:
            above = excess.clamp(min=0)
            total = total + (self.multipliers * excess).sum() + self._curvature / 2 * above.square().sum()
        return total

    @torch.no_grad()
    def step(self, log_alpha: Mapping[str, Tensor], progress: float) -> None:
        """Move the multipliers, once for each optimizer step."""
        excess = self._excess(self.densities(log_alpha), progress)
        if excess is not None:
            self.multipliers.add_(self._rate * excess).clamp_(min=0)

    def _excess(self, densities: Mapping[str, Tensor], progress: float) -> Tensor | None:
        if not self._densities:
            return None
        share = min(max(progress, 0.0), 1.0)
        goals = [
            float(start) * (goal / float(start)) ** share
            for start, goal in zip(self.start.tolist(), self._densities.values(), strict=True)
        ]
        return torch.stack([densities[kind] / goal - 1 for kind, goal in zip(self._densities, goals, strict=True)])
