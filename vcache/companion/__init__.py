"""A process beside a serving process, for libraries that may hold the GIL, hang, or write into memory later than they said."""
