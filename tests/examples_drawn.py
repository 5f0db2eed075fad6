"""How many examples the tests draw that need many to find anything: all of them in CI, a fifth elsewhere."""

import os

MANY = 150 if os.environ.get("CI") else 30
