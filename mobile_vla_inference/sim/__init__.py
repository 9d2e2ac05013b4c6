"""A small world that closes the loop: velocity command in, camera image out. Never imports torch or rclpy."""
