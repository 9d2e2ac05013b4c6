"""The Fast DDS profile for images, for the processes that a benchmark or the drill starts.

Robots get the same profile as a file, docker/fastdds_images.xml, which gives the reason for its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Variables that name the profile: Humble's, and that of Jazzy and later.
_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")

#: The text of docker/fastdds_images.xml.
IMAGES_PROFILE = """<?xml version="1.0" encoding="UTF-8"?>
<!-- Fast DDS: shared memory that is large enough for images. Its default segment of 512 KiB is smaller than one
     640 x 480 image, which is then sent in fragments and gets lost over best effort. 16 MiB hold six bgr8 images of
     1280 x 720; a container without the host's IPC has 64 MiB for the segments of all its processes. Both sides of a
     topic should use it: FASTRTPS_DEFAULT_PROFILES_FILE (Humble) and FASTDDS_DEFAULT_PROFILES_FILE (Jazzy and later)
     name this file. -->
<dds xmlns="http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles">
  <profiles>
    <transport_descriptors>
      <transport_descriptor>
        <transport_id>images_shm</transport_id>
        <type>SHM</type>
        <segment_size>16777216</segment_size>
      </transport_descriptor>
      <transport_descriptor>
        <transport_id>network_udp</transport_id>
        <type>UDPv4</type>
      </transport_descriptor>
    </transport_descriptors>
    <participant profile_name="images" is_default_profile="true">
      <rtps>
        <userTransports>
          <transport_id>images_shm</transport_id>
          <transport_id>network_udp</transport_id>
        </userTransports>
        <useBuiltinTransports>false</useBuiltinTransports>
      </rtps>
    </participant>
  </profiles>
</dds>
"""


@contextmanager
def images_profile(folder: Path) -> Iterator[None]:
    """Let the processes that are started in this context use the profile, which is written to `folder`."""
    file = folder / "images_profile.xml"
    file.write_text(IMAGES_PROFILE)
    os.environ.update(dict.fromkeys(_VARIABLES, str(file)))
    try:
        yield
    finally:
        for variable in _VARIABLES:
            del os.environ[variable]
