"""Whether what a Ray cluster makes equals what one machine makes, while its nodes, processes and drivers are killed."""
