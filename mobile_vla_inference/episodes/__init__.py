"""Recorded episodes on disk: read, written, and compared with a policy. No torch and no rclpy.

Where things are:
    episode.py                the Episode that every reader returns and every user takes
    find.py                   find_episodes: a path -> its episodes, with the reader of its format
    hdf5/                     the HDF5 format of the original data: reader.py, writer.py
    frames_folder.py          a folder with images/ and actions.csv
    scenario_instructions.py  scenario -> instruction of the original data
    comparison.py, figures.py errors of predicted commands against recorded ones

A new format gets a package next to hdf5/: its reader derives a class from Episode and is called in find.py, its writer
has the methods of hdf5/writer.EpisodeWriter.
"""
