"""The federated loop in one process (`rounds`) and what survives a crash (`checkpoint`)."""
