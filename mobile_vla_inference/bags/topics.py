"""Which topics of a bag a replay uses: the images, the instruction and the recorded velocities."""

from __future__ import annotations

from dataclasses import dataclass

from mobile_vla_inference.bags.reader import (
    COMPRESSED_IMAGE,
    IMAGE,
    STRING,
    TWIST,
    TWIST_STAMPED,
    BagError,
    BagReader,
    Topic,
    check_encoding,
)

#: Types of images in ROS 1, which mcap files can also hold.
_ROS_1_IMAGES = ("sensor_msgs/Image", "sensor_msgs/CompressedImage")


@dataclass(frozen=True)
class BagTopics:
    """The topics of a bag that a replay uses; a bag can be without instruction and command."""

    image: Topic
    instruction: Topic | None
    command: Topic | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the topics that the bag has."""
        return tuple(topic.name for topic in (self.image, self.instruction, self.command) if topic is not None)


def choose_topics(
    bag: BagReader, image_topic: str | None, command_topic: str | None, instruction_wanted: bool
) -> BagTopics:
    """Find the topics to use.

    Args:
        bag: an open bag.
        image_topic: None: the only image topic of the bag.
        command_topic: None: the topic named cmd_vel, or the only velocity topic of the bag.
        instruction_wanted: whether the bag must have an instruction topic.

    Raises:
        BagError: there is no image topic or more than one, or a topic has the wrong type.
    """
    bag.check_not_empty()
    image = _choose_image(bag, image_topic)
    if image.count == 0:
        raise BagError(
            f"{bag.path} contains no image on {image.name}, expected images; choose another image topic or bag"
        )
    instruction = _choose_instruction(bag) if instruction_wanted else None
    return BagTopics(image, instruction, _choose_command(bag, command_topic))


def _choose_image(bag: BagReader, wanted: str | None) -> Topic:
    images = bag.of_type(IMAGE, COMPRESSED_IMAGE)
    names = ", ".join(topic.name for topic in images)
    if wanted is not None:
        topic = bag.topics.get(wanted) or bag.topics.get(f"/{wanted}")
        if topic is None:
            raise BagError(
                f"{bag.path} has no topic {wanted}, expected an image topic ({names or 'the bag has none'}); "
                "correct --image-topic"
            )
        check_encoding(bag.path, topic)
        if topic not in images:
            raise BagError(
                f"{topic.name} is of type {topic.type_name}, expected {IMAGE} or {COMPRESSED_IMAGE}; choose "
                f"another image topic ({names or 'the bag has none'})"
            )
        return topic
    if not images:
        for topic in bag.topics.values():
            if topic.type_name in (IMAGE, COMPRESSED_IMAGE, *_ROS_1_IMAGES):
                check_encoding(bag.path, topic)
        found = ", ".join(f"{topic.name} ({topic.type_name or 'of no type'})" for topic in bag.topics.values())
        raise BagError(
            f"{bag.path} contains no image topic, only {found}, expected {IMAGE} or {COMPRESSED_IMAGE}; record one"
        )
    filled = [topic for topic in images if topic.count] or images
    if len(filled) > 1:
        raise BagError(f"{bag.path} contains {len(filled)} image topics ({names}): choose one with --image-topic")
    return filled[0]


def _choose_instruction(bag: BagReader) -> Topic:
    named = [topic for topic in bag.topics.values() if topic.name.rpartition("/")[2] == "instruction"]
    topics = [topic for topic in named if topic in bag.of_type(STRING)]
    if len(topics) == 1:
        return topics[0]
    if len(topics) > 1:
        names = ", ".join(topic.name for topic in topics)
        raise BagError(
            f"{bag.path} contains {len(topics)} instruction topics ({names}): give the text with --instruction"
        )
    found = f"{named[0].name} of type {named[0].type_name}" if named else "no instruction topic"
    raise BagError(f"{bag.path} contains {found}, expected {STRING} on instruction; give the text with --instruction")


def _choose_command(bag: BagReader, wanted: str | None) -> Topic | None:
    topics = bag.of_type(TWIST, TWIST_STAMPED)
    if wanted is not None:
        topic = bag.topics.get(wanted) or bag.topics.get(f"/{wanted}")
        if topic not in topics or topic is None:
            found = "missing" if topic is None else f"of type {topic.type_name}"
            raise BagError(f"{wanted} is {found}, expected {TWIST} or {TWIST_STAMPED}; correct --command-topic")
        return topic
    named = [topic for topic in bag.topics.values() if topic.name.rpartition("/")[2] == "cmd_vel"]
    if named and not set(named) & set(topics):
        bag.notes.append(f"{named[0].name} is of type {named[0].type_name}, not {TWIST}: it was not compared")
        return None
    for candidates in ([topic for topic in named if topic in topics], topics):
        if len(candidates) == 1:
            return candidates[0]
        if len(candidates) > 1:
            names = ", ".join(topic.name for topic in candidates)
            bag.notes.append(f"{names} are all velocity topics: none was compared; choose one with --command-topic")
            return None
    return None
