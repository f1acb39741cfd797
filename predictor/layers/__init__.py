"""What a model's freezable layers are: execution order, grouping, the head, and what a layer costs."""
