"""Episodes in the HDF5 format of the original data. Files come from outside: they are read with bounds, and checked.

reader.py and writer.py are what others use; layout.py names what a file contains, bounded.py reads HDF5 within bounds,
survey.py tries files in a process of its own first.
"""
