"""The clients that carry out plans: in this process (`local`), or in this and other processes (`workers`).

`answers` is the interface that the rounds use. `engines.clients` implements it for sites.
"""
