"""Distribution of the work over Ray."""
