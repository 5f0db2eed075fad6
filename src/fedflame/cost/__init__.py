"""What a run costs before it is started: FLOPs, memory, bytes. Nothing here needs weights or torch.

`model_shape` reads a model's config.json, `refused_families` says which families cannot be trained. `flops`,
`memory` and `adapter_size` are functions of that shape, `tiers` puts them together for a k and a rank, and
`run_cost` for the clients of a configuration.
"""
