"""The rows of a site: those to train on, and those that the hub may have scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedflame.data.client_tests import split_test
from fedflame.data.conversations import Conversation
from fedflame.data.rows import SkippedRow, load_rows
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site

_SEED = 0
"""Of the rows to score: the same in all runs, or one run would train on what another has scored."""


@dataclass(frozen=True)
class SiteRows:
    """Usable rows in their order, and those that were skipped."""

    training: list[Conversation]
    tests: list[Conversation]
    skipped: list[SkippedRow]
    columns: str
    """Which columns were read as what, in words."""


def load_site_rows(site: Site) -> SiteRows:
    """Read the rows that the site's file names. Raises UserError as `load_rows` does."""
    loaded = load_rows(dataset_name=site.dataset, **site.columns)
    if site.test_dataset:
        columns = site.columns | {"split": site.data.test_split, "person_field": ""}
        tests = load_rows(dataset_name=site.test_dataset, **columns)
        return SiteRows(loaded.rows, tests.rows, [*loaded.skipped, *tests.skipped], loaded.columns)
    trained, scored = list(range(len(loaded.rows))), list[int]()
    if site.data.test_size:
        trained, scored = split_test(loaded.rows, site.data.test_size, _SEED)
    return SiteRows(
        [loaded.rows[index] for index in trained],
        [loaded.rows[index] for index in scored],
        loaded.skipped,
        loaded.columns,
    )


def units_of(rows: Sequence[Conversation]) -> list[list[int]]:
    """Return the numbers of the rows that are protected together: those of a person, or each by itself."""
    units: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        units.setdefault(row.owner or f"\0{number}", []).append(number)
    return list(units.values())


def require_tests(rows: int, site: Site) -> None:
    """Raise Refusal if the site scores nothing for the hub: by its file, or with so few rows to score."""
    limits = site.limits
    if site.privacy.only_private:
        raise Refusal("this site's file asks for privacy of rows, and scores have no noise")
    if limits.disclosure == "withheld":
        raise Refusal("this site withholds what its rows tell (limits.disclosure)")
    if not rows:
        raise Refusal("this site holds no rows to score (data.test_dataset_name, data.test_size)")
    if rows < (least := limits.min_rows_per_update):
        raise Refusal(f"the score would be of {rows:,} rows; this site asks for at least {least:,}")
