"""The names that may not join any longer: nvflare's own list, which its server keeps and obeys.

nvflare has no revocation of certificates. A certificate is for one name, and a name on this list is not
registered. A job that runs goes on with such a site, so our part in the server looks at the list, too.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedflame.errors import UserError

_FILE, _KEY = "disabled_clients.json", "disabled_clients"


def revoked_path(server_kit: Path) -> Path:
    """Return the path of the list in the kit of the server."""
    return server_kit / _FILE


def revoked_names(server_kit: Path) -> frozenset[str]:
    """Return the names on the list; none where there is no list.

    Raises:
        UserError: there is one that cannot be read. Nobody may be admitted then.
    """
    path = revoked_path(server_kit)
    try:
        names = json.loads(path.read_bytes())[_KEY]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("no list of names")
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the list of names that may not join: {error}") from error
    return frozenset(names)


def revoked_text(names: frozenset[str]) -> str:
    """Return the content of the list."""
    return json.dumps({_KEY: sorted(names)}, indent=2)
