"""What keeps the robot safe: commands, the gate, the policy worker, memory. Never imports torch or rclpy."""
