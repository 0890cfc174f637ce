"""What mappings are: their class, their owner, and what to warn of."""
