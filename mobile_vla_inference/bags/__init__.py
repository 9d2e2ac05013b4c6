"""Recorded drives: read and write rosbag 2, run a policy over a bag, compare it with what a person did."""
