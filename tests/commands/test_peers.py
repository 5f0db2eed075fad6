"""What the checks of a site and of the hub say of keys, and what a file must not say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.tiny_runs import invoke

from fedflame.commands.peers import keys_of_hub, keys_of_site
from fedflame.engines.hub import Hub, load_hub
from fedflame.errors import UserError
from fedflame.privacy.identity import IDENTITY_FILE, fingerprint, identity, public, run_key
from fedflame.trainer.site import Site, load_site

OTHERS = {"east": "0" * 64, "west": "ab" * 32}


def a_site(tmp_path: Path, peers: dict[str, str], more: str = "") -> Site:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    path = tmp_path / "site.toml"
    lines = "".join(f'{name} = "{key}"\n' for name, key in peers.items())
    path.write_text(
        'name = "north"\n[data]\ndataset_name = "rows.jsonl"\n[trainer]\nactive_experts = 2\n'
        f"{more}[peers]\n{lines}"
    )
    return load_site(path)


def test_a_site_shows_its_key_and_the_fingerprints_of_its_peers(tmp_path: Path) -> None:
    site = a_site(tmp_path, OTHERS)
    own, east, west, enough = keys_of_site(site)
    key = public(identity(tmp_path / "state"))
    assert key in own.what and fingerprint(key) in own.what
    assert (tmp_path / "state" / IDENTITY_FILE).stat().st_mode & 0o777 == 0o600
    digits = hashlib.sha256(bytes(32)).hexdigest()
    assert east.what == f"peer east has fingerprint {digits[:4]} {digits[4:8]} {digits[8:12]} {digits[12:16]}"
    assert own.good and east.good and west.good and enough.good and enough.what.startswith("2 peers")
    assert next(iter(keys_of_site(site))).what == own.what, "a key stays"


def test_too_few_peers_and_the_own_key_among_them_are_bad(tmp_path: Path) -> None:
    site = a_site(tmp_path, OTHERS, "[privacy]\nmin_peers = 3\n")
    assert [finding.good for finding in keys_of_site(site)] == [True, True, True, False]
    own = public(identity(site.state_path))
    assert [finding.good for finding in keys_of_site(a_site(tmp_path, {**OTHERS, "east": own}))][1] is False
    (only,) = keys_of_site(a_site(tmp_path, {}))
    assert only.good


def test_peers_that_are_asked_for_and_not_named_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"privacy\.min_peers is set without \[peers\], so that no update is "
    ):
        a_site(tmp_path, {}, "[privacy]\nmin_peers = 2\n")


def test_the_hub_shows_fingerprints_and_who_has_none() -> None:
    assert not list(keys_of_hub(Hub(sites=("east", "west"))))
    found = list(keys_of_hub(Hub(sites=("east", "north"), peers=OTHERS)))
    assert [finding.good for finding in found] == [True, False, False]
    assert [finding.what.split(":")[0] for finding in found] == [
        "key of east",
        "key of north",
        "key of west",
    ]


@pytest.mark.parametrize("key", ["", "0" * 63, "g" * 64, "0" * 66, "AB" * 32])
def test_a_key_that_is_none_is_refused_with_its_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"site\.toml.*peers.*64 hexadecimal digits.*east has"):
        a_site(tmp_path, {"east": key})
    (tmp_path / "hub.toml").write_text(f'sites = ["east"]\n[peers]\neast = "{key}"\n')
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        load_hub(tmp_path / "hub.toml")


def test_the_check_of_a_site_begins_with_its_key(tmp_path: Path) -> None:
    a_site(tmp_path, OTHERS)
    shown = invoke("site", "check", tmp_path / "site.toml").stdout
    assert f"this site's key is {public(identity(tmp_path / 'state'))}" in shown


def test_each_run_has_a_key_of_its_own_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    first, second = (run_key(tmp_path, run * 16) for run in ("ab", "cd"))
    assert public(first) != public(second) and public(run_key(tmp_path, "ab" * 16)) == public(first)
    path = tmp_path / IDENTITY_FILE
    path.write_bytes(b"short")
    with pytest.raises(UserError, match=r"identity\.key: has 5 bytes; a secret has 32"):
        identity(tmp_path)
