"""What expert LoRA costs on this machine: one MoE block, forward and backward, five ways side by side.

`block` builds the frozen block with random weights, `methods` are the ways to train or to run it,
`measurement` takes time, bytes saved for backward and peak, interleaved in one process.
"""
