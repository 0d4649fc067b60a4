"""Tests of VCache under the real LMCache."""
