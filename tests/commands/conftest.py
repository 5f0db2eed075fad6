"""A run that nothing disturbed, clients that misbehave in one, and a cache for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedflame.base.mapped import CACHE_VARIABLE
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.training.fine_tune import fine_tune

Misbehave = Callable[[RoundPlan, ClientUpdate], ClientUpdate]


@pytest.fixture
def finished(undisturbed: Callable[..., Path]) -> Path:
    """A run that nothing disturbed."""
    return undisturbed()


@pytest.fixture
def misbehave(monkeypatch: pytest.MonkeyPatch) -> Callable[[Misbehave], None]:
    """Let clients' updates pass through a function before they are sent."""

    def install(change: Misbehave) -> None:
        def changed(adapted, examples, plan, *more):  # type: ignore[no-untyped-def]
            return change(plan, fine_tune(adapted, examples, plan, *more))

        monkeypatch.setattr("fedflame.clients.local.fine_tune", changed)

    return install


@pytest.fixture(scope="module")
def compare_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of mapped bases for one module; the processes of cells take it over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield
