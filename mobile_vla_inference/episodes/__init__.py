"""Episodes in the HDF5 format of the original data: files, figures about them, no torch and no rclpy."""
