"""A client's round and what a score is: `fine_tune` trains on local rows, `evaluation` scores held-out ones.

`token_loss` is the loss of both, `regularizers` what a method adds to it, and `error_feedback` keeps what
rounding took from an update.
"""
