"""Measure the cost of expert LoRA on this machine: several methods on one MoE block, and a whole step.

`block` builds the frozen block with random weights. `methods` holds the ways to train or run it. `step`
builds a whole training step. `measurement` measures time, bytes saved for the backward, and peak memory, with
the methods interleaved in one process.
"""
