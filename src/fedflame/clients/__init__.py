"""Who answers a plan: the clients of this process (`local`), worker processes (`workers`), or sites.

`answers` is what the rounds know of any of them. The sites' end is in `engines.clients`.
"""
