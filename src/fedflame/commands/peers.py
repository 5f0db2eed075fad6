"""What the checks of hub and site say of the keys by which sites know one another."""

from __future__ import annotations

from collections.abc import Iterator

from fedflame.commands.check import Finding
from fedflame.engines.hub import Hub
from fedflame.privacy.identity import fingerprint, identity, public
from fedflame.report.numbers import plural
from fedflame.trainer.site import Site

_COMPARE = "ask each site for its fingerprint on another way than through the hub"


def keys_of_site(site: Site) -> Iterator[Finding]:
    """Show the site's own key, for the others' files, and the fingerprints of those in its file."""
    own = public(identity(site.state_path))
    yield Finding(True, f"this site's key is {own}, its fingerprint {fingerprint(own)}")
    for name, key in site.peers.items():
        yield Finding(key != own, f"peer {name} has fingerprint {fingerprint(key)}", "it is this site's own")
    if site.peers:
        least = site.privacy.min_peers
        named = plural(len(site.peers), "peer")
        what = f"{named}; sums with at least {least} of them are answered ({_COMPARE})"
        yield Finding(len(site.peers) >= least, what, "name more in [peers], or lower privacy.min_peers")


def keys_of_hub(hub: Hub) -> Iterator[Finding]:
    """Show the fingerprint of every site's key in the hub's file, and which sites have none there."""
    if not hub.peers:
        return
    for name in dict.fromkeys([*hub.site_names(), *hub.peers]):
        if name not in hub.peers:
            advice = "add what `fedflame site check` shows there"
            yield Finding(False, f"key of {name}: not in [peers]", advice)
        else:
            known = name in hub.site_names()
            shown = f"key of {name}: fingerprint {fingerprint(hub.peers[name])}"
            yield Finding(known, shown, "this site is not in `sites`: remove the key")
