"""`mobile_vla drill`: faults injected into the real node, and how it stops the robot."""
