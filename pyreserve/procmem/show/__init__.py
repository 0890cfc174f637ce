"""Draw an address space as a picture."""
