"""The frozen base model: its files, its dtype, and loading it.

`files` finds and checks its files without torch. `dtype` chooses its dtype. `loading` loads it into memory,
or maps it from files (`mapped`). `adapted` attaches the adapter.
"""
