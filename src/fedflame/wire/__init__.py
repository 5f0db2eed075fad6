"""Messages as bytes: one sealed buffer each, because thousands of small arrays ruin every transport.

`codec` turns messages into bytes and back, with tensors and their header in a `buffer`, deltas rounded as
`values` says, and all of it sealed by a `frame`. Reading is strict: what is not exactly what was asked for is
refused with a reason, before it takes more memory than its own bytes and the plan's adapter explain.
"""
