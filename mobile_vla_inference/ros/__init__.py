"""Wiring to ROS 2: nodes, parameters, message conversions, diagnostics."""
