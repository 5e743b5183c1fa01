"""Options that several examples have, said in one place."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from language_model import PACKAGED_MODEL
from torch import nn

from lrp_prune.correction import Learned


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is an example's first paragraph, with all defaults."""
    return argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_model(given: argparse.ArgumentParser) -> None:
    """Which model."""
    given.add_argument(
        "--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder"
    )


def add_patch(given: argparse.ArgumentParser) -> None:
    """A patch's file, the model that it is of, and at which strength."""
    given.add_argument("patch", type=Path, help="the file that a correction wrote")
    add_model(given)
    given.add_argument(
        "--strength",
        type=float,
        default=None,
        help="0 for as before, 1 for removed; as the patch was made if not given",
    )


def add_search(given: argparse.ArgumentParser, amounts: Sequence[float], strengths: Sequence[float]) -> None:
    """What a search for a patch tries."""
    add = given.add_argument
    add("--amounts", nargs="*", type=float, default=list(amounts), help="fractions of the weights to try")
    add("--strengths", nargs="*", type=float, default=list(strengths), help="by how much they are weakened, each tried")
    add("--guard", type=float, default=0.7, help="fraction of the weights that may be chosen at all")


EVERYWHERE = "everywhere"


def add_condition(given: argparse.ArgumentParser, at: str = EVERYWHERE, holding: float = 0.02) -> None:
    """Where a patch acts."""
    add = given.add_argument
    what = f"a module such as model.layers.8: act only where its output shows the behaviour; or {EVERYWHERE!r}"
    add("--at", default=at, help=what)
    add(
        "--holding",
        nargs="*",
        default=[f"*={holding}"],
        help="largest share of each kind of text at which --at may hold",
    )
    add("--shrinkage", type=float, default=0.02, help="of the covariance that the direction of --at is found with")


def condition(options: argparse.Namespace) -> Learned | None:
    """What the options above say, None for everywhere."""
    return None if options.at == EVERYWHERE else Learned(options.at, limits(options.holding), options.shrinkage)


def check_place(options: argparse.Namespace, model: nn.Module) -> None:
    """Refuse now a module for a condition that the model does not have."""
    if options.at != EVERYWHERE and options.at not in dict(model.named_modules()):
        raise SystemExit(f"--at {options.at}: the model has no such module; give one of its layers, or {EVERYWHERE!r}")


def add_suite(given: argparse.ArgumentParser, windows: int, length: int, samples: int, allowed: Sequence[str]) -> None:
    """What is measured besides, how much of it, and how much worse it may become."""
    add = given.add_argument
    add("--windows", type=int, default=windows, help="windows of each kind of text")
    add("--length", type=int, default=length, help="tokens in a window")
    add("--samples", type=int, default=samples, help="facts and prompts; half as many copied sequences")
    add("--allowed", nargs="*", default=list(allowed), help="the largest change, as in '*=0.02 copying=0.35'")
    add("--random", type=int, default=3, help="random patches, of as many weights of each parameter")
    add("--seed", type=int, default=0, help="of all that is chosen")


def limits(given: Sequence[str]) -> dict[str, float]:
    """Limits by name from texts such as `copying=0.05`."""
    return {name: float(limit) for name, _, limit in (text.rpartition("=") for text in given)}
