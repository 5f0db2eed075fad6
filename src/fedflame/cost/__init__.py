"""Compute what a run will cost before it starts: FLOPs, memory and bytes. Needs neither weights nor torch.

`model_shape` reads a model's config.json. `refused_families` lists the families that cannot be trained.
`flops`, `memory` and `adapter_size` compute costs from the shape. `tiers` combines them for a k and a rank,
and `run_cost` for the clients of a configuration.
"""
