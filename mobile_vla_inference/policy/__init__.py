"""The model: checkpoint, architecture, preprocessing, engine, policy. Never imports rclpy or message packages."""
