"""What a site adds to a sum: once for every round, with peers whose keys its file holds, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.trainer_asked import ROWS, RUN, Make, Told, request

from fedflame.errors import InvalidMessage
from fedflame.messages import RoundPlan
from fedflame.privacy.group_sums import contribution, length_of_sum
from fedflame.privacy.identity import identity, is_signed, public, sign
from fedflame.privacy.masks import masked
from fedflame.privacy.ready import LONGEST, Ready
from fedflame.privacy.sum_request import Member, SumRequest, given_digest
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.wire.codec import decode_plan, decode_update, encode_plan
from fedflame.wire.envelope import Envelope

PEERS = {name: Ed25519PrivateKey.generate() for name in ("east", "west")}
KEYS = {name: X25519PrivateKey.generate() for name in PEERS}
PINNED = "[peers]\n" + "".join(f'{name} = "{public(key)}"\n' for name, key in PEERS.items())


@pytest.fixture
def summed(plan: RoundPlan) -> RoundPlan:
    return replace(plan, secure_aggregation=True)


def a_peer(name: str, run: str = RUN, signer: Ed25519PrivateKey | None = None) -> Member:
    key = public(KEYS[name])
    return Member(name=name, rows=5, key=key, signature=sign(signer or PEERS[name], run, key))


def a_request(plan: RoundPlan, ready: Ready, **changes: Any) -> SumRequest:
    me = Member(name="north", rows=ROWS, key=ready.key, signature=ready.signature)
    return SumRequest(
        run=RUN,
        round=plan.round,
        active_experts=plan.active_experts,
        given=given_digest(plan),
        temperature=1.0,
        members=[a_peer("east"), me, a_peer("west")],
    ).model_copy(update=changes)


def ask(service: TrainerService, sum_request: SumRequest) -> Envelope:
    header = {"kind": "sum", "ticket": "t2", "run": RUN, "site": "north"}
    return service.answer(Envelope(header, sum_request.encoded()))


def trained(service: TrainerService, job: TrainingJob, plan: RoundPlan) -> Ready:
    answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "update", answer.header
    return Ready.decode(answer.body, plan)


def test_the_hub_gets_what_masks_leave_of_the_update_and_the_same_bytes_again(
    make_service: Make, job: TrainingJob, summed: RoundPlan, tmp_path: Path
) -> None:
    service = make_service(PINNED)
    ready = trained(service, job, summed)
    assert (ready.num_examples, ready.steps) == (ROWS, 3)
    own = public(identity(tmp_path / "state"))
    assert is_signed(ready.key, ready.signature, RUN, own)
    asked = a_request(summed, ready)
    first = ask(service, asked)
    assert first.header["kind"] == "sum", first.header
    assert ask(make_service(PINNED), asked).body == first.body, "after a restart, too"
    total = np.frombuffer(first.body, "<u4").copy()
    assert len(total) == length_of_sum(summed, asked)
    zeros = np.zeros_like(total)
    for name, other in (("east", "west"), ("west", "east")):
        keys = {"north": bytes.fromhex(ready.key), other: bytes.fromhex(public(KEYS[other]))}
        total += masked(zeros, name, KEYS[name], keys, asked.encoded())
    stored = (tmp_path / "state" / RUN / "answer").read_bytes()[32:]
    update = decode_update(stored, summed)
    assert (total == contribution(update, ROWS, asked)).all() and update.loss is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 3}, "not for what this site was given last"),
        ({"active_experts": 1}, "not for what this site was given last"),
        ({"given": "another"}, "not for what this site was given last"),
        ({"run": "cd" * 16}, "not for what this site was given last"),
        ({"members": [a_peer("east"), a_peer("west")]}, "not in the sum as it described itself"),
    ],
)
def test_a_sum_of_something_else_is_refused(
    make_service: Make, job: TrainingJob, summed: RoundPlan, changes: dict[str, Any], reason: str
) -> None:
    service = make_service(PINNED)
    answer = ask(service, a_request(summed, trained(service, job, summed), **changes))
    assert (answer.header["kind"], answer.body) == ("refused", b"")
    assert reason in answer.header["reason"]


def test_members_that_the_file_does_not_know_or_too_few_are_refused_and_cost_no_round(
    make_service: Make, job: TrainingJob, summed: RoundPlan
) -> None:
    service = make_service(PINNED)
    ready = trained(service, job, summed)
    good = a_request(summed, ready)
    east, me, west = good.members
    stranger = west.model_copy(update={"name": "zulu"})
    lists = {
        "'zulu' is in the sum, and is no peer": [east, me, stranger],
        "the key of west in this run is not signed": [east, me, a_peer("west", signer=PEERS["east"])],
        "the key of east in this run is not signed": [a_peer("east", run="cd" * 16), me, west],
        "the sum is over 2 sites": [me, west],
    }
    for reason, members in lists.items():
        answer = ask(service, good.model_copy(update={"members": members}))
        assert answer.header["kind"] == "refused" and reason in answer.header["reason"]
    mine: tuple[dict[str, Any], ...] = ({"key": west.key}, {"rows": ROWS + 1}, {"rows": 1})
    for changes in mine:
        members = [east, me.model_copy(update=changes), west]
        answer = ask(service, good.model_copy(update={"members": members}))
        assert "not in the sum as it described itself" in answer.header["reason"], "fewer rows hide less"
    assert ask(service, good).header["kind"] == "sum"


def test_a_second_list_of_a_round_is_refused_and_so_is_an_earlier_round(
    make_service: Make, job: TrainingJob, summed: RoundPlan, tmp_path: Path
) -> None:
    service = make_service(PINNED)
    ready = trained(service, job, summed)
    first = a_request(summed, ready)
    east, me, west = first.members
    assert ask(service, first).header["kind"] == "sum"
    second = first.model_copy(update={"members": [east.model_copy(update={"rows": 6}), me, west]})
    refused = ask(make_service(PINNED), second)
    assert refused.header["reason"] == (
        "round 2 has been summed already, over another list or with another update; a round is summed once"
    )
    earlier = replace(summed, round=1)
    answer = ask(service, a_request(earlier, trained(service, job, earlier)))
    assert "round 1 has been summed already" in answer.header["reason"]
    later = replace(summed, round=3)
    asked = a_request(later, trained(service, job, later))
    (tmp_path / "state" / RUN / "summed").write_bytes(b"{")
    assert "cannot be read" in ask(service, asked).header["reason"]


def test_another_update_is_not_masked_as_the_first_was(
    make_service: Make, job: TrainingJob, summed: RoundPlan, tmp_path: Path, data: Path
) -> None:
    """The difference of the two would have no mask. It may come from other rows, or a card's rounding."""
    service = make_service(PINNED)
    asked = a_request(summed, trained(service, job, summed))
    assert ask(service, asked).header["kind"] == "sum"
    (tmp_path / "state" / RUN / "answer").unlink()
    assert trained(service, job, summed) and ask(service, asked).header["kind"] == "sum"
    (tmp_path / "state" / RUN / "answer").unlink()
    content = data.read_text()
    try:
        data.write_text(content.replace('"response": "', '"response": "1'))
        service = make_service(PINNED)
        assert trained(service, job, summed)
    finally:
        data.write_text(content)
    assert "round 2 has been summed already" in ask(service, asked).header["reason"]


def test_without_an_update_that_waits_nothing_is_summed(
    make_service: Make, job: TrainingJob, plan: RoundPlan, summed: RoundPlan, told: Told
) -> None:
    ready = Ready(
        num_examples=ROWS, trained_examples=1, steps=1, sampling_rate=0.0, noise_multiplier=0.0,
        key=public(KEYS["east"]), signature="",
    )  # fmt: skip
    assert "no update that waits" in ask(make_service(PINNED), a_request(summed, ready)).header["reason"]


def test_peers_mean_sums_only_and_sums_need_peers(
    make_service: Make, job: TrainingJob, plan: RoundPlan, summed: RoundPlan
) -> None:
    def reason(more: str, asked: RoundPlan) -> str:
        answer = make_service(more).answer(request(job, asked))
        assert answer.header["kind"] == "refused"
        return str(answer.header["reason"])

    assert "set privacy.secure_aggregation = true" in reason(PINNED, plan)
    assert "holds 0 keys; privacy.min_peers = 2 are needed" in reason("", summed)
    assert "holds 2 keys; privacy.min_peers = 3" in reason(f"[privacy]\nmin_peers = 3\n{PINNED}", summed)


def test_a_ready_message_comes_back_and_a_wrong_one_is_refused(plan: RoundPlan) -> None:
    ready = Ready(
        num_examples=9, trained_examples=8, steps=3, sampling_rate=0.0, noise_multiplier=0.0,
        key="0" * 64, signature="",
    )  # fmt: skip
    assert Ready.decode(ready.encoded(), plan) == ready
    for changes in ({"steps": 4}, {"trained_examples": 10}, {"num_examples": 0}, {"key": "0"}):
        with pytest.raises(InvalidMessage, match=r"claims|ready\."):
            Ready.decode(ready.model_copy(update=changes).encoded(), plan)
    with pytest.raises(InvalidMessage, match="are the most"):
        Ready.decode(b" " * (LONGEST + 1), plan)


def test_what_a_plan_asks_of_sums_comes_back(summed: RoundPlan) -> None:
    assert decode_plan(encode_plan(summed)).secure_aggregation is True
    assert torch.equal(decode_plan(encode_plan(summed)).rescaler_values, summed.rescaler_values)
