"""Certificates of a hub and its members over time, made by nvflare's own provisioning; without a server."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.folder_contents import contents
from tests.tiny_runs import invoke

from fedflame.engines.nvflare import membership as membership_module
from fedflame.engines.nvflare.certificate import read_certificate
from fedflame.engines.nvflare.membership import read_membership, revoke_offline
from fedflame.engines.nvflare.provision import AUTHORITY_DAYS
from fedflame.engines.nvflare.revoked import revoked_names, revoked_path
from fedflame.errors import UserError

pytest.importorskip("nvflare")
ADMIN = "someone@hub.example"
OPTIONS = ("--host", "localhost", "--port", "9", "--admin", ADMIN)
"""Nothing listens at port 9."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "hub"
    told = invoke("hub", "init", folder, "--sites", "site-1,site-2", *OPTIONS)
    assert told.exit_code == 0, told.output
    return folder


@pytest.fixture
def hub(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "hub")


@pytest.mark.slow
def test_the_authority_lasts_ten_years_and_its_members_one(hub: Path) -> None:
    found = read_membership(hub)
    assert {member.name: member.role for member in found.members} == {
        "localhost": "hub", "site-1": "site", "site-2": "site", ADMIN: "administrator",
    }  # fmt: skip
    today = datetime.now(UTC)
    assert found.authority.days_left(today) == pytest.approx(AUTHORITY_DAYS, abs=1)
    assert [member.certificate.days_left(today) for member in found.members] == pytest.approx(
        [360] * 4, abs=1
    )
    assert (found.port, found.server_kit) == (9, hub / "kits" / "localhost")


@pytest.mark.slow
def test_a_renewal_is_of_those_that_are_named_by_the_same_authority(hub: Path) -> None:
    before = contents(hub / "kits")
    shutil.rmtree(hub / "kits" / "site-2")  # it was sent away
    told = invoke("hub", "renew", hub / "hub.toml", "site-2", "localhost")
    assert told.exit_code == 0, told.output
    assert f"{hub}/kits/site-2/startup" in told.output and "Start the server again" in told.output
    after = contents(hub / "kits")
    assert after.keys() == before.keys(), "also the narrowed rights of the kit that was not there"
    changed = {name for name in after if after[name] != before[name]}
    assert {name.split("/")[0] for name in changed} == {"site-2", "localhost"}
    assert {"site-2/startup/client.crt", "site-2/startup/client.key"} <= changed
    assert {"localhost/startup/server.crt", "localhost/startup/server.key"} <= changed
    assert not any(name.endswith("rootCA.pem") for name in changed)
    for kit in ("site-2", "localhost", "site-1"):
        assert read_certificate(hub / "kits" / kit).name == kit
    later = invoke("hub", "init", hub, "--sites", "site-3", *OPTIONS)
    assert later.exit_code == 0, later.output
    assert {name: content for name, content in contents(hub / "kits").items() if name in after} == after


@pytest.mark.slow
def test_without_a_name_those_are_renewed_whose_certificates_end_soon(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = invoke("hub", "renew", hub / "hub.toml")
    assert "no certificate ends within 90 days" in told.output and told.exit_code == 0
    invoke("hub", "renew", hub / "hub.toml", "site-1")
    revoke_offline(hub / "kits" / "localhost", "site-2")
    first = min(member.certificate.ends for member in read_membership(hub).members)
    monkeypatch.setattr("fedflame.commands.membership.now", lambda: first - timedelta(days=80))
    renewed: list[str] = []
    monkeypatch.setattr(
        "fedflame.commands.membership.renew", lambda command, found, names: renewed.extend(names) or []
    )
    assert invoke("hub", "renew", hub / "hub.toml").exit_code == 0
    assert set(renewed) == {"localhost", ADMIN, "site-1"}, "all but the one that was revoked"


def test_a_renewal_that_fails_leaves_everything_as_it_was(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Path:
        raise UserError("nvflare provision: no")

    monkeypatch.setattr(membership_module, "make_kits", fails)
    before = contents(hub)
    told = invoke("hub", "renew", hub / "hub.toml", "site-1")
    assert (told.exit_code, told.output) == (2, "fedflame: nvflare provision: no\n")
    assert contents(hub) == before


@pytest.mark.slow
def test_a_hub_whose_authority_is_older_takes_sites_and_says_when_it_ends(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Authorities lasted 360 days, and nvflare refuses another number for one that is there."""
    shutil.rmtree(hub)
    monkeypatch.setattr("fedflame.engines.nvflare.provision.AUTHORITY_DAYS", 360)
    assert invoke("hub", "init", hub, "--sites", "site-1", *OPTIONS).exit_code == 0
    monkeypatch.undo()
    told = invoke("hub", "init", hub, "--sites", "site-2", *OPTIONS)
    assert told.exit_code == 0, told.output
    soon = datetime.now(UTC) + timedelta(days=340)
    monkeypatch.setattr("fedflame.commands.membership.now", lambda: soon)
    told = invoke("hub", "renew", hub / "hub.toml", "site-1")
    assert told.exit_code == 2 and "the authority itself ends in 20 days, on 20" in told.output
    told = invoke("hub", "check", hub / "hub.toml")
    assert "BAD  the authority ends in 20 days, on 20" in told.output
    assert "BAD  certificate of site-2 ends in 20 days, on 20" in told.output


def test_a_site_that_is_revoked_while_the_server_is_down_is_on_the_list_that_it_reads(hub: Path) -> None:
    before = contents(hub)
    told = invoke("hub", "revoke", hub / "hub.toml", "site-2")
    assert told.exit_code == 0, told.output
    assert told.output.startswith("site-2 is revoked: ") and "`sites`" in told.output
    after = contents(hub)
    assert {name for name in after if after[name] != before.get(name)} == {
        "kits/localhost/disabled_clients.json"
    }
    from nvflare.private.fed.server.client_manager import ClientManager

    manager = ClientManager(project_name="fedflame")
    manager.set_disabled_clients_file(str(hub / "kits" / "localhost" / "disabled_clients.json"))
    assert manager.is_client_disabled("site-2") and not manager.is_client_disabled("site-1")
    invoke("hub", "revoke", hub / "hub.toml", "site-1")
    assert revoked_names(hub / "kits" / "localhost") == {"site-1", "site-2"}
    assert (
        "BAD  site-2 was revoked; take it out of `sites`" in invoke("hub", "check", hub / "hub.toml").output
    )


@pytest.mark.parametrize(
    "command", [("init", "HUB", "--sites", "site-3,site-2", *OPTIONS), ("renew", "HUB/hub.toml", "site-2")]
)
def test_a_name_that_was_revoked_gets_no_certificate_again(command: tuple[str, ...], hub: Path) -> None:
    revoke_offline(hub / "kits" / "localhost", "site-2")
    before = contents(hub)
    told = invoke("hub", *(word.replace("HUB", str(hub)) for word in command))
    assert told.exit_code == 2
    reason = "site-2 was revoked, and its name stays so; give the site another name"
    assert told.output == f"fedflame: {reason}\n"
    assert contents(hub) == before


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("renew", "site-9"), "site-9 has no certificate of this hub; localhost, site-1, site-2, "),
        (("revoke", "site-9"), "site-9 is no site of this hub; site-1, site-2 are"),
        (("revoke", "localhost"), "localhost is no site of this hub; site-1, site-2 are"),
    ],
)
def test_who_is_no_member_is_refused(command: tuple[str, str], reason: str, hub: Path) -> None:
    told = invoke("hub", command[0], hub / "hub.toml", command[1])
    assert told.exit_code == 2 and told.output.startswith(f"fedflame: {reason}")


def test_without_the_authority_or_the_server_nothing_is_done(hub: Path) -> None:
    shutil.rmtree(hub / "provision")
    told = invoke("hub", "renew", hub / "hub.toml", "site-1")
    assert told.exit_code == 2 and "no authority there; call this where `fedflame hub init`" in told.output
    shutil.rmtree(hub / "kits" / "localhost")
    told = invoke("hub", "revoke", hub / "hub.toml", "site-1")
    assert (
        told.exit_code == 2 and "localhost: no kit of a server; call this on the hub's machine" in told.output
    )


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"disabled_clients": "site-1"}', b"[" * 100_000, b"\xff"])
def test_a_list_that_cannot_be_read_admits_nobody(content: bytes, tmp_path: Path) -> None:
    assert revoked_names(tmp_path) == frozenset()
    revoked_path(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match="not the list of names that may not join"):
        revoked_names(tmp_path)


def test_files_of_the_authority_that_are_damaged_are_one_line(hub: Path) -> None:
    path = hub / "provision" / "fedflame" / "state" / "cert.json"
    state = json.loads(path.read_text())
    for damaged in ({}, {"root_cert": "x"}, state | {"site-1": {"cert": 3}}, state | {"site-1": {}}):
        path.write_text(json.dumps(damaged))
        told = invoke("hub", "renew", hub / "hub.toml", "site-1")
        assert told.exit_code == 2 and told.output.count("\n") == 1
        assert "cert.json: not what nvflare keeps there" in told.output
