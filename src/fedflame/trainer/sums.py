"""How a site takes part in a masked sum: with whom, once for every round, and with which keys.

The hub runs the network, so that it could invent members. The site adds its update only to those of the
peers whose keys its file holds. A second sum of one update over another list would show the difference; so
the first list of a round is written down before anything is masked, and any other is refused. So is another
update for the same list, which would have the same masks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedflame.atomic_file import write_atomically
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.privacy.group_sums import masked_contribution
from fedflame.privacy.identity import identity, is_signed, public, run_key, sign
from fedflame.privacy.ready import Ready
from fedflame.privacy.sum_request import Member, SumRequest, given_digest
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site
from fedflame.wire.codec import decode_plan, decode_update

LIST_FILE = "summed"


def require_summed_with_peers(site: Site, plan: RoundPlan) -> None:
    """Raise Refusal if the hub would see the update of a site with peers, or the site has too few of them."""
    if site.peers and not plan.secure_aggregation:
        raise Refusal(
            "this site's updates are seen in sums with its peers only ([peers]); set "
            "privacy.secure_aggregation = true"
        )
    if plan.secure_aggregation and len(site.peers) < site.privacy.min_peers:
        raise Refusal(
            f"the plan asks for a masked sum, and [peers] of this site's file holds {len(site.peers)} keys; "
            f"privacy.min_peers = {site.privacy.min_peers} are needed"
        )


def ready(site: Site, run: str, update: ClientUpdate) -> bytes:
    """Return what the hub is told of an update that waits for its sum, with the site's signed key of the run.

    Raises:
        UserError: a key cannot be read or written.
    """
    key = public(run_key(site.state_path, run))
    return Ready.of(update, key, sign(identity(site.state_path), run, key)).encoded()


def masked_update(site: Site, run: str, message: bytes, plan: bytes, answer: bytes) -> bytes:
    """Return the site's masked contribution to a sum, uint32 [n]; a request that comes again, the same bytes.

    Args:
        site: the settings of the site's file.
        run: the id of the run.
        message: the encoded `SumRequest`.
        plan: the last plan that the site has answered in this run, encoded.
        answer: its update for this plan, encoded.

    Raises:
        Refusal: the sum is for another plan, has members that are not this site's peers, or is a second one.
        InvalidMessage: a message is damaged.
        UserError: the list cannot be written, or a value does not fit into a sum.
    """
    request, given = SumRequest.decode(message), decode_plan(plan)
    update = decode_update(answer, given)
    me = _checked(site, run, request, given, update)
    summed = hashlib.sha256(hashlib.sha256(message).digest() + answer).hexdigest()
    _write_down(site.state_path / run / LIST_FILE, request.round, summed)
    try:
        return masked_contribution(update, me, run_key(site.state_path, run), request)
    except ValueError as error:
        raise Refusal(f"a key of the sum's members is no key: {error}") from error


def _checked(site: Site, run: str, request: SumRequest, plan: RoundPlan, update: ClientUpdate) -> Member:
    """Return the site's own entry in the list. Raises Refusal if the site must not take part in the sum."""
    asked = request.run, request.round, request.active_experts, request.given
    if not plan.secure_aggregation or asked != (run, plan.round, plan.active_experts, given_digest(plan)):
        raise Refusal(f"the sum of round {request.round} is not for what this site was given last")
    me, own_key = request.member(site.name), public(run_key(site.state_path, run))
    # With fewer rows than the others really have, they would stand beside its update in the sum by little.
    own_rows = update.num_examples, update.trained_examples
    if me is None or me.key != own_key or me.rows not in own_rows:
        raise Refusal("this site is not in the sum as it described itself")
    for member in request.members:
        if member is me:
            continue
        pinned = site.peers.get(member.name)
        if pinned is None:
            raise Refusal(f"{member.name!r} is in the sum, and is no peer of this site ([peers])")
        if not is_signed(member.key, member.signature, run, pinned):
            raise Refusal(f"the key of {member.name} in this run is not signed by the key in [peers]")
    if len(request.members) <= site.privacy.min_peers:
        raise Refusal(
            f"the sum is over {len(request.members)} sites; privacy.min_peers = {site.privacy.min_peers} "
            "beside this one are needed"
        )
    return me


def _write_down(path: Path, round_number: int, digest: str) -> None:
    """Remember list and update of a round. Raises Refusal if this round, or a later one, had others."""
    try:
        last, before = 0, ""
        if path.exists():
            known = json.loads(path.read_bytes())
            last, before = int(known["round"]), str(known["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"{path}: cannot be read, so that a second sum could not be told from a first"
        ) from error
    if round_number < last or (round_number == last and digest != before):
        raise Refusal(
            f"round {round_number} has been summed already, over another list or with another update; a "
            "round is summed once"
        )
    if round_number > last:
        write_atomically(path, json.dumps({"round": round_number, "digest": digest}).encode())
