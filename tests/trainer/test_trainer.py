"""The resident trainer: what it allows, that it trains once, and who may ask it."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines_here import write_site
from tests.fake_cards import fake_cards, load_on_cpu
from tests.tiny_models import TOP_K
from tests.trainer_asked import MODEL, ROWS, RUN, Told, request

from fedflame.base.adapted import load_adapted_model
from fedflame.base.files import model_digest
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import encode, encode_rows
from fedflame.data.rows import load_rows
from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.trainer.ask import answer_pieces, ask
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.server import MOST_CONNECTIONS, serve, sole_trainer
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.trainer.unix_socket import listening
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.addition import encode_addition, plan_digest
from fedflame.wire.codec import decode_update, encode_plan, encode_update
from fedflame.wire.envelope import Envelope, receive


@pytest.mark.parametrize("changes", [{}, {"packed_length": 32}, {"padding_free": True}], ids=str)
def test_its_update_is_that_of_training_the_same_rows_here(
    changes: dict[str, Any],
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    data: Path,
    tiny_folder: Path,
) -> None:
    plan = replace(plan, **changes)
    answer = make_service().answer(request(job, plan))
    adapted, tokenizer = load_adapted_model(str(tiny_folder), "float32", job.adapter)
    encoder = new_encoder(tokenizer, job.max_length)
    rows = [encode(row, encoder) for row in load_rows(dataset_name=str(data)).rows]
    expected = fine_tune(adapted, rows, plan, pad_token(tokenizer))
    assert answer.body == encode_update(expected, plan)
    assert answer.header == {
        "kind": "update", "ticket": "t1", "run": RUN, "site": "north", "steps": 3, "tokens": expected.tokens,
    }  # fmt: skip


def test_asked_again_it_answers_again_without_training_also_after_its_own_end(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    again = service.answer(request(job, plan, ticket="t2"))
    restarted = make_service().answer(request(job, plan, ticket="t3"))
    assert first.body == again.body == restarted.body
    assert [answer.header["ticket"] for answer in (first, again, restarted)] == ["t1", "t2", "t3"]
    assert (told.heard("training with k=2"), told.heard("answered again")) == (1, 2)


def test_another_run_or_plan_is_trained_anew_and_an_older_one_gives_the_same_bytes(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    other_run = service.answer(request(job, plan, run="cd" * 16))
    next_round = service.answer(request(job, replace(plan, round=3)))
    older = service.answer(request(job, plan))
    assert told.heard("trained in") == 4
    assert first.body == other_run.body == older.body != next_round.body


@pytest.mark.parametrize("at", [3, -3])
def test_an_answer_that_was_damaged_on_its_disk_is_trained_again(
    at: int,
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    told: Told,
    tmp_path: Path,
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    kept = tmp_path / "state" / RUN / "answer"
    content = bytearray(kept.read_bytes())
    content[at] ^= 1
    kept.write_bytes(content)
    again = service.answer(request(job, plan))
    assert again.body == first.body and told.heard("trained in") == 2
    assert service.answer(request(job, plan)).body == first.body and told.heard("trained in") == 2


def test_asked_twice_at_once_it_trains_once(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service, answers = make_service(), list[bytes]()
    threads = [
        threading.Thread(target=lambda: answers.append(service.answer(request(job, plan)).body))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and len(answers) == 3
    assert told.heard("trained in") == 1


def test_rounded_updates_owe_per_run(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    lossy = replace(plan, update_dtype="int8", error_feedback=True)
    answer = make_service().answer(request(job, lossy))
    assert answer.header["kind"] == "update"
    assert (tmp_path / "state" / RUN / "residuals" / "1" / "2.sealed").is_file()


def test_it_describes_itself_and_nothing_else(
    make_service: Callable[..., TrainerService], job: TrainingJob
) -> None:
    answer = make_service(k=2).answer(
        Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"})
    )
    expected: dict[str, Any] = {"kind": "description", "ticket": "t", "run": RUN, "site": "north"}
    expected |= {"num_examples": ROWS, "active_experts": 2, "max_active_experts": 2, "test_rows": 0}
    assert answer == Envelope(expected | {"held": ""})


def test_it_takes_what_a_plan_adds_to_the_one_it_answered_last_also_after_its_own_end(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    held = encode_plan(plan)
    make_service().answer(request(job, plan))
    service, following = make_service(), replace(plan, round=3)
    described = service.answer(Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"}))
    assert described.header["held"] == plan_digest(held)
    asked = request(job, plan, addition=True)
    added = service.answer(Envelope(asked.header, encode_addition(encode_plan(following), held)))
    assert added.body == make_service().answer(request(job, following, run="cd" * 16)).body


def test_what_adds_to_a_plan_that_it_has_not_is_said_to_be_lacking(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    held = encode_plan(plan)
    addition = encode_addition(encode_plan(replace(plan, round=3)), held)
    asked = Envelope(request(job, plan, addition=True).header, addition)
    assert make_service().answer(asked).header["kind"] == "lacking"
    service = make_service()
    service.answer(request(job, plan))
    kept = tmp_path / "state" / RUN / "plan"
    kept.write_bytes(kept.read_bytes()[:-1])  # the disk was full, or the machine lost power
    answer = service.answer(asked)
    assert answer.header["kind"] == "lacking" and not answer.body
    kept.unlink()
    kept.mkdir()  # nothing can be written there
    assert service.answer(request(job, replace(plan, round=4))).header["kind"] == "update"


def test_of_many_runs_the_states_of_the_last_are_kept(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path, told: Told
) -> None:
    service = make_service(k=TOP_K)
    site = service._site
    service._site = site.model_copy(update={"trainer": site.trainer.model_copy(update={"kept_runs": 2})})
    state, runs = tmp_path / "state", [letter * 32 for letter in "abc"]
    (state / "mine").mkdir(parents=True)
    first = service.answer(request(job, plan, run=runs[0]))
    for run in (runs[1], runs[0], runs[2]):
        service.answer(request(job, replace(plan, round=3), run=run))
    assert {path.name for path in state.iterdir() if path.is_dir()} == {"mine", runs[0], runs[2]}
    assert told.heard(f"run {runs[1][:8]}: its state is removed (trainer.kept_runs)") == 1
    assert told.heard("its state is removed") == 1
    assert service.answer(request(job, plan, run=runs[1])).body == first.body, "it trains again"


def test_of_few_runs_all_states_are_kept(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    """Half as many as may be kept, and one more."""
    others = {f"{number:032x}" for number in range(6)}
    for name in others:
        (tmp_path / "state" / name).mkdir(parents=True)
    make_service().answer(request(job, plan))
    assert {path.name for path in (tmp_path / "state").iterdir() if path.is_dir()} == others | {RUN}


LIMITS = "[limits]\n"


@pytest.mark.parametrize(
    ("limits", "k", "change", "reason"),
    [
        ("", 1, {}, "the plan asks for k = 2; this site allows at most 1"),
        ("max_rounds = 4", 4, {}, "the plan asks for rounds = 5; this site allows at most 4"),
        ("max_rounds = 5", 4, {"round": 6}, "the plan asks for round = 6; this site allows at most 5"),
        ("max_steps = 2", 4, {}, "the plan asks for steps = 3; this site allows at most 2"),
        ("max_tokens = 191", 4, {}, "the plan asks for tokens = 192; this site allows at most 191"),
        ("max_tokens = 191", 4, {"tokens_per_step": 100}, "tokens = 300; this site allows at most 191"),
        ("max_tokens = 239", 4, {"packed_length": 40}, "tokens = 240; this site allows at most 239"),
        ("max_flops = 1e3", 4, {}, "FLOPs; this site allows at most 1e+03"),
    ],
)  # fmt: skip
def test_what_the_sites_file_does_not_allow_is_refused_before_anything_is_loaded(
    limits: str, k: int, change: dict[str, int], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
) -> None:  # fmt: skip
    answer = make_service(LIMITS + limits, k).answer(request(job, replace(plan, **change)))
    assert answer.header["kind"] == "refused"
    assert reason in answer.header["reason"]
    assert not told.heard("loading")
    assert told.heard("refused: ")


def test_a_plan_that_asks_for_just_what_is_allowed_is_trained(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    flops = 192 * make_service()._work.flops_per_token(job, plan)
    limits = f"max_rounds = 5\nmax_steps = 3\nmax_tokens = 192\nmax_flops = {flops!r}"
    service = make_service(LIMITS + limits, k=2)
    assert service.answer(request(job, replace(plan, round=5))).header["kind"] == "update"


def test_a_token_of_a_long_packed_sequence_costs_more_than_one_of_a_row(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    packed = replace(plan, packed_length=1000)
    flops = 6000 * make_service()._work.flops_per_token(job, plan)
    answer = make_service(LIMITS + f"max_flops = {flops!r}").answer(request(job, packed))
    assert answer.header["kind"] == "refused" and "FLOPs" in answer.header["reason"]


def test_a_model_is_loaded_once_for_a_job_and_goes_before_the_next_is_loaded(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    service, digests, held = make_service(), list[str](), list[bool]()

    def noted_digest(path: str) -> str:
        digests.append(path)
        return model_digest(path)

    def noted_load(*arguments: Any) -> Any:
        held.append(service._work._model.ready is not None)
        return load_adapted_model(*arguments)

    monkeypatch.setattr("fedflame.trainer.model.model_digest", noted_digest)
    monkeypatch.setattr("fedflame.trainer.model.load_adapted_model", noted_load)
    smaller = job.model_copy(update={"r": 2}), replace(plan, adapter=plan.adapter.with_rank(2))
    for asked, its in ((job, plan), (job, replace(plan, round=3)), smaller):
        assert service.answer(request(asked, its)).header["kind"] == "update"
    assert told.heard("loading the-model in float32") == 2 and held == [False, False]
    assert len(digests) == 1, "gigabytes are read once"


def test_the_base_lies_on_the_device_of_the_sites_file(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = load_on_cpu(monkeypatch, "fedflame.trainer.model")
    fake_cards(monkeypatch, tmp_path, (80_000_000_000, 80_000_000_000))
    path = make_service()._site.folder / "site.toml"
    path.write_text(path.read_text().replace("[trainer]\n", '[trainer]\ndevice = "cuda:1"\n'))
    service = TrainerService(load_site(path), told.append)
    assert service.answer(request(job, plan)).header["kind"] == "update"
    assert asked == ["cuda:1"]
    assert told.heard("loading the-model in float32 onto cuda:1, NVIDIA H200, 80.0 GB, CUDA 13.0, ") == 1


def test_a_full_memory_is_the_reason_and_the_trainer_goes_on(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    service = make_service()
    with monkeypatch.context() as patch:
        patch.setattr("fedflame.trainer.work.fine_tune", too_large)
        answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "failed"
    assert answer.header["reason"] == (
        "cpu ran out of memory while training at k = 2 with 2 rows per batch and gradient_checkpointing = "
        "'none'; take gradient_checkpointing = 'experts' or 'layers', fewer tokens per batch, a smaller "
        "adapter.r, or a device with more memory"
    )
    assert service.answer(request(job, plan)).header["kind"] == "update"


@pytest.mark.parametrize(
    ("memory", "free", "asked"),
    [((10_000,), (10_000,), []), ((150_000, 150_000), (150_000, 150_000), ["balanced"])],
)
def test_a_card_that_is_too_small_is_known_before_the_base_is_loaded(
    memory: tuple[int, ...], free: tuple[int, ...], asked: list[str],
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = load_on_cpu(monkeypatch, "fedflame.trainer.model")
    fake_cards(monkeypatch, tmp_path, memory, free)
    answer = make_service().answer(request(job, plan))
    assert loaded == asked
    if not asked:
        assert answer.header["kind"] == "failed"
        assert answer.header["reason"].startswith(
            "training at k = 2 with 2 rows per batch and gradient_checkpointing = 'none' takes at least 0.0 "
            "GB for the base in float32 and the adapter of rank 3 with its moments, whatever k and tokens "
            "are; cuda:0 (NVIDIA H200) has 0.0 GB; take "
        )


def test_a_hub_cannot_choose_the_device(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    asked = request(job, plan, job=job.model_dump() | {"device": "cuda:1"})
    answer = make_service().answer(asked)
    assert (
        answer.header["kind"] == "refused"
        and "job.device = 'cuda:1': Extra inputs" in answer.header["reason"]
    )


def test_a_device_that_is_not_there_is_refused_before_the_rows_are_read(tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", tmp_path / "none.jsonl", 2, {MODEL: "none"}))
    trainer = site.trainer.model_copy(update={"device": "cuda"})
    with pytest.raises(UserError, match=r"^trainer\.device = 'cuda': torch "):
        TrainerService(site.model_copy(update={"trainer": trainer}), lambda _: None)


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say nothing", "response": ""}\n')
    site = load_site(write_site(tmp_path, "north", tmp_path / "rows.jsonl", 2, {MODEL: str(tiny_folder)}))
    with pytest.raises(UserError, match=r"rows\.jsonl: no usable row"):
        TrainerService(site, lambda _: None)


def test_a_larger_k_is_trained_where_the_owner_allows_it(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    service = make_service(k=1)
    assert "k = 2; this site allows at most 1" in service.answer(request(job, plan)).header["reason"]
    path = service._site.folder / "site.toml"
    path.write_text(
        path.read_text().replace("active_experts = 1", "active_experts = 1\nmax_active_experts = 2")
    )
    allowing = TrainerService(load_site(path), lambda _: None)
    assert allowing.answer(request(job, plan)).header["kind"] == "update"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_name_or_path": "another"}, "model 'another' is not allowed here; the-model may be trained"),
        ({"model_digest": "0" * 32}, "model 'the-model' is another one here"),
    ],
)
def test_a_model_that_is_not_allowed_or_not_the_same_is_refused(
    changes: dict[str, str], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
) -> None:  # fmt: skip
    answer = make_service().answer(request(job.model_copy(update=changes), plan))
    assert answer.header["kind"] == "refused"
    assert reason in answer.header["reason"]
    assert told.heard(f"refused: {answer.header['reason']}") and not told.heard("loading")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "south"}, "this is north; the request is for south"),
        ({"run": "../../etc"}, "run is '../../etc'; 32 hexadecimal digits are needed"),
        ({"kind": "delete"}, "request of kind 'delete'; describe, train, evaluate and sum are known"),
        ({"kind": 3}, "field kind is 3; a string is needed"),
        ({"job": None}, "job = None: Input should be"),
        ({"job": {"r": "8"}}, "job.model_name_or_path is missing"),
    ],
)
def test_a_request_that_is_none_is_refused(
    changes: dict[str, Any], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
) -> None:  # fmt: skip
    answer = make_service().answer(request(job, plan, **changes))
    assert (answer.header["kind"], answer.header["site"], answer.body) == ("refused", "north", b"")
    assert reason in answer.header["reason"]


def test_a_plan_that_is_none_is_refused_and_one_that_does_not_fit_fails(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    service = make_service()
    garbage = Envelope(request(job, plan).header, b"garbage")
    assert service.answer(garbage).header["reason"] == "7 bytes that are no fedflame message"
    tampered = Envelope(garbage.header, encode_plan(plan)[:-1] + b"x")
    assert "its checksum is wrong" in service.answer(tampered).header["reason"]
    larger = service.answer(request(job, replace(plan, adapter=plan.adapter.with_rank(job.r + 1))))
    assert larger.header["reason"] == "the plan has rank 4; its job says r = 3"
    misfit = service.answer(request(job, replace(plan, adapter=replace(plan.adapter, attention={}))))
    assert misfit.header["kind"] == "failed" and "is missing; the model needs" in misfit.header["reason"]
    smaller = service.answer(request(job, replace(plan, adapter=plan.adapter.with_rank(job.r - 1))))
    assert smaller.header["kind"] == "update", "some methods give a client fewer ranks"
    other = service.answer(request(job.model_copy(update={"target_modules": "nonsense"}), plan))
    assert other.header["kind"] == "failed"
    assert service.answer(request(job, plan)).header["kind"] == "update", "it goes on after both"


# The door


@pytest.fixture
def door(make_service: Callable[..., TrainerService], tmp_path: Path, told: Told) -> Iterator[Path]:
    path = tmp_path / "door" / "trainer.sock"
    with listening(path) as listener:
        server = threading.Thread(target=serve, args=(listener, make_service(), told.append), daemon=True)
        server.start()
        yield path
    server.join(5)
    assert not server.is_alive() and not path.exists()


DESCRIBE = Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"})


def test_only_the_owner_has_rights_on_the_socket(door: Path) -> None:
    assert stat.S_IMODE(door.stat().st_mode) == 0o600
    assert ask(door, DESCRIBE, patience=1).header["num_examples"] == ROWS


def test_another_user_is_sent_away_even_through_an_open_door(
    door: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says whose the process at the other end is; this one is told that it is another user's."""
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(door))
        with pytest.raises(EOFError):
            receive(connection)
    assert told.will_hear("refused: a connection of another user")


def of_another_user(door: Path, try_it: Callable[[socket.socket], bool]) -> bool:
    """What comes of it where a process of another user tries it, whom every folder on the way lets pass."""
    for folder in door.parents:
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # the group stays root's
    child = os.fork()
    if not child:
        went_so = False
        try:
            os.setuid(65534)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(5)
            went_so = try_it(connection)
        finally:
            os._exit(0 if went_so else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


only_root_can_try = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@only_root_can_try
def test_another_user_cannot_open_the_socket(door: Path) -> None:
    def is_kept_out(connection: socket.socket) -> bool:
        with pytest.raises(PermissionError):
            connection.connect(str(door))
        return True

    assert of_another_user(door, is_kept_out)


@only_root_can_try
def test_another_user_whom_the_socket_lets_in_is_sent_away(door: Path, told: Told) -> None:
    def is_sent_away(connection: socket.socket) -> bool:
        connection.connect(str(door))
        return connection.recv(1) == b""

    door.chmod(0o777)
    assert of_another_user(door, is_sent_away)
    assert told.will_hear("refused: a connection of another user")


def test_nonsense_at_the_door_ends_that_connection_only(door: Path, told: Told) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(door))
        connection.sendall(b"x" * 100)
        with pytest.raises((EOFError, ConnectionResetError)):
            receive(connection)
    assert told.will_hear("refused: bytes that are no envelope")
    assert ask(door, DESCRIBE, patience=1).header["kind"] == "description"


def test_a_plan_that_is_longer_than_the_memory_allows_is_not_read(
    tmp_path: Path, make_service: Callable[..., TrainerService], told: Told
) -> None:
    service, path = make_service("[limits]\nmax_memory = 4e-6\n"), tmp_path / "door" / "trainer.sock"
    with listening(path) as listener:
        threading.Thread(target=serve, args=(listener, service, told.append), daemon=True).start()
        assert ask(path, Envelope(DESCRIBE.header, bytes(1000)), patience=1).header["kind"] == "description"
        with pytest.raises(OSError, match="no trainer at"):
            ask(path, Envelope(DESCRIBE.header, bytes(1001)), patience=0)
    assert told.will_hear("refused: envelope with a body of 1,001 bytes; at most 1,000 are read") == 1


def test_of_many_connections_some_are_closed_until_others_end(door: Path, told: Told) -> None:
    with ExitStack() as held:
        for _ in range(MOST_CONNECTIONS):
            held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(str(door))
        with pytest.raises(OSError, match="no trainer at"):
            ask(door, DESCRIBE, patience=0)
        assert told.will_hear(f"refused: a connection beside {MOST_CONNECTIONS} others") == 1
    assert ask(door, DESCRIBE, patience=5).header["kind"] == "description"


def test_a_trainer_that_stays_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with pytest.raises(OSError, match=r"no trainer at .*nobody\.sock: "):
        ask(path, DESCRIBE, patience=0)
    answer = Envelope.from_bytes(b"".join(answer_pieces(path, DESCRIBE.pieces(), patience=0)))
    assert answer.header["kind"] == "failed" and answer.header["ticket"] == "t"
    assert "no trainer at" in answer.header["reason"]


def test_a_second_trainer_of_a_site_is_refused(data: Path, tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", data, 2, {"m": "m"}))
    refusal = pytest.raises(UserError, match=rf"serves north already \(process {os.getpid()} on .* since 2")
    with sole_trainer(site), refusal, sole_trainer(site):
        pass
    with sole_trainer(site):
        assert stat.S_IMODE(site.state_path.stat().st_mode) == 0o700


def test_a_state_folder_that_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", data, 2, {"m": "m"}))
    site.state_path.touch()
    with (
        pytest.raises(UserError, match=r"/state: cannot be made: File exists$"),
        sole_trainer(site),
    ):
        pass


def test_whoever_hangs_up_ends_that_connection_only(door: Path, told: Told) -> None:
    for said in (b"", b"flame", DESCRIBE.to_bytes()):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(door))
            connection.sendall(said)
    assert ask(door, DESCRIBE, patience=1).header["kind"] == "description"
    while any("_converse" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)  # what one of them raised would fail this test
    assert not told


def test_one_connection_may_ask_again_and_again(door: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(door))
        for _ in range(3):
            connection.sendall(DESCRIBE.to_bytes())
            assert receive(connection).header["num_examples"] == ROWS


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="longer than the 107 letters"), listening(tmp_path / ("x" * 110)):
        pass


def test_a_row_that_cannot_be_encoded_is_still_a_row_of_the_site(
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub leaves out an update that claims another number of rows than the site has described."""
    monkeypatch.setattr(
        "fedflame.trainer.model.encode_rows",
        lambda rows, encoder: ["row 1: no", *encode_rows(rows[1:], encoder)],
    )
    service = make_service()
    update = decode_update(service.answer(request(job, plan)).body, plan)
    assert told.heard("1 of 7 rows cannot be used; the first: row 1: no")
    described = service.answer(Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"}))
    assert update.num_examples == described.header["num_examples"] == ROWS
    assert update.trained_examples == 6
