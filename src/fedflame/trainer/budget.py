"""What private rounds have spent at a site, and what its file leaves them. It needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.trainer.ledger import Round
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site, SitePrivacy


def require_within_budget(
    rounds: Sequence[Round], begun: Round, run_steps: int, units: int, privacy: SitePrivacy
) -> None:
    """Raise Refusal if a run would spend more than the site's file allows, with what was spent before.

    Args:
        rounds: all that the site has trained.
        begun: the round that is to begin.
        run_steps: the private steps that the whole run asks for, by its plan.
        units: rows or persons of the site.
        privacy: of the site's file.
    """
    if not privacy.max_epsilon:
        return
    if problem := problem_of_delta(privacy, units):
        raise Refusal(problem)
    before = list(spendings(rounds, begun.data))
    own = sum(known.steps for known in rounds if (known.run, known.data) == (begun.run, begun.data))
    still = max(begun.steps, run_steps - own)
    whole = Spending(begun.sampling_rate, begun.noise_multiplier, still)
    if (epsilon := epsilon_of([*before, whole], privacy.delta)) > privacy.max_epsilon:
        spent = epsilon_of(before, privacy.delta)
        raise Refusal(
            f"with this run the rows here would have spent epsilon = {epsilon:.3g} (delta = "
            f"{privacy.delta:g}), {spent:.3g} of it before; this site allows at most {privacy.max_epsilon:g} "
            "(privacy.max_epsilon)"
        )


def problem_of_delta(privacy: SitePrivacy, units: int) -> str:
    """Return what speaks against the delta of a limit for so many rows, or persons; empty if nothing does."""
    if privacy.max_epsilon and privacy.delta >= 1 / max(units, 1):
        return f"privacy.delta = {privacy.delta:g} is no smaller than one over {units:,} rows or persons here"
    return ""


def spendings(rounds: Sequence[Round], data: str) -> Iterator[Spending]:
    """Yield what the private rounds on a data set have spent."""
    for known in rounds:
        if known.data == data and known.steps:
            yield Spending(known.sampling_rate, known.noise_multiplier, known.steps)


def spent_in_words(rounds: Sequence[Round], data: str, privacy: SitePrivacy) -> str:
    """Return the epsilon that was spent on a data set, and what the site's file allows.

    Raises:
        UserError: the package that computes epsilon is not installed.
    """
    epsilon = epsilon_of(spendings(rounds, data), privacy.delta)
    most = f" of {privacy.max_epsilon:g}" if privacy.max_epsilon else ""
    limit = "" if privacy.max_epsilon else "; the site sets no limit (privacy.max_epsilon)"
    return f"epsilon = {epsilon:.3g}{most} spent (delta = {privacy.delta:g}){limit}"


def speaks_of_privacy(site: Site, rounds: Sequence[Round]) -> bool:
    """Return whether the site's file asks for privacy, or a private round was trained."""
    return site.privacy.only_private or any(known.steps for known in rounds)
