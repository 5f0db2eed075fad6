"""What each command of the CLI does, one file per command; `tables` has what they print."""
