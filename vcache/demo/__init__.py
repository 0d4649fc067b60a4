"""The main job, to be watched: two processes share KV through the pool and the store below it (``vcache demo``).

The command starts what a deployment has, as processes of their own: a metadata server, donors, Mooncake, and two engines.
Nothing here is imported by the library. The entry is ``vcache.demo.run.run_demo``, the plot is in ``story.py``.
"""
