"""Train a policy on episodes: sequences through the recurrent network, on the CPU or a GPU. Never imports rclpy."""
