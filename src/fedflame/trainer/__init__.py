"""The resident process of a site: it holds the base model, the site's rows and its k, and no engine's code.

`site` is what the site's owner has written down, `service` decides about requests and trains, `server` is
the unix socket at which whichever engine runs there asks, and `ask` the other end of it. `job` is what hub
and trainer must agree on.
"""
