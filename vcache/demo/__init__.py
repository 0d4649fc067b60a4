"""The main job, to be watched: two processes share KV through donated segments (``vcache demo``).

The command starts what a deployment has, as processes of their own: a metadata server, a donor for each of two devices,
and two engines one after the other. Nothing here is imported by the library. The entry is ``vcache.demo.run.run_demo``.
"""
