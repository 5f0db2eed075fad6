"""The trainer: a site's long-running process, which holds the base model and the site's rows.

`site` is the site's settings file. `service` checks requests and trains. `server` is the unix socket at which
an engine on this machine asks, and `ask` is the client of that socket. `job` holds the settings on which hub
and trainer must agree. The trainer runs no engine's code.
"""
