"""The tests of VCache; ``tests/support`` holds what several of them share."""
