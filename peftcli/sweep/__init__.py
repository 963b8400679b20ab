"""Many runs of one recipe that differ in a few fields, and the table that compares them."""
