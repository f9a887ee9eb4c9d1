"""One small toolkit for every HTML report: plots as inline SVG, pages of one file that load nothing from anywhere."""
