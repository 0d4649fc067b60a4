"""The pool as its members see it: segments, their donors, the client of the metadata server, the read and write paths.

Import the modules themselves; this package loads nothing, since the metadata server uses ``runtime_dir`` without torch.
"""
