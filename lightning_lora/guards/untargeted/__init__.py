"""What automatic targets leave out: most of the weights, or layers whose weight is computed."""
