"""PagedKV, slots, and the copies between planes and payloads."""
