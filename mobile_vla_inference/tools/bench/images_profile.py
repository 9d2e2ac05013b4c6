"""A Fast DDS profile with room for images, for a camera process that `mobile_vla bench` starts.

The default of 512 KiB of shared memory holds no image of 1280 x 720: it goes in fragments and gets lost over best
effort. docker/fastdds_images.xml tells robots the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Variables that name the profile: Humble's, and that of Jazzy and later.
_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")

_IMAGES_PROFILE = """<?xml version="1.0" encoding="UTF-8"?>
<dds xmlns="http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles">
  <profiles>
    <transport_descriptors>
      <transport_descriptor>
        <transport_id>images_shm</transport_id>
        <type>SHM</type>
        <segment_size>33554432</segment_size>
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
    """Let the processes that are started meanwhile use the profile, which is written to `folder`."""
    file = folder / "images_profile.xml"
    file.write_text(_IMAGES_PROFILE)
    os.environ.update(dict.fromkeys(_VARIABLES, str(file)))
    try:
        yield
    finally:
        for variable in _VARIABLES:
            del os.environ[variable]
