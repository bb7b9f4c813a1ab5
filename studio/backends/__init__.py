"""How a network is run fast on a device."""
