"""Engines carry envelopes between the hub's driver and the trainers of the sites. Each has its own folder.

The driver (`clients`) runs rounds as if its clients were local. It listens at a unix socket. The engine's
process on the hub connects to that socket (`link`), sends each request to the site that it names, and returns
the answers. An engine does no federated arithmetic and holds no state that a run needs. It may end at any
time: the driver then starts it again, and trainers send again the answers that they have computed.
"""
