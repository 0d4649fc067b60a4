"""What VCache's speed is, measured beside what it is judged against, on the machine at hand.

Each module ``<name>.py`` listed in ``__main__`` has a ``run(effort) -> list[Result]``. ``measure`` times, ``report`` shows.
"""
