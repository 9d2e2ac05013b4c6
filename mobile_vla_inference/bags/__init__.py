"""Recorded drives in the format of rosbag 2: read, written, and their topics, messages and step periods."""
