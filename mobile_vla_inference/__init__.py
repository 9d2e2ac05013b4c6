"""Follow typed or spoken instructions from a camera: a hybrid vision-language-action policy as a ROS 2 node."""

__version__ = "0.1.0"
