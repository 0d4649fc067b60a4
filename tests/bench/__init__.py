"""Tests of the benchmarks: that they run and judge rightly, not how fast anything is."""
