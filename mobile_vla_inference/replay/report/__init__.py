"""The report of a replay: one HTML file for people."""
