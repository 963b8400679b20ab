"""How good an adapter is: its base and itself on the same data, with standard errors."""
