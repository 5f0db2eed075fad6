"""Comparison of methods over seeds and settings: the grid, what its cells left, statistics and page.

Nothing here trains: `commands.cell_processes` runs the cells, and leaves one cell.json each.
"""
