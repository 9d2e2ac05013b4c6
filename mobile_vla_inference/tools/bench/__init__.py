"""`mobile_vla bench`: benchmarks of loading, of a policy step, of the running node and of a stop."""
