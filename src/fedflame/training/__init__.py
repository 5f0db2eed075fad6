"""Training and evaluation on a client: `fine_tune` trains on local rows, `evaluation` scores held-out rows.

`token_loss` computes the loss of both. `regularizers` holds the terms that a method adds to it.
`error_feedback` remembers the rounding errors of updates.
"""
