"""Tests of what lies below the pool."""
