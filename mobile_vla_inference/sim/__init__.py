"""A small simulated world: velocity command in, camera image out. Never imports torch or rclpy."""
