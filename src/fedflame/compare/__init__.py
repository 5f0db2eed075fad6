"""Comparison of methods over seeds and settings: the grid, its cells, statistics and the page.

`grid` reads the file, `run` runs what is missing of it, each cell in a process of `cell_processes`. `results`
is what a cell leaves, `comparison` lays them side by side, and `intervals`, `devices`, `tables` and `page`
make of that what people read.
"""
