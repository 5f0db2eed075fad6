"""What `fedflame hub` and `fedflame site` write and say, without a server."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.engines_here import trainers, write_site
from tests.folder_contents import contents
from tests.tiny_runs import invoke

from fedflame.commands.check import check_certificate, check_handshake
from fedflame.engines.nvflare.certificate import read_certificate
from fedflame.trainer.site import SiteFlower, load_site


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def write_kit(kit: Path, days: int, days_of_authority: int) -> None:
    """A certificate for `site-1` and its authority's, which end after so many days."""
    (kit / "startup").mkdir(parents=True)
    begins, signer, own = (
        datetime.now(UTC) - timedelta(days=4),
        *(ec.generate_private_key(ec.SECP256R1()) for _ in "12"),
    )
    for file, name, key, lasts in (
        ("client.crt", "site-1", own, days),
        ("rootCA.pem", "hub", signer, days_of_authority),
    ):
        made = (
            x509.CertificateBuilder(named("hub"), named(name), key.public_key(), x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + timedelta(days=4 + lasts))
            .sign(signer, hashes.SHA256())
        )
        (kit / "startup" / file).write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(
    ("days", "authority", "good", "left"), [(360, 40, True, 40), (360, 20, False, 20), (20, 360, False, 20)]
)
def test_a_certificate_ends_no_later_than_its_authority(
    days: int, authority: int, good: bool, left: int, tmp_path: Path
) -> None:
    write_kit(tmp_path / "kit", days, authority)
    found = check_certificate(tmp_path / "kit", "site-1")
    day = datetime.now(UTC) + timedelta(days=left)
    assert found.good == good
    assert found.what == f"certificate of site-1 ends in {left} days, on {day:%Y-%m-%d}"


def test_a_certificate_that_has_ended_is_said_to_have_ended(tmp_path: Path) -> None:
    write_kit(tmp_path / "kit", -3, 360)
    found = check_certificate(tmp_path / "kit", "site-1")
    day = datetime.now(UTC) - timedelta(days=3)
    assert (found.good, found.what) == (False, f"certificate of site-1 ended on {day:%Y-%m-%d}")
    assert found.advice == "the hub's administrator renews it: fedflame hub renew"


@pytest.mark.parametrize(("days", "good"), [(40, True), (20, False)])
def test_a_server_whose_certificate_is_about_to_end_is_found(days: int, good: bool, tmp_path: Path) -> None:
    key, ends = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC) + timedelta(days=days, hours=1)
    made = (
        x509.CertificateBuilder(named("hub"), named("hub"), key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority, private = tmp_path / "ca.crt", tmp_path / "ca.key"
    authority.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority, private)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                tls.recv(1)

        server = threading.Thread(target=serve)
        server.start()
        port = listener.getsockname()[1]
        found = check_handshake("127.0.0.1", port, "localhost", authority)
        server.join()
    end = f"its certificate ends in {days} days, on {ends:%Y-%m-%d}"
    assert (found.good, found.what) == (good, f"TLS: 127.0.0.1:{port} is localhost, signed by ca.crt; {end}")


@pytest.mark.slow
def test_a_hub_in_a_relative_folder_takes_another_site_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvflare")
    monkeypatch.chdir(tmp_path)
    options = ("--host", "localhost", "--port", "8002", "--admin", "someone@hub.example")
    first = invoke("hub", "init", "hub", "--sites", "site-1", *options)
    assert first.exit_code == 0, first.output
    kits = tmp_path / "hub" / "kits"
    before = contents(kits)
    later = invoke("hub", "init", "hub", "--sites", "site-1,site-2", *options)
    assert f"{tmp_path}/hub/hub.toml stays as it was; add site-2 to its `sites`" in later.output
    assert contents(kits).items() >= before.items()
    authority = (kits / "site-1" / "startup" / "rootCA.pem").read_bytes()
    assert (kits / "site-2" / "startup" / "rootCA.pem").read_bytes() == authority
    assert read_certificate(kits / "site-2").name == "site-2"


def test_a_trainer_that_serves_an_older_file_is_found(tmp_path: Path, tiny_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "add 1 and 2", "response": "3"}\n')
    path = write_site(tmp_path, "north", data, 4, {"m": str(tiny_folder)})
    with trainers([path]):
        assert "ok   trainer of north answers, k = 4\n" in invoke("site", "check", path).output
        path.write_text(path.read_text().replace("active_experts = 4", "active_experts = 2"))
        told = invoke("site", "check", path)
        assert told.exit_code == 1
        assert "BAD  trainer of north answers, k = 4; the file says k = 2; it serves the file" in told.output
        path.write_text(
            path.read_text().replace("active_experts = 2", "active_experts = 4\nmax_active_experts = 8")
        )
        told = invoke("site", "check", path)
        assert "answers, k = 4; the file says k = 4, at most 8 in turn; it serves the file" in told.output
        path.write_text(path.read_text().replace('"north"', '"south"'))
        told = invoke("site", "check", path)
        assert "BAD  the trainer says: this is north; the request is for south; it serves" in told.output


def test_the_check_of_a_site_shows_its_device(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "add 1 and 2", "response": "3"}\n')
    path = write_site(tmp_path, "north", tmp_path / "rows.jsonl", 4, {"m": str(tiny_folder)})
    assert "ok   device cpu (" in invoke("site", "check", path).output
    path.write_text(path.read_text().replace("[trainer]\n", '[trainer]\ndevice = "cuda"\n'))
    told = invoke("site", "check", path).output
    assert "BAD  trainer.device = 'cuda': torch " in told and "rows.jsonl: 1 rows" in told


def test_a_site_over_flower_gets_a_key_a_file_and_services(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    authority, site = tmp_path / "ca.crt", tmp_path / "north"
    authority.write_text("x")
    more = ("--data", "rows.jsonl", "--active-experts", "4", "--allow-model", "m=/models/m")
    asked = ("site", "init", site, "--superlink", "localhost:9", "--name", "north", *more)
    told = invoke(*asked, "--root-certificates", authority)
    assert told.exit_code == 0, told.output
    assert f"Send {site}/node.pub to the hub's administrator" in told.output
    made = load_site(site / "site.toml")
    assert made.flower == SiteFlower(superlink="localhost:9", root_certificates=str(authority))
    assert (made.name, made.models, made.trainer.active_experts) == ("north", {"m": "/models/m"}, 4)
    unit = (site / "fedflame-engine.service").read_text()
    assert "flower-supernode --superlink localhost:9" in unit and "RestartSec=65" in unit
    assert f"--auth-supernode-private-key {site}/node\n" in unit
    assert (site / "node").stat().st_mode & 0o777 == 0o600
    private = serialization.load_ssh_private_key((site / "node").read_bytes(), None)
    public = serialization.load_ssh_public_key((site / "node.pub").read_bytes())
    assert private.public_key() == public

    before = {path: path.read_bytes() for path in site.iterdir()}
    assert invoke(*asked, "--root-certificates", authority).exit_code == 0
    assert {path: path.read_bytes() for path in site.iterdir()} == before, "what is there stays"
    assert "BAD  port localhost:9: " in invoke("site", "check", site / "site.toml").output


EITHER = "site init needs either --kit (NVIDIA FLARE) or --superlink and --name (Flower)"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", EITHER),
        ("--superlink hub:1", EITHER),
        ("--superlink hub:1 --name north --kit none", EITHER),
        (
            "--superlink hub --name north",
            "--superlink = 'hub': must be host and port, such as hub.example:8000",
        ),
        (
            "--superlink hub:65536 --name north",
            "--superlink = 'hub:65536': must be host and port, such as hub.example:8000",
        ),
        ("--superlink hub:1 --name ../x", "--name '../x': must be of letters, digits, '.', '_' and '-'"),
        ("--superlink hub:1 --name north", "--root-certificates ca.crt: no such file"),
        ("--kit none", "none: no kit of a site (startup/fed_client.json: "),
    ],
)
def test_a_site_that_cannot_be_made_is_one_line_and_no_file(
    given: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--data", "rows.jsonl", "--active-experts", "4", "--allow-model", "m")
    told = invoke("site", "init", "north", *more, *given.split())
    assert told.exit_code == 2 and told.output.count("\n") == 1
    assert reason in told.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["hub", "site"])
def test_a_file_that_is_not_there_is_called_what_it_is(command: str, tmp_path: Path) -> None:
    told = invoke(command, "check", tmp_path / "x.toml")
    assert told.exit_code == 2
    assert told.output == f"fedflame: {command} file {tmp_path}/x.toml: No such file or directory\n"
