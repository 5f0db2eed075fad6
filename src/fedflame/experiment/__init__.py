"""One experiment from configuration to report, as a library: it returns facts and prints nothing.

`prepare` refuses what can be refused before weights are loaded, `assemble` loads what a configuration names,
and `run` goes through the rounds. `run_folder` knows the files that a run leaves, `sites` who takes part over
an engine. `plan`, `scores` and `export` are the other things to do with an experiment, and `api` is what
`import fedflame` gives.
"""
