"""Many machines: engines that carry envelopes between the hub's driver and the trainers of the sites.

The driver (`clients`) runs rounds as if its clients were here. It listens at a unix socket; the engine's
process on the hub connects there (`link`), sends each request to the site that it names, and brings the
answers back. An engine does no federated arithmetic, holds no state that a run needs, and may end at any
instant: the driver starts it again, and trainers answer again what they have computed. One folder per engine.
"""
