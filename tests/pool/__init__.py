"""Tests of the pool: runtime directory, records, segments, memory, client, donor, read and write paths."""
