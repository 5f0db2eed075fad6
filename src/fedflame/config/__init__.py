"""What a user may set: the run's configuration, the table of methods, settings files, and their words.

`sections` has every key with its meaning, `run_config` what follows from them, `methods` a row for each
federated method, `load` reads a TOML file or a dict. `settings` serves all settings files, also those of a
hub and of a site. `lists` reads what may be written as a list or as text, and
`words` holds the values that more than one part of the package knows.
"""
