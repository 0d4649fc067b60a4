"""An explicit-state model of the segment protocol (docs/architecture.md, rules 2 to 6) and the searches over it."""
