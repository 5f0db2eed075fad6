"""Differential privacy of rows: sampling, clipping, noise and its accounting, as pure functions.

The guarantee, and what it demands, is in docs/privacy.md. Only `accounting` imports a library of the extra
`fedflame[privacy]`.
"""
