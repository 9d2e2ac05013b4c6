"""Run a policy over a recorded drive, offline or through the node, and compare it with what was recorded."""
