"""VCache under LMCache: an L2 adapter and a storage plugin (to come)."""
