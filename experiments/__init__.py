"""Whole runs of the line: the demo, the refresh, the paper's tables."""
