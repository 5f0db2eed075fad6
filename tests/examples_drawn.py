"""How many examples the tests draw that need many to find anything: all of them in CI, a tenth elsewhere."""

import os

MANY = 300 if os.environ.get("CI") else 30
