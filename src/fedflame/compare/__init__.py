"""Compare methods over seeds and settings: the grid, its cells, the statistics and the page.

`grid` reads the grid file. `run` runs the cells that are missing, each in a process of `cell_processes`.
`results` holds what a finished cell writes, and `comparison` collects the results of all cells. `intervals`,
`devices`, `tables` and `page` turn them into statistics, tables and charts.
"""
