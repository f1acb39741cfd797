"""What freezing did to recorded runs: the records, and the accuracy cost worked out from them."""
