"""What a network costs and what its routing does: closed forms, measurements, and the format of results."""
