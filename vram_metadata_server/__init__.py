"""The central metadata server of the pool: index, allocation, leases, eviction, membership. Payload never passes through it.

``service.py`` is a pure state machine, ``server.py`` the ZeroMQ shell around it; ``python -m vram_metadata_server`` runs it.
Never imports torch (230 MB and 1.2 s of every process that does).
"""
