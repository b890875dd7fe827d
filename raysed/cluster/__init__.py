"""Everything that speaks to Ray."""
