"""Reports: text tables, HTML pages, plots and grids of pictures."""
