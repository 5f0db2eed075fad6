"""Print what the same steps spend at clients with more rows: epsilon at delta = 1e-5."""

from __future__ import annotations

from fedflame.privacy.accounting import Spending, epsilon_of, noise_for

ROWS = (1_000, 3_000, 10_000, 30_000, 100_000)
SETTINGS = ((64, 120), (256, 30), (512, 60))
"""Expected rows of a step, and steps of the run."""
OF_EIGHT = 3_000
"""Rows of the client for which the noise is chosen so that epsilon is 8."""
DELTA = 1e-5


def main() -> None:
    print("| rows of a step, steps | noise | " + " | ".join(f"{rows:,} rows" for rows in ROWS) + " |")
    print("| --- " * (2 + len(ROWS)) + "|")
    for batch, steps in SETTINGS:
        noise = noise_for(8.0, DELTA, batch / OF_EIGHT, steps)
        spent = [epsilon_of([Spending(min(1.0, batch / rows), noise, steps)], DELTA) for rows in ROWS]
        cells = (f"{batch}, {steps}", f"{noise:.2f}", *(f"{epsilon:.2g}" for epsilon in spent))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
