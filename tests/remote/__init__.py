"""Tests of segments read across hosts, through a real Mooncake TransferEngine."""
