"""Train members of the family on episodes: sequences through the cell, on the CPU or a GPU. Never imports rclpy."""
