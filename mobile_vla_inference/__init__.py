"""A ROS 2 node that drives a robot by camera images and instructions, with a vision-language-action policy."""

__version__ = "0.1.0"
