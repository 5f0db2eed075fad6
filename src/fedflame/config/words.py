"""The words that configuration, messages and costs share, where a choice has few values."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of the frozen base, under its name in the configuration."""
RescalerMode = Literal["learned", "fixed", "mass"]
"""How a client treats s: train it, keep it, or measure it on its rows and keep that."""
RescalerRule = Literal["learned", "none", "static", "mass"]
"""How FLAME rescales at k < K: learned (the paper's), s = 1, s = K/k, or `moe.rescaler.mass_ratio`."""
CountNormalization = Literal["token", "slot"]
"""What FLAME divides activation counts by: tokens (the paper's), or routed slots, k_i for each token."""
Trainable = Literal["both", "A", "B"]
"""The half of every product B A that a client trains; a frozen half keeps its bits."""
UpdateDtype = Literal["float32", "bfloat16", "int8"]
"""How the values of an update travel; see `wire.values`."""
LRScheduler = Literal["constant", "linear", "cosine"]
"""How a learning rate falls; the names are those of transformers' `SchedulerType`."""
Disclosure = Literal["exact", "rounded", "withheld"]
"""What a site tells of its mean loss and of its activation counts; see `trainer.disclosure`."""
CountedRows = Literal["trained", "held"]
"""The rows of a client that count in a mean: those it trained on in the round, each once, or all it holds."""
RobustRule = Literal["none", "trimmed_mean", "geometric_median"]
"""How clients are averaged: by weight, or so that a few cannot decide; see `strategies.robust`."""
Clipping = Literal["row", "ghost"]
"""How a private round bounds each row's gradient; see `training.clipped_sums`."""
GHOST_TOKENS = 2048
"""Of a batch that is clipped by norms, padding included: as many as fill a CPU. A longer row is one batch."""
Checkpointed = Literal["none", "experts", "layers"]
"""What is not kept for the backward; see `moe.gradient_checkpointing`."""
BestMetric = Literal["loss", "exact_match", "rouge_l"]
"""A measure of held-out rows by which a round is better than another; of the loss, less is better."""
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""What a run can report to, by the name of its package, which is that of its extra, too."""
