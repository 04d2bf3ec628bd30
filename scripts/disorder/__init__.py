"""A cluster under load in which things go wrong: what scripts/chaos is made of."""
