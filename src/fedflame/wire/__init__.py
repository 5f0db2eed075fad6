"""Messages as bytes. Each message is one buffer, because thousands of small arrays are slow in any transport.

`codec` encodes and decodes messages. `buffer` holds tensors and a header. `values` rounds deltas. `planes`
compresses. `frame` adds version and checksum. `addition` encodes a plan as its difference to an earlier one.
`envelope` carries messages between processes. Decoding is strict: a message that does not match its plan is
refused with a reason, before it can take more memory than its bytes and the plan's adapter explain.
"""
