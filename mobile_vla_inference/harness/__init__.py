"""Real nodes on a ROS 2 graph of their own, as child processes, for the demo, replays, benchmarks and the drill."""
