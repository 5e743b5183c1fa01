"""Selection: exactly the k smallest of what is compared, in one process or in several, at a few bytes beside the values."""
