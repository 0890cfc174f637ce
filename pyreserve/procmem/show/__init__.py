"""Pictures of an address space."""
