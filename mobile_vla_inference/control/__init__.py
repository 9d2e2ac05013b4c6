"""Robot safety: commands, the gate, the policy worker, memory. Never imports torch or rclpy."""
