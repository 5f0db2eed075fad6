"""The frozen base model: its files, its device and dtype, and loading it.

`files` finds and checks its files without torch. `device` and `dtype` choose where and in which number format
it computes. `loading` loads it onto the device, or maps it from files (`mapped`). `adapted` attaches the
adapter.
"""
