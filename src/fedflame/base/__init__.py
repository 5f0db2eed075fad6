"""The frozen base model: `files` finds and checks it without torch, `dtype` chooses its number format.

`loading` loads it into memory or maps it from files (`mapped`); `adapted` attaches the adapter to it.
"""
