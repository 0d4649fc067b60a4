"""Chaos: processes that are killed and suspended at random while their every byte is checked; what that and review found."""
