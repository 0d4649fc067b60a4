"""Tests of the processes that belong to another one."""
