"""Reports: text tables, and HTML pages with plots and pictures."""
