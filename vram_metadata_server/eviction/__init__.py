"""Which entries go when space runs short: the contract (``base``), the policies, and when to evict (``pressure``)."""
