"""An explicit-state model of the segment protocol (DESIGN, rules 2 to 6) and the searches over it."""
