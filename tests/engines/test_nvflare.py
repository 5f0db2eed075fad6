"""Over NVIDIA FLARE itself, on loopback with mutual TLS: the same bytes, and who is turned away.

The federation is that of examples/loopback.py, set up once for all tests here.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.engines.conftest import let_sites_know_each_other
from tests.engines.nvflare_jobs import CODE, STRANGER, in_the_end, said, write_foreign_job
from tests.engines.nvflare_services import (
    engine_environment,
    hub_that_permits_code,
    restart_site_3,
    start_run,
    start_site_3,
)
from tests.same_runs import assert_same, assert_same_but_for_rounded_sums
from tests.tiny_runs import events

from fedflame.commands.check import client_target
from fedflame.engines.nvflare.provision import CLASSES
from loopback import SITES, Loopback, Service, descendants, fedflame, loopback

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.federation,
    pytest.mark.usefixtures("forked_commands"),
    pytest.mark.timeout(300, func_only=True),
]


@pytest.fixture(scope="module")
def federation(
    forked_commands: None, experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("federation"), experiment) as found:
        yield found


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    folder: Path
    output: str
    returncode: int
    knocks: int
    """How often strangers came to the port meanwhile."""


@pytest.fixture(scope="module")
def ended(
    federation: Loopback, foreign: Path, experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    """The experiment, while strangers come without a certificate, with another hub's, and without TLS."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    run = start_run(federation, experiment, folder)
    ours, where = federation.folder / "hub" / "kits" / "site-1", address(federation)
    with_foreign = trusting(ours)
    with_foreign.load_cert_chain(foreign / "startup" / "client.crt", foreign / "startup" / "client.key")
    knocks, deadline = 0, time.monotonic() + 250
    while run.poll() is None:
        if time.monotonic() > deadline:
            run.kill()
        for context in (trusting(ours), with_foreign):
            with suppress(ssl.SSLError, ConnectionError):
                assert not bytes_after_handshake(context, where)
        with socket.create_connection(where, 10) as plain:
            plain.sendall(b"x" * 100_000)
        knocks += 1
        time.sleep(0.2)
    output, _ = run.communicate()
    return Ended(folder, output, run.returncode, knocks)


def test_three_sites_with_mutual_tls_give_the_bytes_of_one_process(ended: Ended, finished: Path) -> None:
    assert ended.returncode == 0, ended.output
    assert_same(ended.folder, finished)
    told = events(ended.folder, "client_evaluation")
    assert [(event["round"], event["client"]) for event in told] == [(n, c) for n in (0, 2) for c in range(3)]
    assert all(event["bytes_up"] < 1000 for event in told)


# Who is turned away


def address(federation: Loopback) -> tuple[str, int]:
    host, port, _ = client_target(federation.folder / "hub" / "kits" / "site-1")
    return host, port


def bytes_after_handshake(context: ssl.SSLContext, where: tuple[str, int]) -> bytes:
    """What the server says to a client of HTTP/2, which gRPC is."""
    with (
        socket.create_connection(where, 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        return tls.recv(9)


def trusting(kit: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(kit / "startup" / "rootCA.pem"))
    context.set_alpn_protocols(["h2"])
    return context


def test_without_a_certificate_the_server_says_nothing(federation: Loopback) -> None:
    kit = federation.folder / "hub" / "kits" / "site-1"
    good = trusting(kit)
    good.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
    assert bytes_after_handshake(good, address(federation)), "a site's certificate is let in"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        assert not bytes_after_handshake(trusting(kit), address(federation))
        raise ConnectionError("closed without a byte")


@pytest.fixture(scope="module")
def foreign(federation: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit for site-1 that another hub with the same names has made."""
    folder, (_, port) = tmp_path_factory.mktemp("foreign") / "hub", address(federation)
    told = fedflame("hub", "init", folder, "--sites", "site-1", "--host", "localhost",
                    "--port", str(port), "--admin", "researcher@hub.example")  # fmt: skip
    assert told.returncode == 0, told.stdout
    return folder / "kits" / "site-1"


def test_a_certificate_of_another_authority_is_turned_away(federation: Loopback, foreign: Path) -> None:
    host, port = address(federation)
    ours = federation.folder / "hub" / "kits" / "site-1"
    context = trusting(ours)
    context.load_cert_chain(foreign / "startup" / "client.crt", foreign / "startup" / "client.key")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        assert not bytes_after_handshake(context, (host, port))
        raise ConnectionError("closed without a byte")
    with pytest.raises(ssl.SSLCertVerificationError):
        bytes_after_handshake(trusting(foreign), (host, port))


def test_strangers_at_the_port_change_no_run(ended: Ended, finished: Path) -> None:
    assert ended.returncode == 0 and ended.knocks > 5, ended.output
    assert_same(ended.folder, finished)


def test_a_site_posing_as_another_is_not_registered(federation: Loopback, tmp_path: Path) -> None:
    kits = federation.folder / "hub" / "kits"
    federation.services[
        "site-3 engine"
    ].stop()  # the name is free, so that nothing but the certificate is against it
    impostor = tmp_path / "impostor"
    shutil.copytree(kits / "site-1", impostor, ignore=shutil.ignore_patterns("*.fl", "*.log", "*-*-*-*-*"))
    config = impostor / "startup" / "fed_client.json"
    client = json.loads(config.read_text())
    client["client"]["fqsn"] = "site-3"
    config.write_text(json.dumps(client))
    start = impostor / "startup" / "sub_start.sh"
    start.write_text(start.read_text().replace("uid=site-1", "uid=site-3"))
    service = Service("engine", ["bash", "startup/sub_start.sh", "--once"], impostor, engine_environment())
    try:
        refusal = "authenticated as 'site-1' but claimed endpoint 'site-3'"
        deadline = time.monotonic() + 150
        while refusal not in (kits / "localhost" / "log.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        check = fedflame("hub", "check", federation.hub_file)
        assert "BAD  site site-3 is not connected" in check.stdout, check.stdout
        assert check.returncode == 1
    finally:
        service.stop()
        restart_site_3(federation)


def test_a_site_that_was_revoked_is_not_admitted_and_the_others_stay(federation: Loopback) -> None:
    kits = federation.hub_file.parent / "kits"
    admin = kits / "researcher@hub.example"
    others = {path: path.read_bytes() for path in kits.glob("*/startup/*.crt")}
    told = fedflame("hub", "revoke", federation.hub_file, "site-3")
    assert told.returncode == 0 and "site-3 is revoked" in told.stdout, told.stdout
    try:
        federation.services["site-3 engine"].stop()
        federation.services["site-3 engine"] = start_site_3(federation)
        deadline = time.monotonic() + 100
        while (
            "Reject disabled client registration: site-3" not in (kits / "localhost" / "log.txt").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        check = fedflame("hub", "check", federation.hub_file)
        assert check.returncode == 1
        bad = [line for line in check.stdout.splitlines() if line.startswith("BAD")]
        assert [line.partition(";")[0] for line in bad] == [
            "BAD  site-3 was revoked",
            "BAD  site site-3 is not connected",
        ]
        assert {path: path.read_bytes() for path in others} == others
    finally:
        nvflare = str(Path(sys.executable).with_name("nvflare"))
        enable = [nvflare, "system", "enable-client", "site-3", "--force", "--startup-kit", str(admin)]
        subprocess.run(enable, check=True, capture_output=True, cwd=admin)
        federation.services["site-3 engine"].stop()
        restart_site_3(federation)


def test_a_site_whose_certificate_was_renewed_is_back_and_no_other_is_touched(federation: Loopback) -> None:
    kits = federation.hub_file.parent / "kits"
    before = {path: path.read_bytes() for path in kits.glob("*/startup/*.crt")}
    federation.services["site-3 engine"].stop()
    told = fedflame("hub", "renew", federation.hub_file, "site-3")
    assert told.returncode == 0 and f"{kits}/site-3/startup" in told.stdout, told.stdout
    restart_site_3(federation)
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert changed == {kits / "site-3" / "startup" / "client.crt"}


def test_a_site_posing_as_administrator_may_not_start_a_run(
    federation: Loopback, experiment: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(federation.hub_file.parent / "kits" / "researcher@hub.example", hub / "admin")
    for name in ("client.crt", "client.key"):
        site = federation.hub_file.parent / "kits" / "site-1" / "startup" / name
        shutil.copy(site, hub / "admin" / "startup" / name)
    text = 'sites = "site-1,site-2,site-3"\n[rounds]\nmax_resubmissions = 0\n[nvflare]\nadmin_kit = "admin"\n'
    (hub / "hub.toml").write_text(text)
    check = fedflame("hub", "check", hub / "hub.toml")
    assert check.returncode == 1 and "BAD  certificate is for site-1" in check.stdout
    run = ("run", experiment, "--engine", "nvflare", "--hub", hub / "hub.toml")
    done = fedflame(*run, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "the engine did not take the job" in done.stdout


def test_a_job_with_another_class_of_nvflare_runs_at_no_site(federation: Loopback, tmp_path: Path) -> None:
    write_foreign_job(tmp_path / "job", STRANGER)
    assert in_the_end(federation, tmp_path / "job")["status"].startswith("FINISHED:")
    kits = federation.hub_file.parent / "kits"
    assert all(f"{STRANGER!r} at config path" in said(kits / site) for site in SITES)


def test_kits_let_jobs_build_our_two_classes_and_stream_no_log(federation: Loopback) -> None:
    kits = federation.hub_file.parent / "kits"
    for name in ("localhost", *SITES):
        resources = json.loads((kits / name / "local" / "resources.json").read_text())
        assert resources["class_allow_list"] == list(CLASSES)
        assert resources["allow_log_streaming"] is False
        assert not [each for each in resources["components"] if "log" in each["id"]]
        rights = json.loads((kits / name / "local" / "authorization.json").read_text())
        assert all(of_role["byoc"] == "none" for of_role in rights["permissions"].values())


def test_no_process_of_an_engine_has_loaded_torch(federation: Loopback) -> None:
    for name, service in federation.services.items():
        if not name.endswith("trainer"):
            for pid in (service.process.pid, *descendants(service.process.pid)):
                with suppress(FileNotFoundError, ProcessLookupError):  # one of the last job, ending
                    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(), name


# The last of all: the hub's server keeps the rights of its administrator's file until it ends


@pytest.mark.parametrize(
    ("hub", "refusals"),
    [
        (nullcontext, {"server: BYOC not permitted"}),
        (hub_that_permits_code, {f"{site}: NVFLARE_ERROR: BYOC not permitted" for site in SITES}),
    ],
)
def test_a_job_with_code_runs_at_no_site(
    hub: Callable[..., AbstractContextManager[None]],
    refusals: set[str],
    federation: Loopback,
    tmp_path: Path,
) -> None:
    """The hub refuses it, and where it does not, every site does."""
    trace, job = tmp_path / "trace", tmp_path / "job"
    custom = write_foreign_job(job, "spy.Spy")
    custom.mkdir()
    (custom / "spy.py").write_text(CODE.format(path=str(trace)))
    with hub(federation):
        found = in_the_end(federation, job)
    assert found["status"] == "FINISHED:FAILED_TO_RUN"
    assert refusals <= set(found["job_deploy_detail"])
    assert not trace.exists()


# Last, since the sites then refuse runs without masks


def test_masked_sums_are_right_although_a_trainer_is_killed_in_the_round(
    federation: Loopback, masked: Path, unmasked: Path, tmp_path: Path
) -> None:
    let_sites_know_each_other(federation)
    trainer = federation.services["site-2 trainer"]
    log = federation.folder / "site-2" / "trainer.log"
    before = log.read_text().count("round 1: training")
    run = start_run(federation, masked, tmp_path / "run")
    while log.read_text().count("round 1: training") == before:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    trainer.process.send_signal(signal.SIGKILL)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    assert_same_but_for_rounded_sums(tmp_path / "run", unmasked)
    assert log.read_text().count("its update is in a masked sum") == 1
