"""The server: the loop of federated rounds (`rounds`), and the state that survives a crash (`checkpoint`)."""
