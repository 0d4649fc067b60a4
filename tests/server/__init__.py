"""Tests of the metadata server: the parts, the state machine at message level, and the process over real sockets."""
